// Picks the next token without building llama.cpp's candidate array where the choice doesn't need all of it: for a
// vocabulary of 152k entries, filling and sorting that array costs as much as a layer of a 0.5B model.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <vector>

#include "constraint.hpp"
#include "guard.hpp"
#include "llama.h"
#include "logprobs.hpp"

namespace tea {

// Every candidate whose logit is at least `floor`, in the order of their ids.
inline void gather(const float * x, int32_t n, float floor, std::vector<llama_token_data> & out) {
    constexpr int32_t block = 64;
    out.clear();
    for (int32_t begin = 0; begin < n; begin += block) {
        const int32_t end = std::min(begin + block, n);
        bool any = false;
        for (int32_t i = begin; i < end; ++i) any |= x[i] >= floor;
        if (!any) continue;
        for (int32_t i = begin; i < end; ++i) {
            if (x[i] >= floor) out.push_back({i, x[i], 0.0f});
        }
    }
}

// The sampler of a chain that leaves few candidates, where it is the first to look at all of them: its part is then done
// on the logits themselves.
enum class Head { NONE, TOP_K, TOP_P, MIN_P };

// A chain of llama.cpp's samplers, entered by the shortest way. With or without, the tokens are those of the whole chain
// on the candidate array of the whole vocabulary, but for the order of candidates with equal logits.
struct Chain {
    llama_sampler * samplers = nullptr;  // owned
    int32_t n_edits = 0;                 // at its begin: those that change the logits of few tokens, all of them in `seen`
    bool greedy = false;                 // nothing after them but the choice of the largest logit
    Head head = Head::NONE;              // the sampler after them
    int32_t k = 0;
    float top_p = 1, min_p = 0;          // with TOP_P: min_p of the sampler that follows it, 0 if another does
    std::vector<llama_logit_bias> bias;  // added to the logits in place: few tokens, no pass over the vocabulary
    std::unique_ptr<Constraint> constraint;  // what the text has to be; none: anything
    std::vector<llama_sampler *> lookback;  // samplers of the chain that also look at the prompt; not owned

    ~Chain() { llama_sampler_free(samplers); }

    // The next token of the i-th output of the last decode, or -1 if there is none to choose: no logit is a finite number.
    llama_token sample(llama_context * ctx, int32_t i, int32_t n_vocab, Logprobs * told = nullptr) {
        Guard guard;
        float * logits = llama_get_logits_ith(ctx, i);
        if (!logits) throw Fault("llama.cpp kept no logits for the last token");
        if (told) told->read(logits, n_vocab);
        edit(logits);
        llama_token token = -1;
        if (constraint && !greedy && !constraint->is_slow()) {
            constraint->forbid(logits, n_vocab);
            token = choose(logits, n_vocab);
        } else {
            token = choose(logits, n_vocab);
            if (constraint && token >= 0 && !constraint->allows(token)) {
                constraint->forbid(logits, n_vocab);
                token = choose(logits, n_vocab);
            }
        }
        if (token < 0) return -1;
        if (told) told->choose(token, unedited(logits, token));
        if (constraint) constraint->accept(token);
        llama_sampler_accept(samplers, token);
        see(token);
        return token;
    }

    // Takes the end of the prompt into the samplers that penalise what was said before.
    void read_prompt(const llama_token * tokens, int32_t n) {
        Guard guard;
        for (int32_t i = 0; i < n; ++i) {
            for (auto * sampler : lookback) llama_sampler_accept(sampler, tokens[i]);
            see(tokens[i]);
        }
    }

    void reset() {
        llama_sampler_reset(samplers);
        seen_.clear();
        is_seen_.clear();
    }

  private:
    // Adds the bias, and has penalties and DRY change the tokens that they may change.
    void edit(float * logits) {
        originals_.clear();
        for (const auto & b : bias) {
            originals_.push_back({b.token, logits[b.token]});
            logits[b.token] += b.bias;
            if (logits[b.token] > largest_logit) logits[b.token] = largest_logit;
        }
        if (n_edits == 0) return;
        candidates_.clear();
        for (const auto token : seen_) candidates_.push_back({token, logits[token], 0.0f});
        llama_token_data_array array = {candidates_.data(), candidates_.size(), -1, false};
        for (int32_t i = 0; i < n_edits; ++i) llama_sampler_apply(llama_sampler_chain_get(samplers, i), &array);
        for (const auto & c : candidates_) {
            originals_.push_back({c.id, logits[c.id]});
            logits[c.id] = c.logit;
        }
    }

    // What the model itself gave a token.
    float unedited(const float * logits, llama_token token) const {
        for (const auto & o : originals_) {
            if (o.token == token) return o.bias;
        }
        return logits[token];
    }

    // A token by the logits, whatever was forbidden; -1 if there is none.
    llama_token choose(const float * logits, int32_t n_vocab) {
        if (greedy) return argmax(logits, n_vocab);
        const bool narrowed = narrow(logits, n_vocab);
        if (!narrowed) gather(logits, n_vocab, -FLT_MAX, candidates_);  // all that are numbers
        if (candidates_.empty()) return -1;
        const bool sorted = narrowed && head != Head::MIN_P;
        llama_token_data_array array = {candidates_.data(), candidates_.size(), -1, sorted};
        const int32_t n = llama_sampler_chain_n(samplers);
        for (int32_t i = n_edits + narrowed; i < n; ++i) llama_sampler_apply(llama_sampler_chain_get(samplers, i), &array);
        if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) return -1;
        const llama_token_data & chosen = array.data[array.selected];
        return std::isnan(chosen.p) ? -1 : chosen.id;
    }

    void see(llama_token token) {
        if (n_edits == 0) return;
        if (static_cast<size_t>(token) >= is_seen_.size()) is_seen_.resize(token + 1);
        if (is_seen_[token]) return;
        is_seen_[token] = true;
        seen_.push_back(token);
    }

    // Does the part of `head`; false if it must be left to llama.cpp.
    bool narrow(const float * logits, int32_t n_vocab) {
        switch (head) {
            case Head::NONE: return false;
            case Head::TOP_K:
                candidates_.resize(std::min(k, n_vocab));
                candidates_.resize(top_k(logits, n_vocab, candidates_.size(), candidates_.data()));
                return true;
            case Head::MIN_P: {
                const llama_token best = argmax(logits, n_vocab);
                if (best < 0) return false;
                gather(logits, n_vocab, logits[best] + logf(min_p), candidates_);
                return true;
            }
            case Head::TOP_P: return narrow_by_mass(logits, n_vocab);
        }
        return false;
    }

    // The candidates that together reach top_p, found among those above a logit that so many surely lie above. The sum of
    // all probabilities and the one that is cut at are summed up as llama.cpp does, so that the cut is the same.
    bool narrow_by_mass(const float * logits, int32_t n_vocab) {
        constexpr int32_t n_steps = 512, steps_per_unit = 16;  // of the distance to the largest logit
        const llama_token best = argmax(logits, n_vocab);
        if (best < 0) return false;
        const float max = logits[best];
        float sum = 0;
        double mass[n_steps] = {};
        for (int32_t i = 0; i < n_vocab; ++i) {
            const float p = expf(logits[i] - max);
            sum += p;
            const float distance = (max - logits[i]) * steps_per_unit;
            mass[distance < n_steps ? static_cast<int32_t>(distance) : n_steps - 1] += p;
        }
        if (!std::isfinite(sum)) return false;
        int32_t step = 0;
        for (double above = mass[0]; above < 1.001 * top_p * sum && step < n_steps - 1;) above += mass[++step];
        const float floor_by_mass = max - static_cast<float>(step + 1) / steps_per_unit;
        const float floor = min_p > 0 ? std::max(floor_by_mass, max + logf(min_p)) : floor_by_mass;
        if (step == n_steps - 1 && floor == floor_by_mass) return false;
        gather(logits, n_vocab, floor, candidates_);
        std::sort(candidates_.begin(), candidates_.end(), is_better);
        float reached = 0;
        for (size_t i = 0; i < candidates_.size(); ++i) {
            reached += expf(candidates_[i].logit - max) / sum;
            if (reached >= top_p) {
                candidates_.resize(i + 1);
                return true;
            }
        }
        return floor != floor_by_mass;  // else the next sampler drops what is not here
    }

    static constexpr float largest_logit = 1e30f;  // that can still be divided by a small temperature

    std::vector<llama_token_data> candidates_;
    std::vector<llama_logit_bias> originals_;  // tokens whose logit was changed, and what it was
    std::vector<llama_token> seen_;            // in the text, each once
    std::vector<bool> is_seen_;
};

}  // namespace tea
