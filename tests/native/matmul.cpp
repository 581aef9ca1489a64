// Our product of 4-bit weights with a batch (src/matmul.cpp) is ggml's, to the last bit, for every shape.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ggml.h"

extern "C" {
void ggml_gemm_q4_0_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void tea_upstream_gemm_q4_0_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
}

namespace {

// Of eight columns of weights, or of four rows that they are multiplied with: scales, then 128 bytes.
std::vector<uint8_t> random_blocks(size_t n, size_t n_scales, int lowest, std::mt19937 & random) {
    std::vector<uint8_t> blocks(n * (2 * n_scales + 128));
    for (size_t i = 0; i < n; ++i) {
        uint8_t * block = blocks.data() + i * (2 * n_scales + 128);
        for (size_t j = 0; j < n_scales; ++j) {
            const ggml_fp16_t scale = ggml_fp32_to_fp16(std::uniform_real_distribution<float>(-0.1f, 0.1f)(random));
            std::memcpy(block + 2 * j, &scale, 2);
        }
        for (size_t j = 0; j < 128; ++j) {
            block[2 * n_scales + j] = static_cast<uint8_t>(std::uniform_int_distribution<int>(lowest, 127)(random));
        }
    }
    return blocks;
}

}  // namespace

int main() {
    std::mt19937 random(1);
    for (const int n : {32, 96, 896, 4864}) {
        for (const int n_rows : {4, 8, 12, 16, 20, 28, 64}) {
            for (const int n_columns : {8, 16, 24, 40, 160}) {
                const size_t n_blocks = n / 32;
                const auto weights = random_blocks(n_columns / 8 * n_blocks, 8, -128, random);
                const auto rows = random_blocks(n_rows / 4 * n_blocks, 4, -127, random);
                const size_t stride = n_columns + 3;  // between rows of the result
                std::vector<float> ours(n_rows * stride, 7.0f), theirs = ours;
                ggml_gemm_q4_0_8x8_q8_0(n, ours.data(), stride, weights.data(), rows.data(), n_rows, n_columns);
                tea_upstream_gemm_q4_0_8x8_q8_0(n, theirs.data(), stride, weights.data(), rows.data(), n_rows, n_columns);
                if (std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(float)) != 0) {
                    std::printf("%d rows times %d columns of length %d: other bits\n", n_rows, n_columns, n);
                    return 1;
                }
            }
        }
    }
    std::puts("all right");
}
