// A model's thinking before its answer: how long it may be, and that what the answer has to be doesn't bind it.
#pragma once

#include <climits>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#include "constraint.hpp"
#include "guard.hpp"
#include "llama.h"
#include "reasoning-budget.h"

namespace tea {

// Where a constraint of the answer begins to bind.
enum Binds {
    ALWAYS,         // it has the thinking in it
    AFTER_THINKING,
    WITH_ITS_END,   // reading the tag that ends it, by which it may be triggered
};

class Thinking : public Constraint {
  public:
    // Between the tags. `begun` is what the prompt ends with that belongs to the answer: there the thinking may have
    // begun already. After `budget` tokens the first of the end tags is forced; below 0 there is no limit.
    Thinking(const llama_vocab * vocab, const std::string & start, const std::vector<std::string> & ends,
             const std::string & begun, int32_t budget, std::unique_ptr<Constraint> answer, Binds binds)
        : vocab_(vocab), answer_(std::move(answer)), binds_(binds) {
        std::vector<llama_tokens> end_tokens;
        for (const auto & end : ends) end_tokens.push_back(common_tokenize(vocab, end, false, true));
        const std::vector<llama_tokens> starts{common_tokenize(vocab, start, false, true)};
        const llama_tokens & forced = end_tokens.at(0);
        // What the prompt has of the thinking must not count, nor be taken for the end tag where that is forced at once.
        budget_.reset(common_reasoning_budget_init(vocab, starts, end_tokens, forced, INT_MAX));
        for (llama_token token : common_tokenize(vocab, begun, false, true)) llama_sampler_accept(budget_.get(), token);
        if (budget >= 0) budget_.reset(common_reasoning_budget_init(vocab, starts, end_tokens, forced, budget, state()));
    }

    std::unique_ptr<Constraint> copy() const override {
        Guard guard;
        return std::unique_ptr<Constraint>(new Thinking(*this));
    }

    bool allows(llama_token token) override {
        llama_token_data one{token, 0.0f, 0.0f};
        llama_token_data_array array{&one, 1, -1, false};
        llama_sampler_apply(budget_.get(), &array);
        return one.logit > -INFINITY && (is_bound() ? answer_->allows(token) : may_end() || !ends_text(vocab_, token));
    }

    void forbid(float * logits, int32_t n_vocab) override {
        if (state() == REASONING_BUDGET_FORCING) {
            candidates_.resize(n_vocab);
            for (llama_token id = 0; id < n_vocab; ++id) candidates_[id] = {id, logits[id], 0.0f};
            llama_token_data_array array{candidates_.data(), candidates_.size(), -1, false};
            llama_sampler_apply(budget_.get(), &array);
            for (const auto & candidate : candidates_) logits[candidate.id] = candidate.logit;
        }
        if (is_bound()) return answer_->forbid(logits, n_vocab);
        for (llama_token id = 0; id < n_vocab && !may_end(); ++id) {
            if (ends_text(vocab_, id)) logits[id] = -INFINITY;
        }
    }

    bool is_slow() const override { return !is_bound() || answer_->is_slow(); }

    void accept(llama_token token) override {
        const bool was_bound = is_bound();
        if (looks_for_tags()) llama_sampler_accept(budget_.get(), token);
        if (was_bound) {
            answer_->accept(token);
        } else if (answer_ && binds_ == WITH_ITS_END && state() == REASONING_BUDGET_DONE) {
            const llama_tokens * end = common_reasoning_budget_get_end_match(budget_.get());
            if (end) {
                for (llama_token replayed : *end) answer_->accept(replayed);
            }
        }
    }

    bool may_end() override {  // an answer that has to be something is not given yet in the midst of thinking
        return is_bound() ? answer_->may_end() : answer_ == nullptr || binds_ != AFTER_THINKING;
    }

    bool has_to_end() override { return is_bound() && answer_->has_to_end(); }

  private:
    struct Free {
        void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
    };

    Thinking(const Thinking & other)
        : vocab_(other.vocab_), budget_(llama_sampler_clone(other.budget_.get())), answer_(other.answer_ ? other.answer_->copy() : nullptr),
          binds_(other.binds_) {}

    common_reasoning_budget_state state() const { return common_reasoning_budget_get_state(budget_.get()); }

    bool is_thinking() const { return state() != REASONING_BUDGET_IDLE && state() != REASONING_BUDGET_DONE; }

    bool is_bound() const { return answer_ && (binds_ == ALWAYS || !is_thinking()); }

    // In what has to be something, a tag is a part of it: one in a text of JSON begins no thinking.
    bool looks_for_tags() const {
        if (!answer_ || is_thinking()) return true;
        return binds_ == ALWAYS ? state() == REASONING_BUDGET_IDLE : answer_->is_waiting();
    }

    const llama_vocab * vocab_;
    std::unique_ptr<llama_sampler, Free> budget_;
    std::unique_ptr<Constraint> answer_;
    Binds binds_;
    std::vector<llama_token_data> candidates_;
};

// Has the constraint know of a thinking before the answer.
inline void add_thinking(std::unique_ptr<Constraint> & constraint, const llama_vocab * vocab, const std::string & start,
                         const std::vector<std::string> & ends, const std::string & begun, int32_t budget, Binds binds) {
    Guard guard;
    constraint = std::make_unique<Thinking>(vocab, start, ends, begun, budget, std::move(constraint), binds);
}

}  // namespace tea
