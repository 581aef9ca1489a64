// Many texts, one batch: at each step every text that is past its prompt gets its next token, and what is left of the
// batch goes to the prompts, one after the other, so that neither holds up the other. Short prompts go first, for a
// second at most. Texts join and leave between steps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cell_order.hpp"
#include "guard.hpp"
#include "llama.h"
#include "logprobs.hpp"
#include "prefix_cache.hpp"
#include "sampling.hpp"
#include "speculative.hpp"
#include "text_filter.hpp"

namespace tea {

enum Finish { RUNNING, STOP, LENGTH, CANCELLED, NO_TOKEN, FAULT, UNFIT };

// A text being generated. It belongs to the thread that runs the batch; any other may touch what is atomic.
struct Generation : Text {
    size_t n_prompt = 0;
    int32_t n_max = 0;          // tokens to generate
    std::atomic<int32_t> n_generated{0};
    Chain * chain = nullptr;    // not owned
    int32_t n_lookback = 0;     // tokens at the end of the prompt that the chain wants to see
    TextFilter filter;
    std::vector<llama_token> markup;  // control tokens that are part of the text
    std::unique_ptr<Logprobs> logprobs;  // null: nobody wants them
    bool stream = false;        // wants each piece of text as it comes
    bool save = false;          // wants its state when it ends by itself
    std::vector<uint8_t> state; // of its first n_past tokens, once it has ended so
    bool parked = false;        // lost its place in the cache to others, until one of them ends
    std::atomic<bool> cancelled{false};
    std::atomic<Finish> finish{RUNNING};
    std::string fault;          // what went wrong, after FAULT
    bool cut = false;           // by a stop string, after STOP
    size_t n_cached = 0;        // tokens of the prompt that were found computed
    size_t n_drafted = 0, n_accepted = 0;  // tokens that were guessed, and guessed right
    int64_t begun_us = 0, first_us = 0, last_us = 0;

    bool has_news() const { return finish != RUNNING || (stream && filter.has_ready()); }
};

class Batch {
  public:
    using Generations = std::vector<std::shared_ptr<Generation>>;

    // With `fill_fours` a batch of 4 n - 1 or 4 n + 2 rows is filled up: ggml multiplies repacked weights with four rows
    // at once, and with each row of the rest alone, which takes as long (ggml-cpu/repack.cpp, forward_mul_mat). The
    // rows belong to a sequence of their own, the one after `options.n_seq`, and are forgotten at once.
    // With `speculation.n_draft` the next tokens of texts are guessed, by `options.draft` if it takes one.
    Batch(llama_context * ctx, const llama_vocab * vocab, const PrefixCache::Options & options, bool fill_fours,
          const Speculator::Options & speculation = {})
        : ctx_(ctx), vocab_(vocab), n_vocab_(llama_vocab_n_tokens(vocab)), n_batch_(llama_n_batch(ctx)),
          whole_(options.whole), filler_(fill_fours ? options.n_seq : -1), cache_(ctx, options) {
        if (speculation.n_draft > 0) {
            speculator_ = std::make_unique<Speculator>(ctx, options.draft, options.n_seq, speculation);
        }
        show_cells(ctx);
        llama_set_abort_callback(ctx, [](void * self) { return static_cast<Batch *>(self)->is_aborted(); }, this);
    }

    // Computes until one of the texts has news or `wake` was called. Prompts are read in the order of `texts`.
    // False if texts that are not among these hold all sequences.
    // Throws what llama.cpp throws, after which the context can't be used.
    bool run(const Generations & texts) {
        Guard guard;
        cache_.retire_abandoned();
        do {
            bool news = texts.empty();
            for (const auto & text : texts) {
                if (text->finish == RUNNING && text->cancelled.load()) end(*text, CANCELLED, texts);
                if (text->finish == RUNNING && text->n_max == 0) end(*text, LENGTH, texts);
                news |= text->has_news();
            }
            if (news) break;
            if (!step(texts)) return false;
        } while (!woken_.exchange(false));
        return true;
    }

    // From any thread: the current `run` returns after its step, or else the next one after its first.
    void wake() { woken_.store(true); }

    const PrefixCache & cache() const { return cache_; }

  private:
    static constexpr size_t short_prompt = 4;                  // batches that a short prompt fills
    static constexpr int64_t longest_silence_us = 1'000'000;   // that texts past their prompt keep for short prompts

    struct Share {  // of one text in the batch: rows up to `end`, the last of them with logits if the prompt is read
        Generation * text;
        size_t n_rows, end;
        bool is_last;
    };

    bool step(const Generations & texts) {
        fill(texts, true);
        if (shares_.empty()) {
            for (const auto & text : texts) text->parked = false;
            fill(texts, false);
        }
        if (shares_.empty()) return std::any_of(texts.begin(), texts.end(), [](const auto & t) { return t->has_news(); });
        const size_t n_filler = add_filler();
        alone_.store(shares_.size() == 1 ? shares_[0].text : nullptr);
        const int32_t rc = decode();
        alone_.store(nullptr);
        if (n_filler > 0) llama_memory_seq_rm(llama_get_memory(ctx_), filler_, -1, -1);
        if (rc == 1) {
            if (speculator_ && guesses_) {
                guesses_ = false;  // they need room too
            } else {
                make_room(texts);
            }
            return true;
        }
        if (rc == 2) {  // cut short; the next turn of `run` ends the text
            Generation & text = *shares_[0].text;
            const size_t n_read = whole_ ? 0 : llama_memory_seq_pos_max(llama_get_memory(ctx_), text.seq) + 1;
            text.n_past = std::min(n_read, text.tokens.size() - 1);
            if (speculator_) speculator_->forget(text);
            return true;
        }
        if (rc != 0) throw std::runtime_error("llama.cpp could not compute the next batch");
        if (speculator_) speculator_->read(tokens_, positions_, sequences_, tokens_.size() - n_filler);
        for (const Share & share : shares_) share.text->n_past += share.n_rows;
        for (const Share & share : shares_) {
            if (share.is_last) go_on(share, texts);
        }
        return true;
    }

    void fill(const Generations & texts, bool patient) {
        shares_.clear();
        tokens_.clear();
        positions_.clear();
        sequences_.clear();
        outputs_.clear();
        next_.clear();
        for (const auto & text : texts) {
            text->draft.clear();
            if (text->seq >= 0 && n_left(*text) == 1) next_.push_back(text.get());
        }
        const bool prompts_first = has_short_prompt(texts) && ggml_time_us() - told_us_ < longest_silence_us;
        if (!prompts_first) add_next_tokens();
        for (const auto & text : texts) {
            if (tokens_.size() >= n_batch_) return;
            if (text->seq >= 0 ? n_left(*text) > 1 : !text->parked && begin(text, patient, texts)) add(*text);
        }
        if (prompts_first) add_next_tokens();
    }

    void add_next_tokens() {
        if (speculator_ && guesses_) speculator_->guess(next_, n_batch_ - tokens_.size());
        for (Generation * text : next_) {
            add(*text);
            add_guesses(*text);
        }
        told_us_ = ggml_time_us();
    }

    // Whether the prompt that is next will soon be read. Then it is read alone: its first token comes earlier, and once
    // more texts take part, each gets its tokens cheaper.
    bool has_short_prompt(const Generations & texts) const {
        for (const auto & text : texts) {
            if (text->seq >= 0 ? n_left(*text) > 1 : !text->parked) return n_left(*text) <= short_prompt * n_batch_;
        }
        return false;
    }

    static size_t n_left(const Text & text) { return text.tokens.size() - text.n_past; }

    bool begin(const std::shared_ptr<Generation> & text, bool patient, const Generations & texts) {
        if (text->finish != RUNNING || !cache_.begin(text, patient)) return false;
        if (!text->unfit.empty()) {
            end(*text, UNFIT, texts);
            return false;
        }
        if (text->begun_us == 0) {
            text->begun_us = ggml_time_us();
            text->n_cached = text->n_past;
            const auto n = std::min<size_t>(text->n_lookback, text->n_prompt);
            text->chain->read_prompt(text->tokens.data() + text->n_prompt - n, static_cast<int32_t>(n));
        }
        return true;
    }

    void add(Generation & text) {
        const size_t n = std::min(n_left(text), n_batch_ - tokens_.size());
        if (n == 0) return;
        const auto from = text.tokens.begin() + text.n_past;
        tokens_.insert(tokens_.end(), from, from + n);
        for (size_t i = 0; i < n; ++i) positions_.push_back(static_cast<llama_pos>(text.n_past + i));
        sequences_.insert(sequences_.end(), n, text.seq);
        outputs_.insert(outputs_.end(), n, 0);
        const bool is_last = n == n_left(text);
        if (is_last) outputs_.back() = 1;
        shares_.push_back({&text, n, tokens_.size(), is_last});
    }

    void add_guesses(Generation & text) {
        for (size_t i = 0; i < text.draft.size(); ++i) {
            tokens_.push_back(text.draft[i]);
            positions_.push_back(static_cast<llama_pos>(text.n_past + 1 + i));
            sequences_.push_back(text.seq);
            outputs_.push_back(1);
        }
        text.n_drafted += text.draft.size();
    }

    // How many rows to add to `n` so that none or few are multiplied alone.
    static size_t to_fours(size_t n) {
        const size_t rest = n % 4;
        return rest == 3 || (rest == 2 && n > 4) ? 4 - rest : 0;
    }

    // Fills up the rows, and among them those with logits, which the largest matrix is multiplied with.
    size_t add_filler() {
        if (filler_ < 0) return 0;
        size_t n_more = to_fours(std::count(outputs_.begin(), outputs_.end(), 1));
        for (size_t i = 0; i < outputs_.size() && n_more > 0; ++i) {
            if (outputs_[i]) continue;
            outputs_[i] = 1;
            --n_more;
        }
        const size_t n = tokens_.size() + 2 <= n_batch_ ? to_fours(tokens_.size()) : 0;
        for (size_t i = 0; i < n; ++i) {
            tokens_.push_back(tokens_[0]);
            positions_.push_back(static_cast<llama_pos>(i));
            sequences_.push_back(filler_);
            outputs_.push_back(n_more > 0);
            n_more -= n_more > 0;
        }
        return n;
    }

    int32_t decode() {
        one_each_.assign(tokens_.size(), 1);
        sequence_of_.clear();
        for (auto & seq : sequences_) sequence_of_.push_back(&seq);
        llama_batch batch{};
        batch.n_tokens = static_cast<int32_t>(tokens_.size());
        batch.token = tokens_.data();
        batch.pos = positions_.data();
        batch.n_seq_id = one_each_.data();
        batch.seq_id = sequence_of_.data();
        batch.logits = outputs_.data();
        return llama_decode(ctx_, batch);
    }

    // The KV cache is full: what nobody computes with goes first, then the text that comes last.
    void make_room(const Generations & texts) {
        if (cache_.evict()) return;
        filler_ = -1;  // from here on every cell is wanted
        Generation * last = nullptr;
        size_t n_live = 0;
        for (const auto & text : texts) {
            if (text->seq < 0) continue;
            last = text.get();
            ++n_live;
        }
        if (n_live == 1) return end(*last, LENGTH, texts);
        cache_.retire(*last);
        last->n_past = 0;
        last->parked = true;
    }

    // Takes the next token of a text, and those after it as long as they were guessed.
    void go_on(const Share & share, const Generations & texts) {
        Generation & text = *share.text;
        auto row = static_cast<int32_t>(share.end) - 1;
        Finish finish = sample(text, row);
        size_t n = 0;
        for (; n < text.draft.size() && finish == RUNNING && text.tokens.back() == text.draft[n]; ++n) {
            ++text.n_past;
            finish = sample(text, ++row);
        }
        if (!text.draft.empty()) {
            text.n_accepted += n;
            if (n < text.draft.size()) cache_.drop_guesses(text);
            speculator_->accept(text, n);
        }
        if (finish != RUNNING) end(text, finish, texts);
    }

    // Chooses a token by one row of the batch, and says whether the text ends with it.
    Finish sample(Generation & text, int32_t row) {
        llama_token token = -1;
        try {
            token = text.chain->sample(ctx_, row, n_vocab_, text.logprobs.get());
        } catch (const std::exception & e) {  // of this text's samplers; the others go on
            text.fault = e.what();
            return FAULT;
        }
        text.last_us = ggml_time_us();
        if (text.first_us == 0) text.first_us = text.last_us;
        if (token < 0) return NO_TOKEN;
        if (ends_text(vocab_, token)) return STOP;
        text.tokens.push_back(token);
        text.n_generated.fetch_add(1, std::memory_order_relaxed);
        const auto & markup = text.markup;
        read_piece(vocab_, token, std::find(markup.begin(), markup.end(), token) != markup.end(), piece_);
        if (text.logprobs) text.logprobs->keep(piece_.size());
        text.cut = text.filter.push(piece_.data(), piece_.size());
        if (text.cut) {
            if (text.logprobs) text.logprobs->cut(text.filter.n_cut());
            return STOP;
        }
        if (text.chain->constraint && text.chain->constraint->has_to_end()) return STOP;
        return text.n_generated >= text.n_max ? LENGTH : RUNNING;
    }

    void end(Generation & text, Finish finish, const Generations & texts) {
        text.filter.flush();
        if (text.save && (finish == STOP || finish == LENGTH)) text.state = cache_.state_of(text);
        text.finish = finish;
        guesses_ = true;
        cache_.retire(text);
        for (const auto & other : texts) other->parked = false;
    }

    bool is_aborted() const {
        const Generation * text = alone_.load();
        return text != nullptr && text->cancelled.load();
    }

    llama_context * ctx_;
    const llama_vocab * vocab_;
    int32_t n_vocab_;
    size_t n_batch_;
    bool whole_;
    llama_seq_id filler_;  // -1: none
    PrefixCache cache_;
    std::unique_ptr<Speculator> speculator_;
    bool guesses_ = true;  // there is room for them
    int64_t told_us_ = 0;  // when the texts past their prompt had their last turn
    std::atomic<bool> woken_{false};
    std::atomic<Generation *> alone_{nullptr};  // the only text of the batch that is computed now

    std::vector<Share> shares_;
    std::vector<Generation *> next_;  // texts past their prompt
    std::vector<llama_token> tokens_;
    std::vector<llama_pos> positions_;
    std::vector<int32_t> one_each_;
    std::vector<llama_seq_id> sequences_;
    std::vector<llama_seq_id *> sequence_of_;
    std::vector<int8_t> outputs_;
    std::string piece_;
};

}  // namespace tea
