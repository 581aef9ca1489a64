// The largest of many logits, found without sorting or copying them all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

inline bool is_better(const llama_token_data & a, const llama_token_data & b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The k largest of n logits, best first, into out (which has room for k). Returns how many there are.
// A heap holds the k best so far; a block whose maximum is not above the heap's least is passed over.
inline size_t top_k(const float * x, int32_t n, size_t k, llama_token_data * out) {
    constexpr int32_t block = 64;
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
            if (size == k) std::pop_heap(out, out + size--, is_better);
            out[size++] = {i, x[i], 0.0f};
            std::push_heap(out, out + size, is_better);
            least = out[0].logit;
        }
    }
    std::sort_heap(out, out + size, is_better);
    return size;
}

}  // namespace tea
