// The texts of a vocabulary's control tokens, and how a prompt becomes tokens in which only some of them are read.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "guard.hpp"
#include "llama.h"

namespace tea {

using Ranges = std::vector<std::pair<size_t, size_t>>;  // [begin, end) in bytes, ascending

class ControlTexts {
  public:
    explicit ControlTexts(const llama_vocab * vocab) : vocab_(vocab) {
        for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
            const int attr = llama_vocab_get_attr(vocab, token);
            if (!(attr & (CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED))) continue;
            const char * text = llama_vocab_get_text(vocab, token);
            if (*text == '\0') continue;
            specials_.push_back({text, token, attr});
            if (!(attr & CONTROL)) continue;
            controls_.emplace(text, token);
            begins_[static_cast<unsigned char>(*text)] = true;
        }
        // The order in which llama.cpp looks for them (llama-vocab.cpp, cache_special_tokens).
        std::stable_sort(specials_.begin(), specials_.end(),
                         [](const Special & a, const Special & b) { return a.text.size() > b.text.size(); });
        for (const auto & [text, token] : controls_) lengths_.push_back(text.size());
        std::sort(lengths_.begin(), lengths_.end(), std::greater<>());
        lengths_.erase(std::unique(lengths_.begin(), lengths_.end()), lengths_.end());
    }

    // The length of the control token's text that begins at `at`, the longest; 0 if none does.
    size_t length_at(std::string_view text, size_t at) const {
        if (!begins_[static_cast<unsigned char>(text[at])]) return 0;
        for (size_t length : lengths_) {
            if (at + length <= text.size() && controls_.count(text.substr(at, length)) > 0) return length;
        }
        return 0;
    }

    // Where such texts stand, none inside another.
    Ranges find(std::string_view text) const {
        Ranges found;
        for (size_t at = 0; at < text.size();) {
            const size_t length = length_at(text, at);
            if (length > 0) found.emplace_back(at, at + length);
            at += length > 0 ? length : 1;
        }
        return found;
    }

    // The control tokens that are read in `text` when none is that touches `literal`.
    std::vector<llama_token> read(std::string_view text, const Ranges & literal) const {
        std::vector<llama_token> tokens;
        for (const Fragment & fragment : partition(text, literal)) {
            if (fragment.token != LLAMA_TOKEN_NULL) tokens.push_back(fragment.token);
        }
        return tokens;
    }

    // Whether a control token's text touches `literal`, so that reading all of them is not the same.
    bool matters(std::string_view text, const Ranges & literal) const {
        size_t longest = lengths_.empty() ? 0 : lengths_.front();
        for (const auto & [begin, end] : literal) {
            for (size_t at = begin > longest ? begin - longest : 0; at < end; ++at) {
                if (!begins_[static_cast<unsigned char>(text[at])]) continue;
                for (size_t length : lengths_) {
                    if (at + length > begin && at + length <= text.size() && controls_.count(text.substr(at, length))) return true;
                }
            }
        }
        return false;
    }

    // The tokens of `text`, BOS and EOS as the vocabulary adds them. What stands between two control tokens is
    // tokenized in one piece, as if what is literal in it looked like nothing special.
    std::vector<llama_token> tokenize(const std::string & text, const Ranges & literal) const {
        if (!matters(text, literal)) return pieces(text, true, true);
        std::vector<llama_token> tokens;
        if (llama_vocab_get_add_bos(vocab_)) tokens.push_back(llama_vocab_bos(vocab_));
        for (const Fragment & fragment : partition(text, literal)) {
            if (fragment.token != LLAMA_TOKEN_NULL) {
                tokens.push_back(fragment.token);
            } else {
                const auto raw = pieces(text.substr(fragment.begin, fragment.end - fragment.begin), false, false);
                tokens.insert(tokens.end(), raw.begin(), raw.end());
            }
        }
        if (llama_vocab_get_add_eos(vocab_)) tokens.push_back(llama_vocab_eos(vocab_));
        return tokens;
    }

  private:
    static constexpr int CONTROL = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN;  // read only if asked for
    struct Special {
        std::string_view text;
        llama_token token;
        int attr;
    };
    struct Fragment {  // a control token, or the text between two
        size_t begin, end;
        llama_token token = LLAMA_TOKEN_NULL;
    };

    // As llama.cpp does it (llama-vocab.cpp, tokenizer_st_partition): the longest first. Tokens that users defined are
    // read anywhere, and so are left inside the texts; but a control token's text may not begin within one.
    std::vector<Fragment> partition(std::string_view text, const Ranges & literal) const {
        std::vector<Fragment> claimed;
        std::vector<bool> taken(text.size());
        const auto is_literal = [&](size_t begin, size_t end) {
            auto range = std::upper_bound(literal.begin(), literal.end(), begin,
                                          [](size_t at, const auto & r) { return at < r.second; });
            return range != literal.end() && range->first < end;
        };
        const auto is_taken = [&](size_t begin, size_t end) {
            return std::find(taken.begin() + begin, taken.begin() + end, true) != taken.begin() + end;
        };
        for (const Special & special : specials_) {
            const bool is_control = special.attr & CONTROL;
            const size_t n = special.text.size();
            for (size_t at = text.find(special.text); at != text.npos;) {
                if (is_taken(at, at + n) || (is_control && is_literal(at, at + n))) {
                    at = text.find(special.text, at + 1);
                    continue;
                }
                std::fill(taken.begin() + at, taken.begin() + at + n, true);
                if (is_control) claimed.push_back({at, at + n, special.token});
                at = text.find(special.text, at + n);
            }
        }
        std::sort(claimed.begin(), claimed.end(), [](const Fragment & a, const Fragment & b) { return a.begin < b.begin; });
        std::vector<Fragment> fragments;
        size_t at = 0;
        const auto is_space = [&](size_t i) { return std::isspace(static_cast<unsigned char>(text[i])) != 0; };
        const auto add_text = [&](size_t end, bool strip_end) {
            if (!fragments.empty() && llama_vocab_get_attr(vocab_, fragments.back().token) & LLAMA_TOKEN_ATTR_RSTRIP) {
                while (at < end && is_space(at)) ++at;
            }
            while (strip_end && end > at && is_space(end - 1)) --end;
            if (at < end) fragments.push_back({at, end});
        };
        for (const Fragment & control : claimed) {
            add_text(control.begin, llama_vocab_get_attr(vocab_, control.token) & LLAMA_TOKEN_ATTR_LSTRIP);
            fragments.push_back(control);
            at = control.end;
        }
        add_text(text.size(), false);
        return fragments;
    }

    std::vector<llama_token> pieces(const std::string & text, bool add_special, bool parse_special) const {
        std::vector<llama_token> tokens(text.size() / 2 + 8);
        int32_t n = tea::tokenize(vocab_, text.data(), text.size(), tokens.data(), tokens.size(), add_special, parse_special);
        if (n < 0 && n != INT32_MIN) {
            tokens.resize(-n);
            n = tea::tokenize(vocab_, text.data(), text.size(), tokens.data(), tokens.size(), add_special, parse_special);
        }
        if (n < 0) throw std::runtime_error("a prompt of " + std::to_string(text.size()) + " bytes could not be tokenized");
        tokens.resize(n);
        return tokens;
    }

    const llama_vocab * vocab_;
    std::vector<Special> specials_;
    std::unordered_map<std::string_view, llama_token> controls_;
    std::vector<size_t> lengths_;  // of controls_, descending
    bool begins_[256] = {};        // the first bytes of controls_
};

}  // namespace tea
