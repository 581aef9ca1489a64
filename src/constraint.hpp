// What a text has to be, token by token: a GBNF grammar, by llama.cpp; or a JSON schema or a regular expression,
// by llguidance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bounded.hpp"
#include "guard.hpp"
#include "llama-grammar.h"
#include "llama.h"
#include "text_filter.hpp"

namespace tea {

class Constraint {
  public:
    virtual ~Constraint() = default;

    // The same before its first token.
    virtual std::unique_ptr<Constraint> copy() const = 0;

    // Whether a token may come next.
    virtual bool allows(llama_token token) = 0;

    // Makes minus infinity of the logit of each token that may not come next.
    virtual void forbid(float * logits, int32_t n_vocab) = 0;

    // Whether `forbid` costs so much that a token is better drawn first, and drawn again where it isn't allowed.
    virtual bool is_slow() const = 0;

    // Goes on by a token that `allows`.
    virtual void accept(llama_token token) = 0;

    // Whether the text is what it has to be, so that it may end here.
    virtual bool may_end() = 0;

    // Whether it has to end here.
    virtual bool has_to_end() = 0;

    // Whether it binds nothing yet, as what triggers it has not come.
    virtual bool is_waiting() const { return false; }
};

// --- GBNF --------------------------------------------------------------------------------------------------------------
struct Triggers {  // of a grammar that binds from where a text has one of them, and not from its beginning
    std::vector<std::string> patterns;  // their first group is where it begins
    std::vector<llama_token> tokens;

    bool empty() const { return patterns.empty() && tokens.empty(); }
};

// Past white space and comments.
inline const char * skip_space(const char * at) {
    while (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n' || *at == '#') {
        if (*at++ == '#') at += std::strcspn(at, "\r\n");
    }
    return at;
}

// Throws for what llama.cpp's parser takes into a recursion without end or a loop that eats all memory.
inline void check_source(const char * at) {
    int depth = 0;
    for (; *(at = skip_space(at)); ++at) {
        if (*at == '"' || *at == '[') {  // a literal
            const char end = *at == '"' ? '"' : ']';
            for (++at; *at && *at != end; ++at) at += *at == '\\' && at[1];
            if (!*at) break;
        }
        depth += *at == '(' ? 1 : *at == ')' ? -1 : 0;
        if (depth > 1000) throw std::runtime_error("more than 1000 nested parentheses");
        if (*at == '{') {
            char * rest = nullptr;
            const auto least = std::strtoull(at + 1, &rest, 10), most = *rest == ',' ? std::strtoull(rest + 1, &rest, 10) : least;
            if (rest[-1] != ',' && most < least) throw std::runtime_error("a repetition of at least more than at most");
        }
    }
}

// Whether an element ends one way to write a rule.
inline bool ends_way(const llama_grammar_element & e) {
    return e.type == LLAMA_GRETYPE_END || e.type == LLAMA_GRETYPE_ALT;
}

// For each rule, whether it may be empty.
inline std::vector<bool> find_empty(const llama_grammar_rules & rules) {
    std::vector<bool> empty(rules.size());
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t id = 0; id < rules.size(); ++id) {
            bool is_empty = !empty[id];
            for (size_t i = 0; i < rules[id].size() && !empty[id]; ++i) {
                const auto & element = rules[id][i];
                if (ends_way(element)) {
                    empty[id] = is_empty;
                    changed |= is_empty;
                    is_empty = true;
                } else {
                    is_empty = is_empty && element.type == LLAMA_GRETYPE_RULE_REF && empty[element.value];
                }
            }
        }
    }
    return empty;
}

// Whether a rule begins with itself, which llama.cpp refuses. Throws for rules that begin with each other on so many paths
// that its search for that, which goes along each of them, would not come back.
inline bool is_left_recursive(const llama_grammar_rules & rules) {
    constexpr double most = 1e6;
    const std::vector<bool> empty = find_empty(rules);
    std::vector<double> n_paths(rules.size(), 0);  // from each rule on; -1: being counted
    bool recursive = false;
    const std::function<double(uint32_t)> count = [&](uint32_t id) {
        recursive |= n_paths[id] < 0;
        if (n_paths[id] != 0) return std::max(n_paths[id], 1.0);
        n_paths[id] = -1;
        double n = 1;
        bool begins = true;
        for (const auto & element : rules[id]) {
            const bool refers = element.type == LLAMA_GRETYPE_RULE_REF;
            if (begins && refers) n += count(element.value);
            begins = ends_way(element) || (begins && refers && empty[element.value]);
        }
        return n_paths[id] = n;
    };
    for (uint32_t id = 0; id < rules.size(); ++id) {
        if (count(id) > most) throw std::runtime_error("rules that begin with each other in too many ways");
    }
    return recursive;
}

// Throws for a grammar with so many ways to go on from where a rule begins that llama.cpp, which follows all of them at
// once, would not come back.
inline void check_ways(const llama_grammar_rules & rules) {
    constexpr size_t most_at_once = 4096, most = 10'000'000;
    size_t n_all = 0;
    for (uint32_t rule = 0; rule < rules.size(); ++rule) {
        const llama_grammar_element begin[] = {{LLAMA_GRETYPE_RULE_REF, rule}, {LLAMA_GRETYPE_END, 0}};
        std::set<llama_grammar_stack> seen;
        llama_grammar_stacks todo = {{begin}};
        while (!todo.empty()) {
            const llama_grammar_stack stack = std::move(todo.back());
            todo.pop_back();
            if (!seen.insert(stack).second) continue;
            n_all += stack.size() + 1;
            if (seen.size() > most_at_once || n_all > most) {
                throw std::runtime_error("too many ways to go on from one place: optional parts, or alternatives");
            }
            if (stack.empty() || stack.back()->type != LLAMA_GRETYPE_RULE_REF) continue;
            for (const llama_grammar_element * at = rules[stack.back()->value].data();; ++at) {
                llama_grammar_stack next(stack.begin(), stack.end() - 1);
                if (!ends_way(stack.back()[1])) next.push_back(stack.back() + 1);
                if (!ends_way(*at)) next.push_back(at);
                todo.push_back(std::move(next));
                while (!ends_way(*at)) ++at;
                if (at->type == LLAMA_GRETYPE_END) break;
            }
        }
    }
}

// Throws what is wrong with a grammar. llama_grammar_parser::parse() prints it to stderr; here the rules are read one by
// one, and what would not end is refused.
inline void check_grammar(const llama_vocab * vocab, const char * grammar) {
    check_source(grammar);
    llama_grammar_parser parser(vocab);
    for (const char * at = skip_space(grammar); *at;) at = parser.parse_rule(at);
    if (parser.rules.size() > 20000) throw std::runtime_error("more than 20000 rules");
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) throw std::runtime_error("there is no rule " + name);
    }
    if (!is_left_recursive(parser.rules)) check_ways(parser.rules);
}

// Whether bytes go on with UTF-8, perhaps in the midst of a character.
struct Utf8 {
    int n_left = 0;  // bytes of the character
    unsigned char low = 0x80, high = 0xBF;  // what the next of them may be

    bool read(const std::string & bytes) {
        for (const unsigned char byte : bytes) {
            if (n_left > 0) {
                if (byte < low || byte > high) return false;
                --n_left;
                low = 0x80, high = 0xBF;
            } else if (byte >= 0x80) {
                if (byte < 0xC2 || byte > 0xF4) return false;
                n_left = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
                low = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
                high = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
            }
        }
        return true;
    }
};

// llama.cpp's grammars also allow what isn't seen as it is read there: a control token, of which nothing is seen, for the
// characters of its name, and bytes that are no UTF-8. Here neither is allowed, but for the control tokens of `markup`.
class Gbnf : public Constraint {
  public:
    Gbnf(const llama_vocab * vocab, llama_grammar * grammar, std::vector<llama_token> markup)
        : vocab_(vocab), grammar_(grammar), markup_(std::move(markup)) {}
    ~Gbnf() override { llama_grammar_free_impl(grammar_); }
    Gbnf(const Gbnf &) = delete;
    Gbnf & operator=(const Gbnf &) = delete;

    std::unique_ptr<Constraint> copy() const override {
        auto made = std::make_unique<Gbnf>(vocab_, llama_grammar_clone_impl(*grammar_), markup_);
        made->utf8_ = utf8_;
        return made;
    }

    bool allows(llama_token token) override {
        if (!is_seen(token)) return false;
        llama_token_data one{token, 0.0f, 0.0f};
        llama_token_data_array array{&one, 1, -1, false};
        follow([&] { llama_grammar_apply_impl(*grammar_, &array); });
        return one.logit > -INFINITY;
    }

    void forbid(float * logits, int32_t n_vocab) override {
        candidates_.clear();
        for (llama_token id = 0; id < n_vocab; ++id) {
            if (logits[id] > -INFINITY) candidates_.push_back({id, logits[id], 0.0f});
        }
        llama_token_data_array array{candidates_.data(), candidates_.size(), -1, false};
        follow([&] { llama_grammar_apply_impl(*grammar_, &array); });
        for (const auto & candidate : candidates_) {
            logits[candidate.id] = candidate.logit > -INFINITY && is_seen(candidate.id) ? candidate.logit : -INFINITY;
        }
    }

    bool is_slow() const override { return true; }

    void accept(llama_token token) override {
        follow([&] { llama_grammar_accept_impl(*grammar_, token); });
        if (grammar_->stacks.size() > most_stacks) fail();
        read_piece(vocab_, token, false, piece_);
        utf8_.read(piece_);
    }

    bool may_end() override {
        const auto is_whole = [](const llama_grammar_stack & stack) { return stack.empty(); };
        return is_waiting() ||
               std::any_of(grammar_->stacks.begin(), grammar_->stacks.end(), is_whole);
    }

    bool has_to_end() override { return false; }  // the model says so by its own end

    bool is_waiting() const override { return grammar_->awaiting_trigger; }

    static constexpr size_t most_stacks = 4096;

  private:
    [[noreturn]] static void fail() {
        throw std::runtime_error("the grammar can be followed in too many ways at once; make it less ambiguous");
    }

    // llama.cpp goes each way through a token by itself; their number may be multiplied with every character.
    template <class Work>
    static void follow(Work work) {
        constexpr Bounds bounds{size_t{1} << 30, 2};
        if (!run_counted(bounds, work)) fail();
    }

    bool is_seen(llama_token token) {
        if (llama_vocab_is_eog(vocab_, token)) return true;
        if (llama_vocab_is_control(vocab_, token)) {
            return std::find(markup_.begin(), markup_.end(), token) != markup_.end();
        }
        read_piece(vocab_, token, false, piece_);
        return Utf8(utf8_).read(piece_);
    }

    const llama_vocab * vocab_;
    llama_grammar * grammar_;
    std::vector<llama_token> markup_;
    std::vector<llama_token_data> candidates_;
    Utf8 utf8_;
    std::string piece_;
};

// Of a text that goes on after `prefix`. NULL where llama.cpp refuses the grammar in its log: no root, left recursion.
inline std::unique_ptr<Constraint> new_gbnf(const llama_vocab * vocab, const char * grammar, const Triggers & triggers,
                                            const std::vector<llama_token> & markup, const std::string & prefix) {
    Guard guard;
    check_grammar(vocab, grammar);
    std::vector<const char *> patterns;
    for (const auto & pattern : triggers.patterns) patterns.push_back(pattern.c_str());
    llama_grammar * made =
        llama_grammar_init_impl(vocab, grammar, "root", !triggers.empty(), patterns.data(), patterns.size(),
                                triggers.tokens.data(), triggers.tokens.size());
    if (made == nullptr) return nullptr;
    auto constraint = std::make_unique<Gbnf>(vocab, made, markup);
    llama_grammar_accept_str(*made, prefix);  // and not its tokens: some tokenizers put spaces between
    return constraint;
}

// --- llguidance --------------------------------------------------------------------------------------------------------
// The C interface of the llguidance package (parser/llguidance.h of version 1.9), found in its library at run time. In a
// later 1.x, what is said to begin with its size may have grown, and the rest may not change.
struct Llguidance {
    struct Tokenizer;
    struct Matcher;

    struct TokenizerInit {
        size_t struct_size;
        uint32_t vocab_size;
        uint32_t tok_eos;
        const uint32_t * token_lens;
        const uint8_t * token_bytes;
        const char * tokenizer_json;
        bool tokenize_assumes_string;
        size_t (*tokenize_fn)(const void *, const uint8_t *, size_t, uint32_t *, size_t);
        bool use_approximate_greedy_tokenize_fn;
        const void * tokenize_user_data;
        const char * const * slices;
        const uint32_t * tok_eos_extra;
        uint32_t tok_eos_extra_count;
    };

    struct MatcherInit {
        const Tokenizer * tokenizer;
        uint32_t log_buffer_level;
        uint32_t log_stderr_level;
        char rest[512];  // written by set_defaults, and longer than it is
    };

    Tokenizer * (*new_tokenizer_v2)(const TokenizerInit *, char * error, size_t error_size);
    void (*free_tokenizer)(Tokenizer *);
    void (*constraint_init_set_defaults)(MatcherInit *, const Tokenizer *);
    Matcher * (*new_matcher)(const MatcherInit *, const char * kind, const char * source);
    Matcher * (*clone_matcher)(const Matcher *);
    void (*free_matcher)(Matcher *);
    const char * (*matcher_get_error)(Matcher *);
    int32_t (*matcher_compute_mask_into)(Matcher *, uint32_t * mask, size_t n_bytes);
    int32_t (*matcher_validate_tokens)(Matcher *, const uint32_t * tokens, size_t n);
    int32_t (*matcher_consume_token)(Matcher *, uint32_t token);
    bool (*matcher_is_accepting)(Matcher *);
    bool (*matcher_is_stopped)(const Matcher *);
};

inline Llguidance llguidance{};

inline const char * const llguidance_names[] = {  // in the order above
    "llg_new_tokenizer_v2", "llg_free_tokenizer", "llg_constraint_init_set_defaults", "llg_new_matcher",
    "llg_clone_matcher", "llg_free_matcher", "llg_matcher_get_error", "llg_matcher_compute_mask_into",
    "llg_matcher_validate_tokens", "llg_matcher_consume_token", "llg_matcher_is_accepting", "llg_matcher_is_stopped",
};
constexpr size_t llguidance_size = sizeof llguidance_names / sizeof *llguidance_names;
static_assert(sizeof(Llguidance) == llguidance_size * sizeof(void *), "each function has its name");

inline void set_llguidance(size_t i, size_t address) {
    std::memcpy(reinterpret_cast<char *>(&llguidance) + i * sizeof(void *), &address, sizeof(void *));
}

// llguidance's view of a vocabulary: made for the first constraint of a model, as it takes a moment for a large one.
class GuidedVocab {
  public:
    explicit GuidedVocab(const llama_vocab * vocab) {
        const int32_t n = llama_vocab_n_tokens(vocab);
        const llama_token turn = llama_vocab_eot(vocab) >= 0 ? llama_vocab_eot(vocab) : llama_vocab_eos(vocab);
        std::vector<uint32_t> lengths, ends;
        std::string bytes, piece;
        for (llama_token token = 0; token < n; ++token) {
            read_piece(vocab, token, false, piece);
            if (ends_text(vocab, token) || llama_vocab_is_control(vocab, token)) {
                read_piece(vocab, token, true, piece);
                piece.insert(piece.begin(), '\xFF');  // marks what is no text
            }
            if (ends_text(vocab, token) && token != turn) ends.push_back(static_cast<uint32_t>(token));
            lengths.push_back(static_cast<uint32_t>(piece.size()));
            bytes += piece;
        }
        Llguidance::TokenizerInit init{};
        init.struct_size = sizeof init;
        init.vocab_size = static_cast<uint32_t>(n);
        init.tok_eos = static_cast<uint32_t>(turn);  // none: no token has that number
        init.token_lens = lengths.data();
        init.token_bytes = reinterpret_cast<const uint8_t *>(bytes.data());
        init.use_approximate_greedy_tokenize_fn = true;  // only asked for tokens to be forced, which we don't
        init.tok_eos_extra = ends.data();
        init.tok_eos_extra_count = static_cast<uint32_t>(ends.size());
        char error[512] = "";
        tokenizer_ = llguidance.new_tokenizer_v2(&init, error, sizeof error);
        if (!tokenizer_) throw std::runtime_error(std::string("llguidance can't read this vocabulary: ") + error);
    }
    ~GuidedVocab() { llguidance.free_tokenizer(tokenizer_); }
    GuidedVocab(const GuidedVocab &) = delete;
    GuidedVocab & operator=(const GuidedVocab &) = delete;

    const Llguidance::Tokenizer * tokenizer() const { return tokenizer_; }

  private:
    Llguidance::Tokenizer * tokenizer_;
};

class Guided : public Constraint {
  public:
    Guided(const llama_vocab * vocab, Llguidance::Matcher * matcher) : vocab_(vocab), matcher_(matcher) {}
    ~Guided() override { llguidance.free_matcher(matcher_); }
    Guided(const Guided &) = delete;
    Guided & operator=(const Guided &) = delete;

    std::unique_ptr<Constraint> copy() const override {
        return std::make_unique<Guided>(vocab_, llguidance.clone_matcher(matcher_));
    }

    bool allows(llama_token token) override {
        if (ends_text(vocab_, token)) return may_end();
        const auto id = static_cast<uint32_t>(token);
        const int32_t n = llguidance.matcher_validate_tokens(matcher_, &id, 1);
        if (n < 0) fail();
        return n == 1;
    }

    void forbid(float * logits, int32_t n_vocab) override {
        mask_.resize((n_vocab + 31) / 32);
        if (llguidance.matcher_compute_mask_into(matcher_, mask_.data(), 4 * mask_.size()) != 0) fail();
        for (size_t word = 0; word < mask_.size(); ++word) {
            const uint32_t allowed = mask_[word];
            if (allowed == UINT32_MAX) continue;
            const auto from = static_cast<int32_t>(32 * word), to = std::min(from + 32, n_vocab);
            for (int32_t id = from; id < to; ++id) {
                logits[id] = allowed >> (id - from) & 1 ? logits[id] : -INFINITY;
            }
        }
    }

    bool is_slow() const override { return false; }

    void accept(llama_token token) override {
        if (ends_text(vocab_, token)) return;
        if (llguidance.matcher_consume_token(matcher_, static_cast<uint32_t>(token)) != 0) fail();
    }

    bool may_end() override { return llguidance.matcher_is_accepting(matcher_); }

    bool has_to_end() override { return llguidance.matcher_is_stopped(matcher_); }

    // Throws where nothing may begin the text, or finding out takes too much.
    void check_begin() {
        mask_.resize((llama_vocab_n_tokens(vocab_) + 31) / 32);
        if (llguidance.matcher_compute_mask_into(matcher_, mask_.data(), 4 * mask_.size()) != 0) fail();
    }

  private:
    [[noreturn]] void fail() {
        const char * error = llguidance.matcher_get_error(matcher_);
        std::string words = error ? error : "it gave no reason";
        words.resize(std::min(words.size(), words.find('\n')));  // its state follows
        if (words == "NoExtensionBias") throw std::runtime_error("nothing fulfils it");
        throw std::runtime_error("llguidance gave up on the grammar: " + words);
    }

    const llama_vocab * vocab_;
    Llguidance::Matcher * matcher_;
    std::vector<uint32_t> mask_;
};

// Throws what is wrong with the source. `kind` is llguidance's: "json_schema" or "regex".
inline std::unique_ptr<Constraint> new_guided(
    const llama_vocab * vocab, const GuidedVocab & guided, const char * kind, const char * source) {
    Llguidance::MatcherInit init{};
    llguidance.constraint_init_set_defaults(&init, guided.tokenizer());
    init.log_stderr_level = 0;
    Llguidance::Matcher * matcher = llguidance.new_matcher(&init, kind, source);
    auto made = std::make_unique<Guided>(vocab, matcher);
    if (const char * error = llguidance.matcher_get_error(matcher)) throw std::runtime_error(error);
    made->check_begin();
    return made;
}

}  // namespace tea
