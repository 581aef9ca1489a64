// Multiplies weights of 4 and 8 bits (Q4_0, Q4_K, Q8_0, IQ4_NL) with a batch, and float weights with a single row, on x86
// with AVX-512 VNNI. Compiled into ggml-cpu in place of ggml's kernels for it (arch/x86/repack.cpp and
// llamafile/sgemm.cpp), which serve what ours leave out.
//
// VNNI multiplies unsigned bytes with signed ones. ggml's make the weights unsigned for each product anew, and mend the
// signs of what they are multiplied with. Here weights are made unsigned once, by adding 8 or 128, and as many times the
// sum of the row's values is taken off again. All of it is done in whole numbers, and the blocks are added up in the order
// of ggml's product with a single row: the results are the same bits, however many rows there are. (ggml's own for many
// rows of Q4_K adds up in another.) Float weights are ggml's from two rows on, whose order the single row has here.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#define GGML_COMMON_IMPL_CPP  // kvalues_iq4nl
#include "ggml-common.h"
#include "ggml-cpu-impl.h"  // immintrin.h
#include "llamafile/sgemm.h"
#include "repack.h"

extern "C" bool tea_upstream_llamafile_sgemm(
    const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda, const void * b,
    int64_t ldb, void * c, int64_t ldc, int a_type, int b_type, int c_type);
extern "C" void tea_upstream_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
extern "C" void tea_upstream_gemm_q4_K_8x8_q8_K(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

namespace {

// --- columns interleaved by eight, rows by four ------------------------------------------------------------------------
constexpr int COLUMNS = 16;  // of the weights, computed at once: two interleaved blocks of eight
constexpr int GROUPS = 4;    // of four interleaved rows, at most

// Four bytes of each of 16 columns, from 8 bytes of each of 8 columns on the left and on the right: the first four or the
// last.
inline __m512i fours(__m512i left, __m512i right, bool last) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(left, last ? _mm512_add_epi32(first, _mm512_set1_epi32(1)) : first, right);
}

// Eight scales on the left and on the right.
inline __m512 read_scales(const ggml_half * left, const ggml_half * right) {
    const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i *>(left));
    const __m128i r = _mm_loadu_si128(reinterpret_cast<const __m128i *>(right));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(l), r, 1));
}

// Adds to `sum` the products of 32 weights of 16 columns with 32 values of one of four interleaved rows.
inline __m512i add_products(__m512i sum, const __m512i weights[8], const int8_t * values, int of_four) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        int32_t four_values;
        std::memcpy(&four_values, values + i / 2 * 32 + of_four * 8 + i % 2 * 4, 4);
        sum = _mm512_dpbusd_epi32(sum, weights[i], _mm512_set1_epi32(four_values));
    }
    return sum;
}

inline void fetch(const void * from, int n_bytes) {  // what the processor would not guess in time
    for (int at = 0; at < n_bytes; at += 64) _mm_prefetch(static_cast<const char *>(from) + at, _MM_HINT_T0);
}

// --- Q4_0 --------------------------------------------------------------------------------------------------------------

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
    const __m512i stored_with = _mm512_set1_epi8(static_cast<char>(0x88));  // repack.cpp, make_block_q4_0x8
    const __m512i low = _mm512_set1_epi8(0x0F);
    for (int i = 0; i < 4; ++i) {
        const __m512i l = _mm512_loadu_si512(left.qs + i / 2 * 64), r = _mm512_loadu_si512(right.qs + i / 2 * 64);
        const __m512i both = _mm512_xor_si512(fours(l, r, i % 2), stored_with);
        out[i] = _mm512_and_si512(both, low);
        out[i + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

// 4 N rows of `a` times 16 columns, n blocks each.
template <int N>
void multiply(int n, const block_q4_0x8 * left, const block_q4_0x8 * right, const block_q8_0x4 * a, const Rows * rows,
              float * out, size_t stride) {
    __m512 sums[4 * N];
    for (__m512 & sum : sums) sum = _mm512_setzero_ps();
    for (int b = 0; b < n; ++b) {
        fetch(left + 2 * (n + b), 2 * sizeof *left);  // of the next sixteen columns
        __m512i weights[8];
        read_weights(left[b], right[b], weights);
        const __m512 scales = read_scales(left[b].d, right[b].d);
#pragma GCC unroll 16
        for (int row = 0; row < 4 * N; ++row) {
            const int group = row / 4 * n + b, of_four = row % 4;
            const __m512i offset = _mm512_set1_epi32(rows[group].offset[of_four]);
            const __m512i dot = add_products(offset, weights, a[group].qs, of_four);
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(rows[group].scale[of_four]));
            sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[row]);
        }
    }
    for (int row = 0; row < 4 * N; ++row) _mm512_storeu_ps(out + row * stride, sums[row]);
}

// --- Q4_K --------------------------------------------------------------------------------------------------------------
constexpr int PAIRS = QK_K / 64;  // of sub-blocks of 32

struct KRows {  // sums of a block of four rows: of the values in each sub-block, two in 32 bits
    int32_t sums[PAIRS][4];
};

void read_rows(const block_q8_Kx4 * a, KRows * out, int n) {
    for (int i = 0; i < n; ++i) {
        for (int pair = 0; pair < PAIRS; ++pair) {
            for (int row = 0; row < 4; ++row) {
                const int16_t * of_16 = a[i].bsums + 16 * pair + 4 * row;
                const auto first = static_cast<uint16_t>(of_16[0] + of_16[1]);
                const auto second = static_cast<uint16_t>(of_16[2] + of_16[3]);
                out[i].sums[pair][row] = static_cast<int32_t>(first | static_cast<uint32_t>(second) << 16);
            }
        }
    }
}

// Scales and minima of eight columns in one sub-block, 6 bits each (repack.cpp, make_block_q4_Kx8): four bytes of scales,
// four more, four of minima, four more.
inline __m128i read_six_bits(const uint8_t * packed) {
    uint32_t in[3];
    std::memcpy(in, packed, sizeof in);
    const auto joined = [](uint32_t low, uint32_t high) { return (low & 0x0F0F0F0F) | (high >> 6 & 0x03030303) << 4; };
    const uint32_t six = 0x3F3F3F3F;
    return _mm_set_epi32(joined(in[2] >> 4, in[1]), in[1] & six, joined(in[2], in[0]), in[0] & six);
}

struct KScales {  // of 16 columns in a block
    __m512i scales[2 * PAIRS];  // by sub-block
    __m512i minima[PAIRS];      // of two sub-blocks, 16 bits each
};

inline KScales read_scales(const block_q4_Kx8 & left, const block_q4_Kx8 & right) {
    KScales out;
    for (int pair = 0; pair < PAIRS; ++pair) {
        __m128i minima[2];
        for (int i = 0; i < 2; ++i) {
            const int at = 12 * (2 * pair + i);
            const __m128i l = read_six_bits(left.scales + at), r = read_six_bits(right.scales + at);
            out.scales[2 * pair + i] = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(l, r));
            minima[i] = _mm_unpackhi_epi64(l, r);
        }
        const __m128i low = _mm_unpacklo_epi8(minima[0], minima[1]), high = _mm_unpackhi_epi8(minima[0], minima[1]);
        out.minima[pair] = _mm512_cvtepu8_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    }
    return out;
}

// Two sub-blocks of weights as they are stored: the first in the low halves of the bytes, the second in the high ones.
inline void read_weights(const uint8_t * left, const uint8_t * right, __m512i out[8]) {
    for (int i = 0; i < 8; ++i) {
        out[i] = fours(_mm512_loadu_si512(left + i / 2 * 64), _mm512_loadu_si512(right + i / 2 * 64), i % 2);
    }
}

// 4 N rows of `a` times 16 columns, n blocks each.
template <int N>
void multiply(int n, const block_q4_Kx8 * left, const block_q4_Kx8 * right, const block_q8_Kx4 * a, const KRows * rows,
              float * out, size_t stride) {
    __m512 sums[4 * N], least[4 * N];
    for (int row = 0; row < 4 * N; ++row) sums[row] = least[row] = _mm512_setzero_ps();
    for (int b = 0; b < n; ++b) {
        const KScales scales = read_scales(left[b], right[b]);
        __m512i dots[4 * N];
        for (__m512i & dot : dots) dot = _mm512_setzero_si512();
        for (int pair = 0; pair < PAIRS; ++pair) {
            constexpr int part = 2 * sizeof *left / PAIRS;
            fetch(reinterpret_cast<const char *>(left + 2 * (n + b)) + pair * part, part);  // of the next sixteen columns
            __m512i packed[8], weights[8];
            read_weights(left[b].qs + 256 * pair, right[b].qs + 256 * pair, packed);
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 8; ++i) {
                    const __m512i bits = half ? _mm512_srli_epi16(packed[i], 4) : packed[i];
                    weights[i] = _mm512_and_si512(bits, _mm512_set1_epi8(0x0F));
                }
                const int sub_block = 2 * pair + half;
#pragma GCC unroll 16
                for (int row = 0; row < 4 * N; ++row) {
                    const int8_t * values = a[row / 4 * n + b].qs + 128 * sub_block;
                    const __m512i dot = add_products(_mm512_setzero_si512(), weights, values, row % 4);
                    dots[row] = _mm512_add_epi32(dots[row], _mm512_mullo_epi32(dot, scales.scales[sub_block]));
                }
            }
        }
        const __m512 d = read_scales(left[b].d, right[b].d), d_least = read_scales(left[b].dmin, right[b].dmin);
#pragma GCC unroll 16
        for (int row = 0; row < 4 * N; ++row) {
            const int group = row / 4 * n + b, of_four = row % 4;
            __m512i dot_least = _mm512_setzero_si512();
            for (int pair = 0; pair < PAIRS; ++pair) {
                const __m512i two_sums = _mm512_set1_epi32(rows[group].sums[pair][of_four]);
                dot_least = _mm512_dpwssd_epi32(dot_least, scales.minima[pair], two_sums);
            }
            const __m512 scale = _mm512_set1_ps(a[group].d[of_four]);
            sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[row]), _mm512_mul_ps(d, scale), sums[row]);
            least[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot_least), _mm512_mul_ps(d_least, scale), least[row]);
        }
    }
    for (int row = 0; row < 4 * N; ++row) _mm512_storeu_ps(out + row * stride, _mm512_sub_ps(sums[row], least[row]));
}

// All rows times all columns, by the largest tiles that fit.
template <int BLOCK, class OfRows, class Weights, class Values>
void multiply_interleaved(int n, float * s, size_t bs, const Weights * weights, const Values * a, int nr, int nc) {
    const int n_blocks = n / BLOCK;
    static thread_local std::vector<OfRows> rows;
    for (int row = 0; row < nr; row += 4 * GROUPS) {
        const int n_groups = std::min((nr - row) / 4, GROUPS);
        const Values * part = a + static_cast<size_t>(row / 4) * n_blocks;
        rows.resize(static_cast<size_t>(n_groups) * n_blocks);
        read_rows(part, rows.data(), n_groups * n_blocks);
        for (int column = 0; column < nc; column += COLUMNS) {
            const bool eight = nc - column < COLUMNS;  // are left: they are computed twice
            const Weights * left = weights + static_cast<size_t>(column / 8) * n_blocks;
            const Weights * right = eight ? left : left + n_blocks;
            float twice_eight[4 * GROUPS * COLUMNS];
            float * out = eight ? twice_eight : s + row * bs + column;
            const size_t stride = eight ? COLUMNS : bs;
            switch (n_groups) {
                case 1: multiply<1>(n_blocks, left, right, part, rows.data(), out, stride); break;
                case 2: multiply<2>(n_blocks, left, right, part, rows.data(), out, stride); break;
                case 3: multiply<3>(n_blocks, left, right, part, rows.data(), out, stride); break;
                default: multiply<4>(n_blocks, left, right, part, rows.data(), out, stride);
            }
            for (int i = 0; eight && i < 4 * n_groups; ++i) {
                std::copy_n(out + i * COLUMNS, COLUMNS / 2, s + (row + i) * bs + column);
            }
        }
    }
}

// --- Q8_0 and IQ4_NL, row by row ---------------------------------------------------------------------------------------
#ifdef GGML_USE_LLAMAFILE  // GGML_LLAMAFILE=OFF leaves these products to ggml's single rows

constexpr int64_t WEIGHT_ROWS = 4;  // computed at once, two in a vector
constexpr int64_t VALUE_ROWS = 8;   // multiplied with them at once, at most

struct Values {  // a block of the rows that weights are multiplied with
    const int8_t * qs;
    float scale;
    alignas(32) int32_t offset[8];
};

inline float to_float(ggml_half x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

void read_values(const block_q8_0 * b, Values * out, int64_t n) {
    const __m256i by_128 = _mm256_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < n; ++i) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b[i].qs));
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), by_128, values);
        out[i].qs = b[i].qs;
        out[i].scale = to_float(b[i].d);
        _mm256_store_si256(reinterpret_cast<__m256i *>(out[i].offset), _mm256_sub_epi32(_mm256_setzero_si256(), sums));
    }
}

inline __m512i twice(const void * eight) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i *>(eight)));
}

inline __m256i read_signed(const block_q8_0 & b) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs)); }

inline __m256i read_signed(const block_iq4_nl & b) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.qs));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kvalues_iq4nl));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), _mm256_and_si256(both, _mm256_set1_epi8(0x0F)));
}

template <class Weights>
inline __m512i read_pair(const Weights & first, const Weights & second) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(read_signed(first)), read_signed(second), 1);
    return _mm512_xor_si512(both, _mm512_set1_epi8(static_cast<char>(0x80)));
}

template <class Weights>
inline __m512 read_pair_scales(const Weights & first, const Weights & second) {
    return _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(to_float(first.d)), _mm512_set1_ps(to_float(second.d)));
}

inline float sum_of(__m256 x) {  // in the order of ggml's
    __m128 sum = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Four rows of `a` times N rows of values, k blocks each.
template <int N, class Weights>
void multiply_rows(int64_t k, const Weights * a, int64_t lda, const Values * values, float * c, int64_t ldc) {
    __m512 sums[N][2];
    for (auto & pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
    for (int64_t b = 0; b < k; ++b) {
        fetch(a + 4 * (lda + b), 4 * sizeof *a);  // of the next four rows
        const __m512i weights[2] = {read_pair(a[b], a[lda + b]), read_pair(a[2 * lda + b], a[3 * lda + b])};
        const __m512 scales[2] = {read_pair_scales(a[b], a[lda + b]), read_pair_scales(a[2 * lda + b], a[3 * lda + b])};
#pragma GCC unroll 8
        for (int row = 0; row < N; ++row) {
            const Values & v = values[row * k + b];
            const __m512i qs = twice(v.qs), offset = twice(v.offset);
            for (int pair = 0; pair < 2; ++pair) {
                const __m512 dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset, weights[pair], qs));
                const __m512 scale = _mm512_mul_ps(scales[pair], _mm512_set1_ps(v.scale));
                sums[row][pair] = _mm512_fmadd_ps(scale, dot, sums[row][pair]);
            }
        }
    }
    for (int row = 0; row < N; ++row) {
        for (int pair = 0; pair < 2; ++pair) {
            c[row * ldc + 2 * pair] = sum_of(_mm512_castps512_ps256(sums[row][pair]));
            c[row * ldc + 2 * pair + 1] = sum_of(_mm512_extractf32x8_ps(sums[row][pair], 1));
        }
    }
}

template <class Weights>
constexpr decltype(&multiply_rows<1, Weights>) multiply_n_rows[VALUE_ROWS] = {
    multiply_rows<1, Weights>, multiply_rows<2, Weights>, multiply_rows<3, Weights>, multiply_rows<4, Weights>,
    multiply_rows<5, Weights>, multiply_rows<6, Weights>, multiply_rows<7, Weights>, multiply_rows<8, Weights>,
};

// This thread's share of `m` weight rows times `n` rows of values.
template <class Weights>
void multiply_share(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const Weights * a, int64_t lda,
                    const block_q8_0 * b, int64_t ldb, float * c, int64_t ldc) {
    static thread_local std::vector<Values> values;
    const int64_t n_fours = (m + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    const int64_t begin = n_fours * params->ith / params->nth * WEIGHT_ROWS;
    const int64_t end = std::min(n_fours * (params->ith + 1) / params->nth * WEIGHT_ROWS, m);
    constexpr int64_t at_once = 32;  // rows of values, so that they stay in the cache
    for (int64_t from = 0; from < n; from += at_once) {
        const int64_t n_values = std::min(n - from, at_once);
        values.resize(n_values * k);
        for (int64_t i = 0; i < n_values; ++i) read_values(b + (from + i) * ldb, values.data() + i * k, k);
        for (int64_t row = begin; row < end; row += WEIGHT_ROWS) {
            for (int64_t i = 0; i < n_values; i += VALUE_ROWS) {
                const int64_t n_rows = std::min(n_values - i, VALUE_ROWS);
                const auto multiply = multiply_n_rows<Weights>[n_rows - 1];
                float * out = c + (from + i) * ldc + row;
                if (end - row >= WEIGHT_ROWS) {
                    multiply(k, a + row * lda, lda, values.data() + i * k, out, ldc);
                    continue;
                }
                for (int64_t left = 0; left < end - row; ++left) {  // four times the same
                    float four[VALUE_ROWS * WEIGHT_ROWS];
                    multiply(k, a + (row + left) * lda, 0, values.data() + i * k, four, WEIGHT_ROWS);
                    for (int64_t j = 0; j < n_rows; ++j) out[j * ldc + left] = four[j * WEIGHT_ROWS];
                }
            }
        }
    }
}

// --- F32, F16 and BF16, a single row -----------------------------------------------------------------------------------

inline __m512 load_floats(const float * at) { return _mm512_loadu_ps(at); }

inline __m512 load_floats(const ggml_fp16_t * at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
}

#ifdef __AVX512BF16__
constexpr int64_t BF16_STEP = 32;

inline __m512bh load_floats(const ggml_bf16_t * at) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at));
}

inline __m512 multiply_add(__m512bh a, __m512bh b, __m512 sum) { return _mm512_dpbf16_ps(sum, a, b); }
#else
constexpr int64_t BF16_STEP = 16;

inline __m512 load_floats(const ggml_bf16_t * at) {
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
}
#endif

inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

// What tinyBLAS (llamafile/sgemm.cpp) does with two rows and more and leaves with one: `m` weight rows, of which this
// thread takes its share, times a row. False where it leaves any number of rows.
template <int64_t STEP, class T>
bool multiply_row(const ggml_compute_params * params, int64_t m, int64_t k, const T * a, int64_t lda, const T * b, float * c) {
    if (m % WEIGHT_ROWS != 0 || k % STEP != 0) return false;
    const int64_t n_fours = m / WEIGHT_ROWS;
    const int64_t end = n_fours * (params->ith + 1) / params->nth * WEIGHT_ROWS;
    for (int64_t row = n_fours * params->ith / params->nth * WEIGHT_ROWS; row < end; row += WEIGHT_ROWS) {
        __m512 sums[WEIGHT_ROWS] = {};
        for (int64_t i = 0; i < k; i += STEP) {
            const auto values = load_floats(b + i);
#pragma GCC unroll 4
            for (int64_t j = 0; j < WEIGHT_ROWS; ++j) {
                const T * weights = a + (row + j) * lda + i;
                fetch(weights + WEIGHT_ROWS * lda, 1);
                sums[j] = multiply_add(load_floats(weights), values, sums[j]);
            }
        }
        for (int64_t j = 0; j < WEIGHT_ROWS; ++j) c[row + j] = _mm512_reduce_add_ps(sums[j]);
    }
    return true;
}

#endif

}  // namespace

#ifdef GGML_USE_LLAMAFILE
// What llamafile/sgemm.h says: C = A B for a batch of `n` rows; `k`, `lda` and `ldb` count blocks.
extern "C" bool llamafile_sgemm(
    const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda, const void * b,
    int64_t ldb, void * c, int64_t ldc, int a_type, int b_type, int c_type) {
    const auto is = [&](ggml_type of_weights, ggml_type of_values) { return a_type == of_weights && b_type == of_values; };
    auto * out = static_cast<float *>(c);
    const auto share = [&](const auto * weights) {
        multiply_share(params, m, n, k, weights, lda, static_cast<const block_q8_0 *>(b), ldb, out, ldc);
        return true;
    };
    if (c_type == GGML_TYPE_F32) {
        if (is(GGML_TYPE_Q8_0, GGML_TYPE_Q8_0) && n > 1) return share(static_cast<const block_q8_0 *>(a));
        if (is(GGML_TYPE_IQ4_NL, GGML_TYPE_Q8_0)) return share(static_cast<const block_iq4_nl *>(a));
        if (n == 1) {
            const auto row = [&](auto step, const auto * weights) {
                return multiply_row<step>(params, m, k, weights, lda, static_cast<decltype(weights)>(b), out);
            };
            constexpr std::integral_constant<int64_t, 16> sixteen;
            constexpr std::integral_constant<int64_t, BF16_STEP> bf16;
            if (is(GGML_TYPE_F32, GGML_TYPE_F32)) return row(sixteen, static_cast<const float *>(a));
            if (is(GGML_TYPE_F16, GGML_TYPE_F16)) return row(sixteen, static_cast<const ggml_fp16_t *>(a));
            if (is(GGML_TYPE_BF16, GGML_TYPE_BF16)) return row(bf16, static_cast<const ggml_bf16_t *>(a));
        }
    }
    return tea_upstream_llamafile_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type);
}
#endif

// `nr` rows, a multiple of 4, times `nc` columns, a multiple of 8, of length `n` into `s`, whose rows are `bs` apart.
extern "C" void ggml_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    const auto * weights = static_cast<const block_q4_0x8 *>(vx);
    const auto * values = static_cast<const block_q8_0x4 *>(vy);
    multiply_interleaved<QK4_0, Rows>(n, s, bs, weights, values, nr, nc);
}

extern "C" void ggml_gemm_q4_K_8x8_q8_K(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    const auto * weights = static_cast<const block_q4_Kx8 *>(vx);
    const auto * values = static_cast<const block_q8_Kx4 *>(vy);
    multiply_interleaved<QK_K, KRows>(n, s, bs, weights, values, nr, nc);
}

#else

#ifdef GGML_USE_LLAMAFILE
extern "C" bool llamafile_sgemm(
    const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda, const void * b,
    int64_t ldb, void * c, int64_t ldc, int a_type, int b_type, int c_type) {
    return tea_upstream_llamafile_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type);
}
#endif

extern "C" void ggml_gemm_q4_0_8x8_q8_0(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    tea_upstream_gemm_q4_0_8x8_q8_0(n, s, bs, vx, vy, nr, nc);
}

extern "C" void ggml_gemm_q4_K_8x8_q8_K(
    int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    tea_upstream_gemm_q4_K_8x8_q8_K(n, s, bs, vx, vy, nr, nc);
}

#endif
