// Picks the next token without building llama.cpp's candidate array where the choice doesn't need all of it: for a
// vocabulary of 152k entries, filling and sorting that array costs as much as a layer of a 0.5B model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "constraint.hpp"
#include "guard.hpp"
#include "llama.h"

namespace tea {

// Index of the largest of n floats, the first one on a tie; -1 if none is above -inf (all NaN or -inf).
// Block by block: the inner loop has no branch, so the compiler vectorises it.
inline llama_token argmax(const float * x, int32_t n) {
    constexpr int32_t block = 256;
    float best = -INFINITY;
    int32_t at = -1;
    for (int32_t begin = 0; begin < n; begin += block) {
        const int32_t end = std::min(begin + block, n);
        float lanes[16];
        std::fill(lanes, lanes + 16, -INFINITY);
        int32_t i = begin;
        for (; i + 16 <= end; i += 16) {
            for (int32_t lane = 0; lane < 16; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
        }
        float top = -INFINITY;
        for (float lane : lanes) top = lane > top ? lane : top;
        for (; i < end; ++i) top = x[i] > top ? x[i] : top;
        if (top > best) {
            best = top;
            for (at = begin; x[at] != top; ++at) {}
        }
    }
    return at;
}

// The k largest of n logits, best first, into out (which has room for k). Returns how many there are.
// A heap holds the k best so far; a block whose maximum is not above the heap's least is passed over.
inline size_t top_k(const float * x, int32_t n, size_t k, llama_token_data * out) {
    constexpr int32_t block = 64;
    const auto better = [](const llama_token_data & a, const llama_token_data & b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    size_t size = 0;
    float least = -INFINITY;
    for (int32_t begin = 0; begin < n; begin += block) {
        const int32_t end = std::min(begin + block, n);
        if (size == k && end - begin == block) {
            float lanes[16];
            std::memcpy(lanes, x + begin, sizeof lanes);
            for (int32_t i = 16; i < block; i += 16) {
                for (int32_t lane = 0; lane < 16; ++lane) {
                    const float v = x[begin + i + lane];
                    lanes[lane] = v > lanes[lane] ? v : lanes[lane];
                }
            }
            bool above = false;
            for (float lane : lanes) above |= lane > least;
            if (!above) continue;
        }
        for (int32_t i = begin; i < end; ++i) {
            if (!(x[i] > (size == k ? least : -INFINITY))) continue;  // NaN too
            if (size == k) std::pop_heap(out, out + size--, better);
            out[size++] = {i, x[i], 0.0f};
            std::push_heap(out, out + size, better);
            least = out[0].logit;
        }
    }
    std::sort_heap(out, out + size, better);
    return size;
}

// A chain of llama.cpp's samplers, entered by the shortest way.
struct Chain {
    llama_sampler * samplers = nullptr;      // owned
    bool greedy = false;                     // nothing in the chain changes which logit is the largest
    int32_t k = 0;                           // > 0: the chain begins by keeping the k largest
    std::vector<llama_logit_bias> bias;      // added to the logits in place: few tokens, no pass over the vocabulary
    std::unique_ptr<Constraint> constraint;  // what the text has to be; none: anything
    std::vector<llama_sampler *> lookback;   // samplers of the chain that also look at the prompt; not owned
    std::vector<llama_token_data> candidates;

    ~Chain() { llama_sampler_free(samplers); }

    // The next token of the i-th output of the last decode, or -1 if there is none to choose: no logit is a finite number.
    llama_token sample(llama_context * ctx, int32_t i, int32_t n_vocab) {
        Guard guard;
        float * logits = llama_get_logits_ith(ctx, i);
        if (!logits) throw Fault("llama.cpp kept no logits for the last token");
        for (const auto & b : bias) logits[b.token] += b.bias;
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
        if (constraint) constraint->accept(token);
        if (!greedy) llama_sampler_accept(samplers, token);
        return token;
    }

    // A token by the logits, whatever was forbidden; -1 if there is none.
    llama_token choose(const float * logits, int32_t n_vocab) {
        if (greedy) return argmax(logits, n_vocab);
        if (k > 0) {
            candidates.resize(std::min(k, n_vocab));
            candidates.resize(top_k(logits, n_vocab, candidates.size(), candidates.data()));
        } else {
            candidates.clear();
            for (llama_token id = 0; id < n_vocab; ++id) {
                if (logits[id] > -INFINITY) candidates.push_back({id, logits[id], 0.0f});
            }
        }
        if (candidates.empty()) return -1;
        llama_token_data_array array = {candidates.data(), candidates.size(), -1, k > 0};
        llama_sampler_apply(samplers, &array);
        if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) return -1;
        return array.data[array.selected].id;
    }

    // Takes the end of the prompt into the samplers that penalise what was said before.
    void read_prompt(const llama_token * tokens, int32_t n) const {
        Guard guard;
        for (auto * sampler : lookback) {
            for (int32_t i = 0; i < n; ++i) llama_sampler_accept(sampler, tokens[i]);
        }
    }
};

}  // namespace tea
