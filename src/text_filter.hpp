// Turns a stream of token bytes into text that may be shown: stop strings never leak, UTF-8 characters stay whole.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "llama.h"

namespace tea {

// Whether a token ends a text. So does BOS: it begins another document.
inline bool ends_text(const llama_vocab * vocab, llama_token token) {
    return llama_vocab_is_eog(vocab, token) || token == llama_vocab_bos(vocab);
}

// The bytes of a token, which need not be whole characters; `special` writes control tokens out.
inline void read_piece(const llama_vocab * vocab, llama_token token, bool special, std::string & out) {
    out.resize(64);
    int32_t n = llama_token_to_piece(vocab, token, &out[0], static_cast<int32_t>(out.size()), 0, special);
    if (n < 0) {
        out.resize(-n);
        n = llama_token_to_piece(vocab, token, &out[0], static_cast<int32_t>(out.size()), 0, special);
    }
    out.resize(n);
}

class TextFilter {
  public:
    void add_stop(std::string stop) { stops_.push_back(std::move(stop)); }

    // Takes the bytes of one token. True once a stop string is complete: what comes before it is ready, the rest gone.
    bool push(const char * bytes, size_t n) {
        held_.append(bytes, n);
        size_t first = std::string::npos;
        for (const auto & stop : stops_) first = std::min(first, held_.find(stop));
        if (first != std::string::npos) {
            n_cut_ = held_.size() - first;
            held_.resize(first);
            flush();
            return true;
        }
        const size_t n_safe = whole_characters(held_.size() - n_open());
        ready_.append(held_, 0, n_safe);
        held_.erase(0, n_safe);
        return false;
    }

    // The end of the text: a stop string that was only begun is text after all.
    void flush() {
        ready_ += held_;
        held_.clear();
    }

    // Bytes of the stop string and what came behind it.
    size_t n_cut() const { return n_cut_; }

    bool has_ready() const { return !ready_.empty(); }
    const std::string & ready() const { return ready_; }
    void clear_ready() { ready_.clear(); }

  private:
    // Length of the longest end of held_ that begins a stop string.
    size_t n_open() const {
        size_t longest = 0;
        for (const auto & stop : stops_) {
            for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n) {
                if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
            }
        }
        return longest;
    }

    // The largest length <= n at which held_ does not cut a character that may still become whole.
    size_t whole_characters(size_t n) const {
        for (size_t back = 1; back <= 3 && back <= n; ++back) {
            const auto byte = static_cast<unsigned char>(held_[n - back]);
            if (byte < 0x80) return n;
            if (byte >= 0xC0) return back < (byte >= 0xF0 ? 4u : byte >= 0xE0 ? 3u : 2u) ? n - back : n;
        }
        return n;
    }

    std::vector<std::string> stops_;
    std::string held_;   // not yet decided
    std::string ready_;  // to be handed out
    size_t n_cut_ = 0;
};

}  // namespace tea
