// Our products of 4-bit and 8-bit weights with a batch (src/matmul.cpp) are ggml's, to the last bit.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llamafile/sgemm.h"
#include "repack.h"

extern "C" {
void ggml_gemm_q4_0_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void tea_upstream_gemm_q4_0_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void ggml_gemm_q4_K_8x8_q8_K(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void ggml_gemv_q4_K_8x8_q8_K(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
decltype(llamafile_sgemm) tea_upstream_llamafile_sgemm;
}

namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

// Blocks of some scales and the bytes that they scale.
Bytes random_blocks(size_t n, size_t n_scales, size_t n_bytes, int lowest, std::mt19937 & random) {
    const size_t size = 2 * n_scales + n_bytes;
    Bytes blocks(n * size);
    for (size_t i = 0; i < n; ++i) {
        uint8_t * block = blocks.data() + i * size;
        for (size_t j = 0; j < n_scales; ++j) {
            const ggml_fp16_t scale = ggml_fp32_to_fp16(std::uniform_real_distribution<float>(-0.1f, 0.1f)(random));
            std::memcpy(block + 2 * j, &scale, 2);
        }
        for (size_t j = 0; j < n_bytes; ++j) {
            block[2 * n_scales + j] = static_cast<uint8_t>(std::uniform_int_distribution<int>(lowest, 127)(random));
        }
    }
    return blocks;
}

void check(const char * what, int n, int n_rows, int n_columns, const Floats & ours, const Floats & theirs) {
    if (std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(float)) == 0) return;
    std::printf("%s: %d rows times %d columns of length %d have other bits\n", what, n_rows, n_columns, n);
    std::exit(1);
}

void check_q4_0(int n, int n_rows, int n_columns, std::mt19937 & random) {
    const size_t n_blocks = n / 32, stride = n_columns + 3;  // between rows of the result
    const Bytes weights = random_blocks(n_columns / 8 * n_blocks, 8, 128, -128, random);
    const Bytes rows = random_blocks(n_rows / 4 * n_blocks, 4, 128, -127, random);
    Floats ours(n_rows * stride, 7.0f), theirs = ours;
    ggml_gemm_q4_0_8x8_q8_0(n, ours.data(), stride, weights.data(), rows.data(), n_rows, n_columns);
    tea_upstream_gemm_q4_0_8x8_q8_0(n, theirs.data(), stride, weights.data(), rows.data(), n_rows, n_columns);
    check("Q4_0", n, n_rows, n_columns, ours, theirs);
}

// Against ggml's product with a single row: its own for many rows adds up in another order.
void check_q4_K(int n, int n_rows, int n_columns, std::mt19937 & random) {
    const size_t n_blocks = n / QK_K, stride = n_columns + 3;
    std::vector<block_q4_Kx8> weights(n_columns / 8 * n_blocks);
    std::vector<block_q8_K> rows(n_rows * n_blocks);
    std::vector<block_q8_Kx4> interleaved(n_rows / 4 * n_blocks);
    const auto byte = [&](int lowest, int highest) { return std::uniform_int_distribution<int>(lowest, highest)(random); };
    const auto half = [&] { return ggml_fp32_to_fp16(std::uniform_real_distribution<float>(0.0f, 0.1f)(random)); };
    for (auto & block : weights) {
        for (auto & d : block.d) d = half();
        for (auto & d : block.dmin) d = half();
        for (auto & scale : block.scales) scale = static_cast<uint8_t>(byte(0, 255));
        for (auto & weight : block.qs) weight = static_cast<uint8_t>(byte(0, 255));
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        block_q8_K & from = rows[i];
        const size_t row = i / n_blocks, of_four = row % 4;
        block_q8_Kx4 & to = interleaved[row / 4 * n_blocks + i % n_blocks];
        from.d = to.d[of_four] = std::uniform_real_distribution<float>(-0.1f, 0.1f)(random);
        for (int k = 0; k < QK_K; ++k) {
            from.qs[k] = static_cast<int8_t>(byte(-127, 127));
            to.qs[k / 8 * 32 + of_four * 8 + k % 8] = from.qs[k];
        }
        for (int of_16 = 0; of_16 < QK_K / 16; ++of_16) {
            int sum = 0;
            for (int k = 0; k < 16; ++k) sum += from.qs[16 * of_16 + k];
            from.bsums[of_16] = to.bsums[of_16 / 4 * 16 + of_four * 4 + of_16 % 4] = static_cast<int16_t>(sum);
        }
    }
    Floats ours(n_rows * stride, 7.0f), theirs = ours;
    ggml_gemm_q4_K_8x8_q8_K(n, ours.data(), stride, weights.data(), interleaved.data(), n_rows, n_columns);
    for (int row = 0; row < n_rows; ++row) {
        ggml_gemv_q4_K_8x8_q8_K(n, theirs.data() + row * stride, 0, weights.data(), rows.data() + row * n_blocks, 1, n_columns);
    }
    check("Q4_K", n, n_rows, n_columns, ours, theirs);
}

void check_q8_0(int n, int n_rows, int n_columns, std::mt19937 & random) {
    const int64_t n_blocks = n / 32, stride = n_columns + 3;
    const Bytes weights = random_blocks(n_columns * n_blocks, 1, 32, -127, random);
    const Bytes rows = random_blocks(n_rows * n_blocks, 1, 32, -127, random);
    Floats ours(n_rows * stride, 7.0f), theirs = ours;
    for (int thread = 0; thread < 3; ++thread) {
        ggml_compute_params params{};
        params.ith = thread;
        params.nth = 3;
        const auto multiply = [&](auto & function, Floats & out) {
            return function(&params, n_columns, n_rows, n_blocks, weights.data(), n_blocks, rows.data(), n_blocks,
                            out.data(), stride, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, GGML_TYPE_F32);
        };
        if (!multiply(llamafile_sgemm, ours) || !multiply(tea_upstream_llamafile_sgemm, theirs)) {
            std::puts("Q8_0: a product was refused");
            std::exit(1);
        }
    }
    check("Q8_0", n, n_rows, n_columns, ours, theirs);
}

}  // namespace

int main() {
    ggml_cpu_init();  // its table of half floats
    std::mt19937 random(1);
    for (const int n : {32, 96, 896, 4864}) {
        for (const int n_rows : {4, 8, 12, 16, 20, 28, 64}) {
            for (const int n_columns : {8, 16, 24, 40, 160}) check_q4_0(n, n_rows, n_columns, random);
            for (const int n_columns : {8, 16, 24, 40, 160}) check_q4_K((n + 255) / 256 * 256, n_rows, n_columns, random);
        }
        for (const int n_rows : {2, 3, 5, 8, 9, 32, 33, 71}) {
            for (const int n_columns : {1, 3, 4, 7, 16, 50}) check_q8_0(n, n_rows, n_columns, random);
        }
    }
    std::puts("all right");
}
