// How likely the model itself found the tokens of a text, before any sampler: log-softmax of the logits, at the sampled
// positions only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "llama.h"
#include "selection.hpp"

namespace tea {

// exp(x) for x <= 0, to 1e-7 of it, in operations that compilers vectorise. Below -87 it is exp(-87).
inline float exp_of_negative(float x) {
    x = x > -87.0f ? x : -87.0f;
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float n = (x * 1.44269504f + to_integer) - to_integer;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.3888889e-3f;
    for (const float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// log of the sum of exp(x); NaN where no x is a finite number.
inline double log_sum_exp(const float * x, int32_t n) {
    const llama_token best = argmax(x, n);
    if (best < 0) return NAN;
    const float max = x[best];
    constexpr int32_t block = 256;
    double sum = 0;
    for (int32_t begin = 0; begin < n; begin += block) {
        const int32_t end = std::min(begin + block, n);
        float lanes[16] = {};
        int32_t i = begin;
        for (; i + 16 <= end; i += 16) {
            for (int32_t lane = 0; lane < 16; ++lane) lanes[lane] += exp_of_negative(x[i + lane] - max);
        }
        for (; i < end; ++i) lanes[0] += exp_of_negative(x[i] - max);
        for (float lane : lanes) sum += lane;
    }
    return max + std::log(sum);
}

struct Logprob {
    llama_token token;
    float logprob;
};

// Of each token of a text: a row with its own, and then those of the `n_top` likeliest in its place.
class Logprobs {
  public:
    explicit Logprobs(int32_t n_top) : n_top_(n_top) {}

    // The logits that the next token is chosen by, before samplers change them.
    void read(const float * logits, int32_t n_vocab) {
        log_sum_ = log_sum_exp(logits, n_vocab);
        top_.resize(std::min(n_top_, n_vocab));
        top_.resize(top_.empty() ? 0 : top_k(logits, n_vocab, top_.size(), top_.data()));
    }

    void choose(llama_token token, float logit) { chosen_ = {token, static_cast<float>(logit - log_sum_)}; }

    // The chosen token belongs to the text, with so many bytes.
    void keep(size_t n_bytes) {
        rows_.push_back(chosen_);
        for (int32_t i = 0; i < n_top_; ++i) {
            const bool is_there = static_cast<size_t>(i) < top_.size();
            rows_.push_back(is_there ? Logprob{top_[i].id, static_cast<float>(top_[i].logit - log_sum_)} : Logprob{-1, 0});
        }
        sizes_.push_back(n_bytes);
    }

    // Forgets the tokens that are whole among the last `n_bytes`.
    void cut(size_t n_bytes) {
        while (n_bytes > 0 && !sizes_.empty() && sizes_.back() <= n_bytes) {
            n_bytes -= sizes_.back();
            sizes_.pop_back();
        }
        rows_.resize(sizes_.size() * (1 + n_top_));
    }

    const std::vector<Logprob> & rows() const { return rows_; }

  private:
    int32_t n_top_;
    double log_sum_ = 0;
    Logprob chosen_{};
    std::vector<llama_token_data> top_;
    std::vector<Logprob> rows_;
    std::vector<size_t> sizes_;
};

}  // namespace tea
