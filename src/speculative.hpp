// Speculative decoding, by llama.cpp's own code (common/speculative.h): something cheap guesses the next tokens of a text,
// and the model checks them all in one batch. What the model itself would not have chosen is dropped, so that a guess
// changes how long a text takes and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "guard.hpp"
#include "llama.h"
#include "prefix_cache.hpp"
#include "speculative.h"

namespace tea {

class Speculator {
  public:
    struct Options {
        common_speculative_type type = COMMON_SPECULATIVE_TYPE_NONE;
        int32_t n_draft = 0;  // tokens guessed of a text at once, at most
        int32_t n_rows = 0;   // in one batch, for the next tokens of all texts and the guesses at what follows them
    };

    // `draft` computes the guesses: a context of a smaller model or of the model's MTP layers, null where none is needed.
    Speculator(llama_context * ctx, llama_context * draft, int32_t n_seq, const Options & options)
        : draft_(draft), options_(options), histories_(n_seq) {
        Guard guard;
        common_params_speculative params;
        params.types = {options.type};
        params.draft.ctx_tgt = ctx;
        params.draft.ctx_dft = draft;
        params.draft.n_max = options.n_draft;
        params.draft.backend_sampling = false;
        params.ngram_simple.size_n = static_cast<uint16_t>(std::min(shortest_match, options.n_draft));
        params.ngram_simple.size_m = static_cast<uint16_t>(options.n_draft);
        spec_.reset(common_speculative_init(params, n_seq));
        if (!spec_) throw std::runtime_error("llama.cpp knows no such way to guess");
        if (draft) batch_ = common_batch(ctx);
    }

    // Puts guesses into `draft` of each text, whose last token is the only one that is not computed. The batch has room
    // for `n_free` rows.
    template <class Texts>
    void guess(const Texts & texts, size_t n_free) {
        if (texts.empty()) return;
        const size_t n_rows = std::min<size_t>(options_.n_rows, n_free) / texts.size();
        const auto n_each = std::min(options_.n_draft, static_cast<int32_t>(n_rows) - 1);
        if (n_each < 1) return;
        for (auto * text : texts) {
            const int32_t n = std::min(n_each, text->n_max - text->n_generated - 1);
            if (n < 1) continue;
            Tokens & history = histories_[text->seq];
            history.assign(text->tokens.begin(), text->tokens.end() - 1);
            common_speculative_get_draft_params(spec_.get(), text->seq) = {
                true, n, static_cast<llama_pos>(text->n_past), text->tokens.back(), &history, &text->draft};
        }
        common_speculative_draft(spec_.get());
        if (!draft_) return;
        for (auto * text : texts) llama_memory_seq_rm(llama_get_memory(draft_), text->seq, text->n_past, -1);
    }

    // Has what guesses read what the model has just read.
    void read(const Tokens & tokens, const std::vector<llama_pos> & positions, const std::vector<llama_seq_id> & seqs, size_t n) {
        if (!draft_) return;
        batch_.clear();
        for (size_t i = 0; i < n; ++i) batch_.add(tokens[i], positions[i], seqs[i], false);
        if (!common_speculative_process(spec_.get(), batch_)) throw std::runtime_error("the draft could not be computed");
    }

    // The first `n` guesses of a text were right.
    void accept(const Text & text, size_t n) { common_speculative_accept(spec_.get(), text.seq, static_cast<uint16_t>(n)); }

    // The model did not finish reading a text. What guesses goes on from where the next one begins, and guesses worse.
    void forget(const Text & text) {
        if (draft_) llama_memory_seq_rm(llama_get_memory(draft_), text.seq, -1, -1);
    }

  private:
    static constexpr int32_t shortest_match = 3;  // tokens that a text repeats before it is taken to go on repeating

    llama_context * draft_;
    Options options_;
    std::vector<Tokens> histories_;  // by sequence: the text but for its last token
    common_speculative_ptr spec_;
    common_batch batch_;
};

}  // namespace tea
