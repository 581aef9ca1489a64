// How fast a matrix of weights is multiplied with 1 to 128 rows, by type: thousand million products a second.
//   cmake --build build/native/plain --target native_products && build/native/plain/native_products [THREADS [LENGTH COLUMNS]]
// after ci/test-native; in a build with TEA_LLM_KERNELS=OFF it measures ggml's own kernels.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "repack.h"

namespace {

constexpr ggml_type TYPES[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0,   GGML_TYPE_IQ4_NL,
    GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS,
};
constexpr int N_ROWS[] = {1, 2, 4, 7, 8, 16, 32, 128};

struct Freed {
    void operator()(ggml_context * x) const { ggml_free(x); }
    void operator()(ggml_backend * x) const { ggml_backend_free(x); }
    void operator()(ggml_backend_buffer * x) const { ggml_backend_buffer_free(x); }
};
template <class T> using Owned = std::unique_ptr<T, Freed>;

Owned<ggml_context> new_context() { return Owned<ggml_context>(ggml_init({1 << 20, nullptr, true})); }

// The best of many runs, in seconds.
double seconds(ggml_backend * cpu, ggml_tensor * weights, int n_rows) {
    const Owned<ggml_context> context = new_context();
    ggml_tensor * x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, weights->ne[0], n_rows);
    ggml_cgraph * graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, ggml_mul_mat(context.get(), weights, x));
    const Owned<ggml_backend_buffer> buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    const std::vector<float> ones(ggml_nelements(x), 1.0f);
    ggml_backend_tensor_set(x, ones.data(), 0, ggml_nbytes(x));
    double best = 1e9, all = 0;
    for (int run = 0; run < 5 || all < 0.1; ++run) {
        const auto begin = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(cpu, graph);
        const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        best = std::min(best, taken);
        all += taken;
    }
    return best;
}

}  // namespace

int main(int argc, char ** argv) {
    const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const int length = argc > 3 ? std::atoi(argv[2]) : 1024, n_columns = argc > 3 ? std::atoi(argv[3]) : 2048;
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const Owned<ggml_backend> cpu(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(cpu.get(), n_threads);

    std::mt19937 random(1);
    std::uniform_real_distribution<float> draw(-0.1f, 0.1f);
    std::vector<float> values(static_cast<size_t>(length) * n_columns);
    for (float & value : values) value = draw(random);

    std::printf("rows    ");
    for (const int n_rows : N_ROWS) std::printf("%7d", n_rows);
    for (const ggml_type type : TYPES) {
        std::vector<uint8_t> bytes(ggml_row_size(type, length) * n_columns);
        ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_columns, length, nullptr);
        std::printf("\n%-8s", ggml_type_name(type));
        // As models have them: interleaved, where ggml does that with the type.
        for (auto * kind : {ggml_backend_cpu_repack_buffer_type(), ggml_backend_cpu_buffer_type()}) {
            const Owned<ggml_context> context = new_context();
            ggml_tensor * weights = ggml_new_tensor_2d(context.get(), type, length, n_columns);
            const Owned<ggml_backend_buffer> buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), kind));
            if (kind == ggml_backend_cpu_repack_buffer_type() && weights->extra == nullptr) continue;
            ggml_backend_tensor_set(weights, bytes.data(), 0, bytes.size());
            for (const int n_rows : N_ROWS) {
                const double products = static_cast<double>(length) * n_columns * n_rows;
                std::printf("%7.1f", products / seconds(cpu.get(), weights, n_rows) / 1e9);
                std::fflush(stdout);
            }
            break;
        }
    }
    std::puts("");
}
