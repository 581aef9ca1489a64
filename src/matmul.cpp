// Multiplies weights of 4 bits (Q4_0) with a batch, on x86 with AVX-512 VNNI. Compiled into ggml-cpu in place of ggml's
// kernel for repacked weights (arch/x86/repack.cpp), which serves what ours leaves out.
//
// VNNI multiplies unsigned bytes with signed ones. ggml's makes the weights signed and takes three more instructions for
// each product to mend the signs. Here weights stay the unsigned numbers 0 to 15 that they are stored as, eight more than
// they stand for, and eight times the sum of the row's values is taken off. All of it is done in whole numbers, and the
// blocks are added up in the same order: the results are the same bits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"  // immintrin.h
#include "repack.h"

extern "C" void tea_upstream_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

namespace {

constexpr int COLUMNS = 16;  // of the weights, computed at once: two interleaved blocks of eight
constexpr int GROUPS = 4;    // of four interleaved rows, at most

struct Rows {  // what a block of four rows is multiplied with, and what is added before
    int32_t offset[4];
    float scale[4];
};

void read_rows(const block_q8_0x4 * a, Rows * out, int n) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int i = 0; i < n; ++i) {
        __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(a[i].qs));
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(a[i].qs + 64));
        alignas(64) int32_t parts[16];  // two of the first row, two of the second, …, and so once more
        _mm512_store_si512(parts, sums);
        for (int row = 0; row < 4; ++row) {
            const int at = 2 * row;
            out[i].offset[row] = -8 * (parts[at] + parts[at + 1] + parts[at + 8] + parts[at + 9]);
        }
        _mm_storeu_ps(out[i].scale, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(a[i].d))));
    }
}

// Weights of a block of 32 as unsigned bytes: vector i has those from 4 i to 4 i + 3 of each of 16 columns.
inline void read_weights(const block_q4_0x8 & left, const block_q4_0x8 & right, __m512i out[8]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i stored_with = _mm512_set1_epi8(static_cast<char>(0x88));  // repack.cpp, make_block_q4_0x8
    const __m512i low = _mm512_set1_epi8(0x0F);
    for (int half = 0; half < 2; ++half) {
        const __m512i l = _mm512_xor_si512(_mm512_loadu_si512(left.qs + 64 * half), stored_with);
        const __m512i r = _mm512_xor_si512(_mm512_loadu_si512(right.qs + 64 * half), stored_with);
        const __m512i pair[2] = {_mm512_permutex2var_epi32(l, even, r), _mm512_permutex2var_epi32(l, odd, r)};
        for (int i = 0; i < 2; ++i) {
            out[2 * half + i] = _mm512_and_si512(pair[i], low);
            out[2 * half + i + 4] = _mm512_and_si512(_mm512_srli_epi16(pair[i], 4), low);
        }
    }
}

inline __m512 read_scales(const block_q4_0x8 & left, const block_q4_0x8 & right) {
    const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i *>(left.d));
    const __m128i r = _mm_loadu_si128(reinterpret_cast<const __m128i *>(right.d));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(l), r, 1));
}

// 4 N rows of `a` times 16 columns, n blocks each.
template <int N>
void multiply(int n, const block_q4_0x8 * left, const block_q4_0x8 * right, const block_q8_0x4 * a, const Rows * rows,
              float * out, size_t stride) {
    __m512 sums[4 * N];
    for (__m512 & sum : sums) sum = _mm512_setzero_ps();
    for (int b = 0; b < n; ++b) {
        __m512i weights[8];
        read_weights(left[b], right[b], weights);
        const __m512 scales = read_scales(left[b], right[b]);
#pragma GCC unroll 16
        for (int row = 0; row < 4 * N; ++row) {
            const int group = row / 4 * n + b, of_four = row % 4;
            __m512i dot = _mm512_set1_epi32(rows[group].offset[of_four]);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                int32_t four_values;
                std::memcpy(&four_values, a[group].qs + i / 2 * 32 + of_four * 8 + i % 2 * 4, 4);
                dot = _mm512_dpbusd_epi32(dot, weights[i], _mm512_set1_epi32(four_values));
            }
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(rows[group].scale[of_four]));
            sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[row]);
        }
    }
    for (int row = 0; row < 4 * N; ++row) _mm512_storeu_ps(out + row * stride, sums[row]);
}

constexpr decltype(&multiply<1>) multiply_groups[GROUPS] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

}  // namespace

// `nr` rows, a multiple of 4, times `nc` columns of length `n` into `s`, whose rows are `bs` apart.
extern "C" void ggml_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    const int n_blocks = n / QK4_0, n_columns = nc / COLUMNS * COLUMNS;
    const auto * weights = static_cast<const block_q4_0x8 *>(vx);
    const auto * a = static_cast<const block_q8_0x4 *>(vy);
    static thread_local std::vector<Rows> rows;
    for (int row = 0; row < nr; row += 4 * GROUPS) {
        const int n_groups = std::min((nr - row) / 4, GROUPS);
        const block_q8_0x4 * part = a + static_cast<size_t>(row / 4) * n_blocks;
        rows.resize(static_cast<size_t>(n_groups) * n_blocks);
        read_rows(part, rows.data(), n_groups * n_blocks);
        for (int column = 0; column < n_columns; column += COLUMNS) {
            const block_q4_0x8 * left = weights + static_cast<size_t>(column / 8) * n_blocks;
            multiply_groups[n_groups - 1](n_blocks, left, left + n_blocks, part, rows.data(), s + row * bs + column, bs);
        }
    }
    if (n_columns < nc) {
        const block_q4_0x8 * last = weights + static_cast<size_t>(n_columns / 8) * n_blocks;
        tea_upstream_gemm_q4_0_8x8_q8_0(n, s + n_columns, bs, last, vy, nr, nc - n_columns);
    }
}

#else

extern "C" void ggml_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    tea_upstream_gemm_q4_0_8x8_q8_0(n, s, bs, vx, vy, nr, nc);
}

#endif
