// Multiplies weights of the types Q2_K to Q6_K and IQ4_XS with one row or a few, on x86 with AVX-512 VNNI. Compiled
// into ggml-cpu in place of ggml's tiled product (tiled/tiled.cpp), which goes on serving larger batches.
//
// Of less than eight rows ggml would compute one after the other, with sums whose last bits are others. Here they are
// the tiled product's: for each block of 256 weights whole numbers, which are exact in any order, and of these the same
// few steps in floats, block after block. Neither source is compiled with multiplications and additions contracted
// (CMakeLists.txt): that would be the compiler's choice. Sixteen columns are computed at once, so that the steps in
// floats are one instruction for all of them.
#include <algorithm>
#include <cstdint>
#include <cstring>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#define GGML_COMMON_IMPL_CPP  // kvalues_iq4nl
#include "ggml-common.h"
#include "ggml-cpu-impl.h"  // immintrin.h
#include "ggml-cpu.h"
#include "tiled/tiled.h"

extern "C" decltype(ggml_compute_forward_mul_mat_tiled) tea_upstream_mul_mat_tiled;
extern "C" decltype(ggml_compute_forward_mul_mat_id_tiled) tea_upstream_mul_mat_id_tiled;
extern "C" decltype(ggml_cpu_has_avx512) tea_repacks_q2_K;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

namespace {

// --- unpacking ---------------------------------------------------------------------------------------------------------

struct Block {  // 256 weights of a column
    __m512i weights[4];  // as unsigned bytes, in their order
    __m512i scales[4];   // of the sums of four products that a lane has; see `spread_words` and `spread`
    __m256i offsets;     // by 16 weights: what the sum of their values is multiplied with, to be taken off: minima,
                         // or what was added to make weights unsigned, times their scales
};

inline __m128i load_16(const void * at) { return _mm_loadu_si128(static_cast<const __m128i *>(at)); }
inline __m256i load_32(const void * at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }
inline __m512i load_64(const void * at) { return _mm512_loadu_si512(at); }
inline __m512i bytes_of(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }

// Two times 32 bytes, shifted right within their bytes: by `first` bits and by `second` (to the left, if negative).
inline __m512i bits(__m256i bytes, int first, int second, int mask) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi32(first & 31), _mm256_set1_epi32(second & 31), 1);
    return _mm512_and_si512(_mm512_rorv_epi32(_mm512_broadcast_i64x4(bytes), by), bytes_of(mask));
}

// Scales of WIDTH weights each, for sums of at most 16 bits: those of weights[0] and [1] are packed into one vector, four
// of the one after four of the other, and so are those of [2] and [3].
template <int WIDTH>
inline void spread_words(__m128i scales, Block * out) {
    constexpr int64_t four = 0x0001000100010001;
    const __m512i of_16 = _mm512_setr_epi64(0, 4 * four, 1 * four, 5 * four, 2 * four, 6 * four, 3 * four, 7 * four);
    const __m512i of_32 = _mm512_setr_epi64(0, 2 * four, 0, 2 * four, 1 * four, 3 * four, 1 * four, 3 * four);
    const __m512i first = WIDTH == 16 ? of_16 : of_32, all = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(scales));
    out->scales[0] = _mm512_permutexvar_epi16(first, all);
    out->scales[1] = _mm512_permutexvar_epi16(_mm512_add_epi16(first, _mm512_set1_epi16(128 / WIDTH)), all);
}

// Scales of 32 weights each, for sums of more bits: those of each vector of weights are in one of 32-bit lanes.
inline void spread(__m128i scales, Block * out) {
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i all = _mm512_cvtepi8_epi32(scales);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        out->scales[i] = _mm512_permutexvar_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(2 * i)), all);
    }
}

inline __m256i times(__m128i scales, int added) {
    return _mm256_mullo_epi16(_mm256_cvtepi8_epi16(scales), _mm256_set1_epi16(static_cast<int16_t>(added)));
}

// Scales and minima of 32 weights each, 6 bits: the lower ones of four scales, of four minima, and of four of each; with
// the upper ones of the last beside the first (ggml-quants.c, get_scale_min_k4).
inline void read_six_bits(const uint8_t * packed, Block * out) {
    const __m128i in = _mm_maskz_loadu_epi32(7, packed);
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(in, _MM_SHUFFLE(2, 1, 2, 0)), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(in, _MM_SHUFFLE(1, 1, 0, 0)), 2);
    const __m128i both = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi64x(0x0F0F0F0F3F3F3F3F)),
                                      _mm_and_si128(high, _mm_set1_epi64x(0x3030303000000000)));
    spread_words<32>(both, out);
    const __m128i minima = _mm_unpackhi_epi64(both, both);
    out->offsets = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(minima, minima));
}

inline Block read(const block_q2_K & b) {
    Block out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) out.weights[i] = bits(load_32(b.qs + i / 2 * 32), i % 2 * 4, i % 2 * 4 + 2, 0x03);
    const __m128i packed = load_16(b.scales), low = _mm_set1_epi8(0x0F);
    spread_words<16>(_mm_and_si128(packed, low), &out);
    out.offsets = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(packed, 4), low));
    return out;
}

inline Block read(const block_q3_K & b) {
    Block out;
    const __m256i upper = load_32(b.hmask);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i lower = bits(load_32(b.qs + i / 2 * 32), i % 2 * 4, i % 2 * 4 + 2, 0x03);
        out.weights[i] = _mm512_or_si512(lower, bits(upper, 2 * i - 2, 2 * i - 1, 0x04));
    }
    const __m128i in = _mm_maskz_loadu_epi32(7, b.scales);
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(in, _MM_SHUFFLE(1, 0, 1, 0)), _mm_setr_epi32(0, 0, 4, 4));
    const __m128i high = _mm_srlv_epi32(_mm_shuffle_epi32(in, _MM_SHUFFLE(2, 2, 2, 2)), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i stored = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(0x0F)),
                                        _mm_slli_epi32(_mm_and_si128(high, _mm_set1_epi8(0x03)), 4));
    const __m128i scales = _mm_sub_epi8(stored, _mm_set1_epi8(32));
    spread_words<16>(scales, &out);
    out.offsets = times(scales, 4);
    return out;
}

inline Block read(const block_q4_K & b) {
    Block out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) out.weights[i] = bits(load_32(b.qs + i * 32), 0, 4, 0x0F);
    read_six_bits(b.scales, &out);
    return out;
}

inline Block read(const block_q5_K & b) {
    Block out;
    const __m256i upper = load_32(b.qh);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i lower = bits(load_32(b.qs + i * 32), 0, 4, 0x0F);
        out.weights[i] = _mm512_or_si512(lower, bits(upper, 2 * i - 4, 2 * i - 3, 0x10));
    }
    read_six_bits(b.scales, &out);
    return out;
}

inline Block read(const block_q6_K & b) {
    Block out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i packed = load_64(b.ql + i / 2 * 64), lower = i % 2 ? _mm512_srli_epi16(packed, 4) : packed;
        const __m512i upper = bits(load_32(b.qh + i / 2 * 32), i % 2 * 4 - 4, i % 2 * 4 - 2, 0x30);
        out.weights[i] = _mm512_or_si512(_mm512_and_si512(lower, bytes_of(0x0F)), upper);
    }
    const __m128i scales = load_16(b.scales);
    spread_words<16>(scales, &out);
    out.offsets = times(scales, 32);
    return out;
}

inline Block read(const block_iq4_xs & b) {
    Block out;
    const __m128i words = _mm_xor_si128(load_16(kvalues_iq4nl), _mm_set1_epi8(static_cast<char>(128)));
    const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), halves = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i twice = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(load_32(b.qs + i * 32)));
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi64(twice, halves), bytes_of(0x0F));
        out.weights[i] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(words), codes);
    }
    const __m128i low = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(0xF, b.scales_l));  // two in each
    const __m128i low_8 = _mm_and_si128(_mm_or_si128(low, _mm_slli_epi16(low, 4)), _mm_set1_epi8(0x0F));
    const __m128i stored = _mm_set1_epi16(static_cast<int16_t>(b.scales_h));
    const __m128i high = _mm_srlv_epi16(stored, _mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14));
    const __m128i high_8 = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi16(3)), 4);
    const __m128i scales = _mm_sub_epi8(_mm_or_si128(low_8, _mm_packus_epi16(high_8, high_8)), _mm_set1_epi8(32));
    spread(scales, &out);
    out.offsets = times(_mm_unpacklo_epi8(scales, scales), 128);
    return out;
}

// --- the product -------------------------------------------------------------------------------------------------------
constexpr int COLUMNS = 16;  // computed at once
constexpr int ROWS = 8;      // that they are multiplied with at once, at most

template <class B> constexpr bool HAS_MINIMA = false;  // scaled on their own
template <> constexpr bool HAS_MINIMA<block_q2_K> = true;
template <> constexpr bool HAS_MINIMA<block_q4_K> = true;
template <> constexpr bool HAS_MINIMA<block_q5_K> = true;

template <class B> constexpr bool FITS_WORDS = true;  // of 16 bits, the sum of four products
template <> constexpr bool FITS_WORDS<block_iq4_xs> = false;

// 16 sums, which all together are that of 256 products.
template <class B>
inline __m512i multiply(const Block & b, const int8_t * values) {
    __m512i four[4], sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        four[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), b.weights[i], _mm512_load_si512(values + 64 * i));
    }
    if constexpr (FITS_WORDS<B>) {
#pragma GCC unroll 4
        for (int i = 0; i < 2; ++i) {
            sum = _mm512_dpwssd_epi32(sum, _mm512_packs_epi32(four[2 * i], four[2 * i + 1]), b.scales[i]);
        }
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(four[i], b.scales[i]));
    }
    return sum;
}

// Lane i has the sum of the lanes of vector i, which are 16 or 8.
template <int LANES>
inline __m512i sums_of(const int32_t from[COLUMNS][LANES]) {
    const auto halved = [](__m512i a, __m512i b) {  // a in the left half
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    const auto two = [&](int i, int j) {
        if constexpr (LANES == 16) {
            return halved(_mm512_load_si512(from[i]), _mm512_load_si512(from[j]));
        } else {
            return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(from[i])), load_32(from[j]), 1);
        }
    };
    __m512i four[4];  // vectors, of which each has four lanes
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = halved(two(i, i + 4), two(i + 8, i + 12));
    const auto joined = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    return joined(joined(four[0], four[2]), joined(four[1], four[3]));
}

inline float to_float(ggml_half x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

// `n_columns` of weights (16 at most), `stride` blocks apart, times `n` rows (ROWS at most).
template <class B>
void multiply(const B * weights, int64_t stride, int n_columns, int n_blocks, const block_q8_K * const * rows, int n,
              float * const * out) {
    alignas(64) int8_t values[ROWS][QK_K];
    alignas(64) int32_t products[ROWS][COLUMNS][16], offsets[ROWS][COLUMNS][8];
    alignas(64) float d[COLUMNS], d_minima[COLUMNS];
    __m512 sums[ROWS];
    for (int row = 0; row < n; ++row) sums[row] = _mm512_setzero_ps();
    for (int b = 0; b < n_blocks; ++b) {
        for (int row = 0; row < n; ++row) std::memcpy(values[row], rows[row][b].qs, QK_K);
        for (int column = 0; column < COLUMNS; ++column) {
            const B & from = weights[std::min(column, n_columns - 1) * stride + b];
            for (size_t at = 0; at < sizeof from; at += 64) {  // the next sixteen columns would not be guessed in time
                _mm_prefetch(reinterpret_cast<const char *>(&from + COLUMNS * stride) + at, _MM_HINT_T0);
            }
            const Block block = read(from);
            if constexpr (HAS_MINIMA<B>) {
                d[column] = to_float(from.data.data.d);
                d_minima[column] = to_float(from.data.data.dmin);
            } else {
                d[column] = to_float(from.d);
            }
            for (int row = 0; row < n; ++row) {
                __m512i product = multiply<B>(block, values[row]);
                const __m256i offset = _mm256_madd_epi16(block.offsets, load_32(rows[row][b].bsums));
                if constexpr (HAS_MINIMA<B>) {
                    _mm256_store_si256(reinterpret_cast<__m256i *>(offsets[row][column]), offset);
                } else {
                    product = _mm512_sub_epi32(product, _mm512_zextsi256_si512(offset));
                }
                _mm512_store_si512(products[row][column], product);
            }
        }
        for (int row = 0; row < n; ++row) {  // tiled/tiled-kernel.cpp, the end of tiled_run_micro_vnni_8x16
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums_of<16>(products[row])), _mm512_load_ps(d));
            if constexpr (HAS_MINIMA<B>) {
                sum = _mm512_fnmadd_ps(_mm512_load_ps(d_minima), _mm512_cvtepi32_ps(sums_of<8>(offsets[row])), sum);
            }
            sums[row] = _mm512_add_ps(sums[row], _mm512_mul_ps(sum, _mm512_set1_ps(rows[row][b].d)));
        }
    }
    const auto are_there = static_cast<__mmask16>((1u << n_columns) - 1);
    for (int row = 0; row < n; ++row) _mm512_mask_storeu_ps(out[row], are_there, sums[row]);
}

// --- in ggml's operations ----------------------------------------------------------------------------------------------
constexpr int MANY = 32;  // rows: that a product of ours has less than, whatever the type of its weights

struct Product {  // of a matrix and a few rows
    const char * weights;
    size_t column_size;  // in bytes
    int n_blocks, n;
    const block_q8_K * rows[MANY];
    float * out[MANY];
};

template <class B>
void multiply_columns(const Product & p, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += COLUMNS) {
        const int n_columns = static_cast<int>(std::min<int64_t>(end - column, COLUMNS));
        const auto * weights = reinterpret_cast<const B *>(p.weights + column * p.column_size);
        float * out[MANY];
        for (int row = 0; row < p.n; ++row) out[row] = p.out[row] + column;
        for (int row = 0; row < p.n; row += ROWS) {
            const int n = std::min(p.n - row, ROWS);
            multiply(weights, p.column_size / sizeof(B), n_columns, p.n_blocks, p.rows + row, n, out + row);
        }
    }
}

struct Kernel {
    decltype(&multiply_columns<block_q6_K>) multiply;
    int64_t many;  // rows, from which on ggml's tiled product is faster (bench/RESULTS.md); at most MANY
};

Kernel kernel_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q2_K: return {multiply_columns<block_q2_K>, 16};
        case GGML_TYPE_Q3_K: return {multiply_columns<block_q3_K>, 32};
        case GGML_TYPE_Q4_K: return {multiply_columns<block_q4_K>, 16};
        case GGML_TYPE_Q5_K: return {multiply_columns<block_q5_K>, 16};
        case GGML_TYPE_Q6_K: return {multiply_columns<block_q6_K>, 32};
        case GGML_TYPE_IQ4_XS: return {multiply_columns<block_iq4_xs>, 12};
        default: return {nullptr, 0};
    }
}

bool is_ours(const ggml_compute_params * params, ggml_tensor * dst, int64_t n) {
    const bool is_tiled = ggml_tiled_wdata_size(1, dst) > 0;  // not switched off, and not repacked
    return n < kernel_of(dst->src[0]->type).many && is_tiled && !params->use_ref && dst->src[1]->type == GGML_TYPE_F32;
}

Product product(const ggml_tensor * weights, int64_t n) {
    Product p{};
    p.weights = static_cast<const char *>(weights->data);
    p.column_size = weights->nb[1];
    p.n_blocks = static_cast<int>(weights->ne[0] / QK_K);
    p.n = static_cast<int>(n);
    return p;
}

// All rows as blocks of bytes, one after the other, into params->wdata: this thread's part of each.
void quantise(const ggml_compute_params * params, const ggml_tensor * rows) {
    const auto from_floats = ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float;
    const int64_t n_blocks = rows->ne[0] / QK_K;
    const int64_t begin = n_blocks * params->ith / params->nth, end = n_blocks * (params->ith + 1) / params->nth;
    auto * out = static_cast<block_q8_K *>(params->wdata);
    for (int64_t row = 0; row < ggml_nrows(rows); ++row, out += n_blocks) {
        const int64_t i1 = row % rows->ne[1], i23 = row / rows->ne[1], i2 = i23 % rows->ne[2], i3 = i23 / rows->ne[2];
        const size_t at = i1 * rows->nb[1] + i2 * rows->nb[2] + i3 * rows->nb[3];
        const char * from = static_cast<const char *>(rows->data) + at;
        from_floats(reinterpret_cast<const float *>(from) + begin * QK_K, out + begin, (end - begin) * QK_K);
    }
}

}  // namespace

// What tiled/tiled.h says.
extern "C" bool ggml_compute_forward_mul_mat_tiled(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *weights = dst->src[0], *rows = dst->src[1];
    if (!is_ours(params, dst, rows->ne[1])) return tea_upstream_mul_mat_tiled(params, dst);
    quantise(params, rows);
    if (params->ith == 0) ggml_threadpool_chunk_set(params->threadpool, params->nth);
    ggml_barrier(params->threadpool);

    const int64_t n_columns = weights->ne[1];
    const int64_t share = n_columns < 16 * COLUMNS * params->nth ? COLUMNS : 4 * COLUMNS;  // taken by a thread at once
    Product p = product(weights, rows->ne[1]);
    for (int64_t begin = params->ith * share; begin < n_columns;
         begin = ggml_threadpool_chunk_add(params->threadpool, 1) * share) {
        for (int64_t i3 = 0; i3 < rows->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < rows->ne[2]; ++i2) {
                const int64_t i02 = i2 / (rows->ne[2] / weights->ne[2]), i03 = i3 / (rows->ne[3] / weights->ne[3]);
                p.weights = static_cast<const char *>(weights->data) + i02 * weights->nb[2] + i03 * weights->nb[3];
                for (int i1 = 0; i1 < p.n; ++i1) {
                    const int64_t row = (i3 * rows->ne[2] + i2) * p.n + i1;
                    p.rows[i1] = static_cast<const block_q8_K *>(params->wdata) + row * p.n_blocks;
                    char * out = static_cast<char *>(dst->data) + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3];
                    p.out[i1] = reinterpret_cast<float *>(out);
                }
                kernel_of(weights->type).multiply(p, begin, std::min(begin + share, n_columns));
            }
        }
    }
    return true;
}

// Likewise; the rows are in params->wdata as blocks of bytes. `expert_rows` has pairs: which of a row's experts this is,
// and which row.
extern "C" bool ggml_compute_forward_mul_mat_id_tiled(
    const ggml_compute_params * params, ggml_tensor * dst, int64_t cur_a, int64_t cne1, const int32_t * expert_rows,
    char * scratch) {
    if (!is_ours(params, dst, cne1)) return tea_upstream_mul_mat_id_tiled(params, dst, cur_a, cne1, expert_rows, scratch);
    const ggml_tensor *weights = dst->src[0], *rows = dst->src[1];
    Product p = product(weights, cne1);
    p.weights += cur_a * weights->nb[2];
    for (int i = 0; i < p.n; ++i) {
        const int64_t i1 = expert_rows[2 * i], i2 = expert_rows[2 * i + 1];
        const int64_t row = i2 * rows->ne[1] + i1 % rows->ne[1];
        p.rows[i] = static_cast<const block_q8_K *>(params->wdata) + row * p.n_blocks;
        p.out[i] = reinterpret_cast<float *>(static_cast<char *>(dst->data) + i1 * dst->nb[1] + i2 * dst->nb[2]);
    }
    const int64_t n_shares = (weights->ne[1] + COLUMNS - 1) / COLUMNS;
    const int64_t begin = n_shares * params->ith / params->nth * COLUMNS;
    const int64_t end = std::min(n_shares * (params->ith + 1) / params->nth * COLUMNS, weights->ne[1]);
    kernel_of(weights->type).multiply(p, begin, end);
    return true;
}

// Asked by repack.cpp, which has a layout of Q2_K for AVX-512: its products are slower than these, for one row and many.
extern "C" int tea_repacks_q2_K() { return false; }

#else

extern "C" int tea_repacks_q2_K() { return ggml_cpu_has_avx512(); }

extern "C" bool ggml_compute_forward_mul_mat_tiled(const ggml_compute_params * params, ggml_tensor * dst) {
    return tea_upstream_mul_mat_tiled(params, dst);
}

extern "C" bool ggml_compute_forward_mul_mat_id_tiled(
    const ggml_compute_params * params, ggml_tensor * dst, int64_t cur_a, int64_t cne1, const int32_t * expert_rows,
    char * scratch) {
    return tea_upstream_mul_mat_id_tiled(params, dst, cur_a, cne1, expert_rows, scratch);
}

#endif
