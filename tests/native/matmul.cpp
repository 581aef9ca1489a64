// Products of our own (src/matmul.cpp, src/few_rows.cpp) are ggml's, to the last bit; and a row's product is the same bits
// whatever rows it is computed with, for weights of every type that docs/architecture.md promises it for.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define GGML_COMMON_DECL_CPP
#include "ggml-alloc.h"
#include "ggml-backend.h"
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

// --- any number of rows ------------------------------------------------------------------------------------------------
constexpr int MOST_ROWS = 41;
constexpr int EXPERTS = 3, USED = 2;  // of them by each row

struct Freed {
    void operator()(ggml_context * x) const { ggml_free(x); }
    void operator()(ggml_backend * x) const { ggml_backend_free(x); }
    void operator()(ggml_backend_buffer * x) const { ggml_backend_buffer_free(x); }
};
template <class T> using Owned = std::unique_ptr<T, Freed>;

Owned<ggml_context> new_context() { return Owned<ggml_context>(ggml_init({1 << 20, nullptr, true})); }

Floats normal(size_t n, float scale, std::mt19937 & random) {
    std::normal_distribution<float> draw(0.0f, scale);
    Floats out(n);
    for (float & x : out) x = draw(random);
    return out;
}

// Weights as a model has them: a matrix, or one for each expert.
struct Weights {
    ggml_type type;
    int n, n_columns, n_experts;
    Bytes bytes;
    Owned<ggml_context> context = new_context();
    ggml_tensor * tensor;
    Owned<ggml_backend_buffer> buffer;

    Weights(ggml_type of, int length, int columns, int experts, ggml_backend_buffer_type_t kind, std::mt19937 & random)
        : type(of), n(length), n_columns(columns), n_experts(experts), bytes(ggml_row_size(of, length) * columns * experts),
          tensor(ggml_new_tensor_3d(context.get(), of, length, columns, experts)),
          buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), kind)) {
        if (!is_taken()) return;
        const Floats values = normal(static_cast<size_t>(n) * columns * experts, 0.05f, random), as_important(n, 1.0f);
        ggml_quantize_chunk(type, values.data(), bytes.data(), 0, columns * experts, n, as_important.data());
        ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
    }

    // Not every type and shape is repacked.
    bool is_taken() const {
        return ggml_backend_buffer_get_type(buffer.get()) == ggml_backend_cpu_buffer_type() || tensor->extra != nullptr;
    }

    // From ggml's product of one column and one row, however it adds up.
    float product(int column, const float * row) const {
        const auto * traits = ggml_get_type_traits_cpu(type);
        const auto * row_traits = ggml_get_type_traits_cpu(traits->vec_dot_type);
        Bytes converted(ggml_row_size(traits->vec_dot_type, n));
        if (traits->vec_dot_type == GGML_TYPE_F32) std::memcpy(converted.data(), row, converted.size());
        else row_traits->from_float(row, converted.data(), n);
        float out;
        traits->vec_dot(n, &out, 0, bytes.data() + column * ggml_row_size(type, n), 0, converted.data(), 0, 1);
        return out;
    }
};

// The results for `n_rows` from `first` on: of MUL_MAT, or of MUL_MAT_ID where there are experts.
Floats results(ggml_backend * cpu, const Weights & weights, const Floats & rows, int first, int n_rows) {
    const Owned<ggml_context> context = new_context();
    const bool routed = weights.n_experts > 1;
    ggml_tensor * x = routed ? ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, weights.n, 1, n_rows)
                             : ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, weights.n, n_rows);
    ggml_tensor * ids = routed ? ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, USED, n_rows) : nullptr;
    ggml_tensor * y = routed ? ggml_mul_mat_id(context.get(), weights.tensor, x, ids)
                             : ggml_mul_mat(context.get(), weights.tensor, x);
    ggml_cgraph * graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, y);
    const Owned<ggml_backend_buffer> buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    ggml_backend_tensor_set(x, rows.data() + static_cast<size_t>(first) * weights.n, 0, ggml_nbytes(x));
    std::vector<int32_t> experts;
    for (int row = first; routed && row < first + n_rows; ++row) {
        for (int i = 0; i < USED; ++i) experts.push_back((row / 3 + i) % EXPERTS);
    }
    if (routed) ggml_backend_tensor_set(ids, experts.data(), 0, ggml_nbytes(ids));
    ggml_backend_graph_compute(cpu, graph);
    Floats out(ggml_nelements(y));
    ggml_backend_tensor_get(y, out.data(), 0, ggml_nbytes(y));
    return out;
}

void check_any_rows(ggml_backend * cpu, const Weights & weights, std::mt19937 & random) {
    const Floats rows = normal(static_cast<size_t>(MOST_ROWS) * weights.n, 1.0f, random);
    const char * name = ggml_type_name(weights.type);
    Floats alone;
    for (int row = 0; row < MOST_ROWS; ++row) {
        const Floats one = results(cpu, weights, rows, row, 1);
        alone.insert(alone.end(), one.begin(), one.end());
    }
    for (int row = 0; weights.n_experts == 1 && row < MOST_ROWS; ++row) {
        for (int column = 0; column < weights.n_columns; ++column) {
            const float expected = weights.product(column, rows.data() + static_cast<size_t>(row) * weights.n);
            if (std::abs(alone[row * weights.n_columns + column] - expected) < 1e-4f) continue;
            std::printf("%s: %d columns of length %d: wrong\n", name, weights.n_columns, weights.n);
            std::exit(1);
        }
    }
    for (const int n_rows : {2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 31, 32, 33, MOST_ROWS}) {
        const Floats together = results(cpu, weights, rows, 0, n_rows);
        if (std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0) continue;
        std::printf("%s: %d columns of length %d, %d experts: %d rows have other bits than one\n", name, weights.n_columns,
                    weights.n, weights.n_experts, n_rows);
        std::exit(1);
    }
}

void check_any_rows(std::mt19937 & random) {
    constexpr ggml_type types[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0,  GGML_TYPE_Q5_1,
        GGML_TYPE_Q8_0, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,   GGML_TYPE_Q6_K,  GGML_TYPE_IQ4_NL,
        GGML_TYPE_IQ4_XS, GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0, GGML_TYPE_MXFP4, GGML_TYPE_NVFP4,
    };
    const Owned<ggml_backend> cpu(ggml_backend_cpu_init());
    for (const ggml_type type : types) {
        const bool in_blocks_of_256 = ggml_blck_size(type) == QK_K;
        for (const int n : {in_blocks_of_256 ? 256 : 64, in_blocks_of_256 ? 768 : 448}) {
            for (const int n_columns : {1, 16, 40, 133}) {
                for (const int n_experts : {1, EXPERTS}) {
                    for (const auto kind : {ggml_backend_cpu_buffer_type(), ggml_backend_cpu_repack_buffer_type()}) {
                        const Weights weights(type, n, n_columns, n_experts, kind, random);
                        for (int n_threads = 1; weights.is_taken() && n_threads <= 2; ++n_threads) {
                            ggml_backend_cpu_set_n_threads(cpu.get(), n_threads);
                            check_any_rows(cpu.get(), weights, random);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
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
    check_any_rows(random);
    std::puts("all right");
}
