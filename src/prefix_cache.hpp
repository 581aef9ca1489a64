// Which tokens the KV cache holds, and for whom. What was computed once is found again by its tokens, whoever asked
// first: a sequence that shares them is a copy of cell numbers, not of keys and values (llama.h, llama_memory_seq_cp).
//
// A sequence is live while a text is being computed in it, and kept afterwards, until the least recently used one has to
// make room. What leaves the KV cache may go on into host memory. A draft context (speculative.hpp) has the same
// sequences.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "guard.hpp"
#include "llama.h"

namespace tea {

using Tokens = std::vector<llama_token>;

inline size_t common_prefix(const Tokens & a, size_t n_a, const Tokens & b, size_t n_b) {
    const size_t n = std::min(n_a, n_b);
    return std::mismatch(a.begin(), a.begin() + n, b.begin()).first - a.begin();
}

// What was computed elsewhere: tokens, and the state of a sequence that holds them (llama_state_seq_get_data).
struct Known {
    Tokens tokens;
    const char * state = nullptr;  // not owned; null: nothing is known
    size_t n_bytes = 0;
};

// A text in the KV cache, or on its way into it.
struct Text {
    Tokens tokens;          // the prompt, then what was generated
    size_t n_past = 0;      // tokens whose keys and values are computed
    size_t n_shared = 0;    // of them, those in cells that another sequence brought
    Tokens draft;           // guesses of what comes next
    llama_seq_id seq = -1;  // -1: in no sequence yet
    Known known;            // until the text has a sequence
    std::string unfit;      // why `known` can't be the state of a sequence here, if it can't
};

class PrefixCache {
  public:
    struct Options {
        int32_t n_seq = 1;      // sequences, live and kept
        bool reuse = true;      // keep sequences at all
        bool whole = false;     // the state can't be cut or shared (recurrent, sliding window): all of it or nothing
        size_t n_kept_max = 0;  // cells for kept sequences, of which the last one may be longer
        size_t n_host_max = 0;  // bytes of host memory for those that had to leave
        llama_context * draft = nullptr;  // that guesses for the first one, if there is one
    };

    PrefixCache(llama_context * ctx, const Options & options) : ctx_(ctx), options_(options), live_(options.n_seq) {
        for (llama_seq_id seq = options.n_seq; seq-- > 0;) free_.push_back(seq);
    }

    // Gives the text a sequence and what is known of its tokens, all but the last: its logits have to be computed.
    // False if it has to wait: for a sequence, or, if `patient`, for a text in work that computes a longer prefix of it.
    bool begin(const std::shared_ptr<Text> & text, bool patient) {
        Match match = find(*text);
        const size_t n_known = worth_reading(*text, match.n);
        if (n_known > 0) match = {n_known, -1, kept_.end()};
        if (patient && in_work(*text) >= match.n + worth_waiting) return false;
        const size_t n = match.n;
        if (match.kept != kept_.end() && (options_.whole || n == match.kept->tokens.size() || !spare(match.kept))) {
            if (match.kept->seq >= 0) return take_over(text, match.kept, n);
        }
        touch(match.kept);  // so that others leave host memory before it
        const llama_seq_id seq = take_sequence(match.kept);
        if (seq < 0) return false;
        text->n_past = text->n_shared = 0;
        if (n_known > 0) {
            if (read_known(*text, seq, n)) text->n_past = n;
        } else if (match.live >= 0 || (match.kept != kept_.end() && match.kept->seq >= 0)) {
            copy(match.live >= 0 ? match.live : match.kept->seq, seq, n);
            text->n_past = text->n_shared = n;
        } else if (match.kept != kept_.end() && restore(*match.kept, seq)) {
            if (n < match.kept->tokens.size()) cut(seq, n);
            text->n_past = n;
        }
        occupy(text, seq);
        return true;
    }

    // The state of a live text, to be `Known` elsewhere. Empty where there is none, or no memory for it.
    std::vector<uint8_t> state_of(const Text & text) const {
        if (text.seq < 0 || text.n_past == 0) return {};
        return copy_state(ctx_, text.seq, SIZE_MAX);
    }

    // Drops what was computed beyond the text's `n_past`: guesses that were wrong.
    void drop_guesses(const Text & text) const {
        if (!cut(text.seq, text.n_past)) throw std::runtime_error("llama.cpp could not drop tokens from its cache");
    }

    // The text is computed no further; its tokens stay to be found.
    void retire(Text & text) {
        const llama_seq_id seq = text.seq;
        if (seq < 0) return;
        const std::shared_ptr<Text> hold = std::move(live_[seq]);  // `text` may die with it
        live_[seq] = nullptr;
        text.seq = -1;
        const size_t n = text.n_past;
        if (!options_.reuse || n < worth_keeping || holds(text.tokens, n)) {
            release(seq);
            return;
        }
        kept_.push_back({seq, Tokens(text.tokens.begin(), text.tokens.begin() + n), n - text.n_shared, {}});
        drop_prefixes_of(std::prev(kept_.end()));
        while (n_kept_cells_ + kept_.back().n_cells > options_.n_kept_max && evict_before(std::prev(kept_.end()))) {}
        n_kept_cells_ += kept_.back().n_cells;
    }

    // Frees the cells of the kept sequence that was used least recently. False if none is left.
    bool evict() { return evict_before(kept_.end()); }

    // Retires the texts that nobody but this table knows any more.
    void retire_abandoned() {
        for (auto & text : live_) {
            if (text && text.use_count() == 1) retire(*text);
        }
    }

    size_t n_live() const { return std::count_if(live_.begin(), live_.end(), [](const auto & t) { return t != nullptr; }); }
    size_t n_kept() const { return kept_.size(); }
    size_t n_host_bytes() const { return n_host_bytes_; }

  private:
    struct Kept {
        llama_seq_id seq;            // -1: in host memory
        Tokens tokens;
        size_t n_cells;              // that no other sequence brought
        std::vector<uint8_t> state;  // llama_state_seq_get_data, in host memory
        std::vector<uint8_t> draft_state;

        size_t n_bytes() const { return state.size() + draft_state.size(); }
    };
    using KeptAt = std::list<Kept>::iterator;
    struct Match {
        size_t n = 0;
        llama_seq_id live = -1;
        KeptAt kept;
    };

    static constexpr size_t worth_keeping = 8;    // tokens
    static constexpr size_t worth_waiting = 32;   // tokens that another text is about to compute
    static constexpr size_t worth_restoring = 128;  // tokens more than the KV cache itself holds
    static constexpr size_t n_kept_texts = 256;   // searched one by one

    llama_memory_t memory() const { return llama_get_memory(ctx_); }

    bool cut(llama_seq_id seq, llama_pos from) const {
        if (options_.draft) llama_memory_seq_rm(llama_get_memory(options_.draft), seq, from, -1);
        return llama_memory_seq_rm(memory(), seq, from, -1);
    }

    void copy(llama_seq_id from, llama_seq_id to, llama_pos n) const {
        if (options_.draft) llama_memory_seq_cp(llama_get_memory(options_.draft), from, to, 0, n);
        llama_memory_seq_cp(memory(), from, to, 0, n);
    }

    Match find(const Text & text) {
        const size_t n_wanted = text.tokens.size() - 1;
        Match best{0, -1, kept_.end()};
        Match host = best;
        for (auto at = kept_.begin(); at != kept_.end(); ++at) {
            const size_t n = common_prefix(text.tokens, n_wanted, at->tokens, at->tokens.size());
            if (options_.whole && n < at->tokens.size()) continue;
            Match & match = at->seq >= 0 ? best : host;
            if (n > 0 && n >= match.n) match = {n, -1, at};
        }
        for (const auto & other : live_) {
            if (!other || options_.whole || !options_.reuse) continue;
            const size_t n = common_prefix(text.tokens, n_wanted, other->tokens, other->n_past);
            if (n > best.n) best = {n, other->seq, kept_.end()};
        }
        return host.n >= best.n + (options_.whole ? 1 : worth_restoring) ? host : best;
    }

    // Tokens to take from what is known of the text; 0 if the `n_found` that are here already are about as many.
    size_t worth_reading(const Text & text, size_t n_found) const {
        const Tokens & tokens = text.known.tokens;
        if (!text.known.state || tokens.size() > llama_n_ctx(ctx_)) return 0;
        const size_t n = common_prefix(text.tokens, text.tokens.size() - 1, tokens, tokens.size());
        if (options_.whole) return n == tokens.size() && n > n_found ? n : 0;
        return n >= n_found + std::min(n_found + 1, worth_restoring) ? n : 0;
    }

    // The longest prefix that a text in work will have computed.
    size_t in_work(const Text & text) const {
        if (options_.whole || !options_.reuse) return 0;
        size_t longest = 0;
        for (const auto & other : live_) {
            if (!other || other->n_past + 1 >= other->tokens.size()) continue;
            longest = std::max(longest, common_prefix(text.tokens, text.tokens.size() - 1, other->tokens, other->tokens.size()));
        }
        return longest;
    }

    // Whether a sequence can be had without that of `kept`.
    bool spare(KeptAt kept) {
        if (!free_.empty()) return true;
        return std::any_of(kept_.begin(), kept_.end(), [&](const Kept & k) { return k.seq >= 0 && &k != &*kept; });
    }

    bool take_over(const std::shared_ptr<Text> & text, KeptAt kept, size_t n) {
        if (n < kept->tokens.size()) cut(kept->seq, n);
        text->n_past = n;
        text->n_shared = n - std::min(n, kept->n_cells);
        const llama_seq_id seq = kept->seq;
        n_kept_cells_ -= kept->n_cells;
        kept_.erase(kept);
        occupy(text, seq);
        return true;
    }

    void occupy(const std::shared_ptr<Text> & text, llama_seq_id seq) {
        text->seq = seq;
        text->known = {};
        live_[seq] = text;
    }

    // A free sequence, if need be that of the least recently used text other than `spared`. -1 if all are live.
    llama_seq_id take_sequence(KeptAt spared) {
        if (free_.empty()) {
            const auto oldest = std::find_if(kept_.begin(), kept_.end(), [&](const Kept & k) {
                return k.seq >= 0 && (spared == kept_.end() || &k != &*spared);
            });
            if (oldest == kept_.end()) return -1;
            evict(oldest);
        }
        const llama_seq_id seq = free_.back();
        free_.pop_back();
        return seq;
    }

    void release(llama_seq_id seq) {
        cut(seq, -1);
        free_.push_back(seq);
    }

    void touch(KeptAt kept) {
        if (kept != kept_.end()) kept_.splice(kept_.end(), kept_, kept);
    }

    bool holds(const Tokens & tokens, size_t n) {
        for (auto at = kept_.begin(); at != kept_.end(); ++at) {
            const bool found = options_.whole ? at->tokens.size() == n : at->tokens.size() >= n;
            if (found && common_prefix(tokens, n, at->tokens, n) == n) {
                touch(at);
                return true;
            }
        }
        return false;
    }

    // A text that goes on from others replaces them.
    void drop_prefixes_of(KeptAt longer) {
        for (auto at = kept_.begin(); at != longer;) {
            const size_t n = at->tokens.size();
            const auto next = std::next(at);
            if (n <= longer->tokens.size() && common_prefix(at->tokens, n, longer->tokens, n) == n) forget(at);
            at = next;
        }
    }

    void forget(KeptAt kept) {
        if (kept->seq >= 0) {
            n_kept_cells_ -= kept->n_cells;
            release(kept->seq);
        } else {
            n_host_bytes_ -= kept->n_bytes();
        }
        kept_.erase(kept);
    }

    bool evict_before(KeptAt end) {
        const auto oldest = std::find_if(kept_.begin(), end, [](const Kept & k) { return k.seq >= 0; });
        if (oldest == end) return false;
        evict(oldest);
        return true;
    }

    void evict(KeptAt kept) {
        if (!save(*kept)) {
            forget(kept);
            return;
        }
        n_kept_cells_ -= kept->n_cells;
        release(kept->seq);
        kept->seq = -1;
        n_host_bytes_ += kept->n_bytes();
        while (n_host_bytes_ > options_.n_host_max || kept_.size() > n_kept_texts) {
            forget(std::find_if(kept_.begin(), kept_.end(), [](const Kept & k) { return k.seq < 0; }));
        }
    }

    bool save(Kept & kept) {
        if (options_.n_host_max == 0) return false;
        kept.state = copy_state(ctx_, kept.seq, options_.n_host_max);
        if (options_.draft && !kept.state.empty()) kept.draft_state = copy_state(options_.draft, kept.seq, SIZE_MAX);
        return !kept.state.empty();
    }

    // Empty where it is larger than `n_max` bytes, and where there is no memory for it.
    static std::vector<uint8_t> copy_state(llama_context * ctx, llama_seq_id seq, size_t n_max) {
        std::vector<uint8_t> state;
        const size_t n = llama_state_seq_get_size(ctx, seq);
        if (n > n_max) return state;
        try {
            state.resize(n);
        } catch (const std::bad_alloc &) {
            return {};
        }
        if (llama_state_seq_get_data(ctx, state.data(), n, seq) != n) state.clear();
        return state;
    }

    bool restore(const Kept & kept, llama_seq_id seq) {
        if (restore(kept.state.data(), kept.state.size(), seq) == 0) return false;
        if (options_.draft && !kept.draft_state.empty()) {  // without it the guesses are worse, and that is all
            llama_state_seq_set_data(options_.draft, kept.draft_state.data(), kept.draft_state.size(), seq);
        }
        return true;
    }

    // Puts what is known of the text into a sequence, `n` tokens of it. False, and the sequence is empty, if there is no
    // room beside live texts, or if it is unfit: llama.cpp refuses it, or it holds other positions than its tokens have.
    bool read_known(Text & text, llama_seq_id seq, size_t n) {
        const Known & known = text.known;
        take_last_words();
        const size_t n_read = restore(reinterpret_cast<const uint8_t *>(known.state), known.n_bytes, seq);
        const auto last = static_cast<llama_pos>(known.tokens.size()) - 1;
        if (n_read == known.n_bytes && llama_memory_seq_pos_max(memory(), seq) == last &&
            (options_.whole || llama_memory_seq_pos_min(memory(), seq) == 0)) {
            if (n < known.tokens.size()) cut(seq, n);
            return true;
        }
        cut(seq, -1);
        const std::string why = take_last_words();
        if (n_read > 0 || n_live() == 0) text.unfit = why.empty() ? "it does not hold the tokens that it says" : why;
        return false;
    }

    // Bytes of a state that were read into a sequence, for which kept texts give way; 0 where llama.cpp can't.
    size_t restore(const uint8_t * state, size_t n, llama_seq_id seq) {
        size_t n_read;
        while ((n_read = llama_state_seq_set_data(ctx_, state, n, seq)) == 0) {
            const auto oldest = std::find_if(kept_.begin(), kept_.end(), [](const Kept & k) { return k.seq >= 0; });
            if (oldest == kept_.end()) return 0;
            forget(oldest);
        }
        return n_read;
    }

    llama_context * ctx_;
    Options options_;
    std::vector<std::shared_ptr<Text>> live_;  // by sequence; null if free or kept
    std::vector<llama_seq_id> free_;
    std::list<Kept> kept_;                     // least recently used first
    size_t n_kept_cells_ = 0;
    size_t n_host_bytes_ = 0;
};

}  // namespace tea
