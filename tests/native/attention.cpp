// Attention of our own (src/attention.cpp), one operation at a time: next to plain sums in double precision, and to
// itself, bit by bit, whoever else is in the batch. Exits with 1 and says what was wrong.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

using Indices = std::vector<int64_t>;

struct Shape {
    const char * what;
    int64_t dk = 64, dv = 64, n_groups = 2, group = 4, n_cells = 200, n_tokens = 40, n_streams = 1;
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    int64_t n_texts = 3;
    float softcap = 0, max_bias = 0, mask_bias = 0;
    bool sinks = false, one_mask = false;
    int n_threads = 2;
};

int64_t n_heads(const Shape & s) { return s.n_groups * s.group; }
bool is_left_to_ggml(const Shape & s) { return s.max_bias != 0 || s.group > 64; }

struct Problem {
    Shape shape;
    std::vector<float> q;                 // [stream][token][head][dk]
    std::vector<uint8_t> k, v;            // [stream][cell][key head], as the cache holds them
    std::vector<float> k_exact, v_exact;  // the same as floats
    std::vector<float> mask;              // [stream][token][cell]: 0 or a bias, or -inf
    std::vector<float> sinks;             // [head]

    const float * mask_of(int64_t stream, int64_t token) const {
        return &mask[(stream * shape.n_tokens + token) * shape.n_cells];
    }
};

// Random rows of n numbers in `type`, and what they are exactly.
void fill_rows(ggml_type type, int64_t n, int64_t n_rows, std::mt19937 & random, std::vector<uint8_t> & rows,
               std::vector<float> & exact) {
    std::normal_distribution<float> normal;
    exact.resize(n * n_rows);
    for (auto & x : exact) x = normal(random);
    rows.resize(ggml_row_size(type, n) * n_rows);
    if (type == GGML_TYPE_F32) {
        std::memcpy(rows.data(), exact.data(), rows.size());
        return;
    }
    ggml_quantize_chunk(type, exact.data(), rows.data(), 0, n_rows, n, nullptr);
    const auto to_float = ggml_get_type_traits(type)->to_float;
    for (int64_t r = 0; r < n_rows; ++r) to_float(rows.data() + r * ggml_row_size(type, n), &exact[r * n], n);
}

// Texts lie in the cells as they came: side by side, with holes, cell after cell or all mixed up. Of each, some tokens
// that follow each other are asked for. The last token sees nothing at all.
void fill_mask(Problem & p, std::mt19937 & random) {
    const Shape & s = p.shape;
    p.mask.assign(s.n_streams * s.n_tokens * s.n_cells, -INFINITY);
    const auto one_of = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        std::vector<Indices> cells_of(s.n_texts);
        for (int64_t cell = 0; cell < s.n_cells; ++cell) {
            if (const int64_t text = one_of(s.n_texts * 8 + 1); text < s.n_texts * 8) cells_of[text / 8].push_back(cell);
        }
        for (int64_t text = 1; text < s.n_texts; text += 3) std::shuffle(cells_of[text].begin(), cells_of[text].end(), random);
        const int64_t n_seeing = s.n_tokens > 1 ? s.n_tokens - 1 : 1;
        for (int64_t token = 0; token < n_seeing; ++token) {
            const int64_t text = token * s.n_texts / n_seeing;
            const int64_t n_after = (text + 1) * n_seeing / s.n_texts - 1 - token;  // about how many follow it
            const auto & cells = cells_of[text];
            const int64_t n = std::clamp<int64_t>(cells.size() - n_after, std::min<int64_t>(1, cells.size()), cells.size());
            float * mask = &p.mask[(stream * s.n_tokens + token) * s.n_cells];
            for (int64_t i = 0; i < n; ++i) mask[cells[i]] = s.mask_bias * ((cells[i] + token) % 3);
        }
        if (s.one_mask && stream > 0) std::copy_n(p.mask.begin(), s.n_tokens * s.n_cells, &p.mask[stream * s.n_tokens * s.n_cells]);
    }
}

Problem make(const Shape & s) {
    std::mt19937 random(static_cast<uint32_t>(s.dk * 1000003 + s.dv * 1009 + s.n_tokens * 31 + s.n_cells));
    std::normal_distribution<float> normal;
    Problem p{s, {}, {}, {}, {}, {}, {}, {}};
    p.q.resize(s.n_streams * s.n_tokens * n_heads(s) * s.dk);
    for (auto & x : p.q) x = normal(random);
    fill_rows(s.k_type, s.dk, s.n_streams * s.n_cells * s.n_groups, random, p.k, p.k_exact);
    fill_rows(s.v_type, s.dv, s.n_streams * s.n_cells * s.n_groups, random, p.v, p.v_exact);
    fill_mask(p, random);
    if (s.sinks) p.sinks.resize(n_heads(s));
    for (auto & x : p.sinks) x = normal(random);
    return p;
}

float slope_of(const Shape & s, int64_t head) {
    if (s.max_bias == 0) return 1;
    const auto n_log2 = static_cast<int64_t>(std::exp2(std::floor(std::log2(n_heads(s)))));
    return head < n_log2 ? std::exp2(-s.max_bias / n_log2 * (head + 1))
                         : std::exp2(-s.max_bias / 2 / n_log2 * (2 * (head - n_log2) + 1));
}

// What attention is: [stream][token][head][dv].
std::vector<double> plain_sums(const Problem & p) {
    const Shape & s = p.shape;
    std::vector<double> out, weights(s.n_cells), values(s.dv);
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            for (int64_t head = 0; head < n_heads(s); ++head) {
                const float * mask = p.mask_of(stream, token);
                const float * q = &p.q[((stream * s.n_tokens + token) * n_heads(s) + head) * s.dk];
                const auto row_of = [&](int64_t cell) { return (stream * s.n_cells + cell) * s.n_groups + head / s.group; };
                double total = s.sinks ? std::exp(static_cast<double>(p.sinks[head])) : 0;
                std::fill(values.begin(), values.end(), 0.0);
                for (int64_t cell = 0; cell < s.n_cells; ++cell) {
                    if (mask[cell] == -INFINITY) continue;
                    double score = 0;
                    for (int64_t i = 0; i < s.dk; ++i) score += static_cast<double>(q[i]) * p.k_exact[row_of(cell) * s.dk + i];
                    score /= std::sqrt(static_cast<double>(s.dk));
                    if (s.softcap != 0) score = s.softcap * std::tanh(score / s.softcap);
                    const double weight = std::exp(score + slope_of(s, head) * mask[cell]);
                    total += weight;
                    for (int64_t i = 0; i < s.dv; ++i) values[i] += weight * p.v_exact[row_of(cell) * s.dv + i];
                }
                for (const double value : values) out.push_back(total == 0 ? 0 : value / total);
            }
        }
    }
    return out;
}

// Keys or values as llama.cpp hands them over: a view into a wider cache, its heads and cells exchanged. What belongs to
// nobody is NaN, so that a sum that takes it in shows.
ggml_tensor * cache_of(ggml_context * ctx, const Shape & s, ggml_type type, int64_t n, const std::vector<uint8_t> & rows,
                       const std::vector<bool> & is_seen, const Indices & cells) {
    const auto n_cells = static_cast<int64_t>(cells.size());
    const size_t head_size = ggml_row_size(type, n), row_size = head_size * s.n_groups;
    ggml_tensor * cache = ggml_new_tensor_3d(ctx, type, n * (s.n_groups + 1), n_cells, s.n_streams);
    std::memset(cache->data, 0xFF, ggml_nbytes(cache));
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t i = 0; i < n_cells; ++i) {
            const int64_t cell = stream * s.n_cells + cells[i];
            if (!is_seen[cell]) continue;
            std::memcpy(static_cast<char *>(cache->data) + stream * cache->nb[2] + i * cache->nb[1], &rows[cell * row_size], row_size);
        }
    }
    ggml_tensor * view = ggml_view_4d(ctx, cache, n, s.n_groups, n_cells, s.n_streams, head_size, cache->nb[1], cache->nb[2], 0);
    return ggml_permute(ctx, view, 0, 2, 1, 3);
}

// What the operation makes of some of the tokens and cells: [stream][token][head][dv].
std::vector<float> compute(const Problem & p, const Indices & tokens, const Indices & cells, int n_threads) {
    const Shape & s = p.shape;
    const auto n_tokens = static_cast<int64_t>(tokens.size()), n_cells = static_cast<int64_t>(cells.size());
    const size_t n_bytes = (16 << 20) + 2 * (p.k.size() + p.v.size()) + 4 * s.n_streams * n_tokens * (n_heads(s) + 1) * (s.dk + s.dv) +
                           2 * s.n_streams * n_tokens * n_cells;
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(ggml_init({n_bytes, nullptr, false}), ggml_free);
    ggml_context * ctx = owner.get();

    std::vector<bool> is_seen(s.n_streams * s.n_cells, is_left_to_ggml(s));  // ggml's own takes in what is hidden
    for (size_t i = 0; i < p.mask.size(); ++i) {
        if (p.mask[i] != -INFINITY) is_seen[i / (s.n_tokens * s.n_cells) * s.n_cells + i % s.n_cells] = true;
    }
    ggml_tensor * k = cache_of(ctx, s, s.k_type, s.dk, p.k, is_seen, cells);
    ggml_tensor * v = cache_of(ctx, s, s.v_type, s.dv, p.v, is_seen, cells);
    ggml_tensor * wide = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.dk, n_heads(s) + 1, n_tokens, s.n_streams);
    std::memset(wide->data, 0xFF, ggml_nbytes(wide));
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_cells, n_tokens, 1, s.one_mask ? 1 : s.n_streams);
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t i = 0; i < n_tokens; ++i) {
            std::memcpy(static_cast<char *>(wide->data) + stream * wide->nb[3] + i * wide->nb[2],
                        &p.q[(stream * s.n_tokens + tokens[i]) * n_heads(s) * s.dk], n_heads(s) * s.dk * sizeof(float));
            if (stream >= mask->ne[3]) continue;
            auto * row = reinterpret_cast<ggml_fp16_t *>(static_cast<char *>(mask->data) + stream * mask->nb[3] + i * mask->nb[1]);
            for (int64_t j = 0; j < n_cells; ++j) row[j] = ggml_fp32_to_fp16(p.mask_of(stream, tokens[i])[cells[j]]);
        }
    }
    ggml_tensor * q = ggml_view_4d(ctx, wide, s.dk, n_heads(s), n_tokens, s.n_streams, wide->nb[1], wide->nb[2], wide->nb[3], 0);
    const float scale = 1 / std::sqrt(static_cast<float>(s.dk));
    ggml_tensor * out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, mask, scale, s.max_bias, s.softcap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    if (s.sinks) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_heads(s));
        std::memcpy(sinks->data, p.sinks.data(), ggml_nbytes(sinks));
        ggml_flash_attn_ext_add_sinks(out, sinks);
    }
    std::memset(out->data, 0xFF, ggml_nbytes(out));
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    const auto * begin = static_cast<const float *>(out->data);
    return {begin, begin + ggml_nelements(out)};
}

Indices up_to(int64_t n) {
    Indices all(n);
    std::iota(all.begin(), all.end(), 0);
    return all;
}

int n_failed = 0;

void fail(const Shape & s, const std::string & why) {
    ++n_failed;
    std::printf("FAILED: %s (dk %d, dv %d, %d x %d heads, %d cells, %d tokens, %d streams, %s/%s): %s\n", s.what, int(s.dk),
                int(s.dv), int(s.n_groups), int(s.group), int(s.n_cells), int(s.n_tokens), int(s.n_streams),
                ggml_type_name(s.k_type), ggml_type_name(s.v_type), why.c_str());
}

// How far the numbers are from plain sums, at most.
void check_sums(const Problem & p, const std::vector<float> & found) {
    const Shape & s = p.shape;
    const std::vector<double> expected = plain_sums(p);
    double worst = expected.size() == found.size() ? 0 : INFINITY;
    for (size_t i = 0; i < expected.size() && worst < INFINITY; ++i) {
        const double error = std::abs(expected[i] - found[i]);
        worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
    const double allowed = is_left_to_ggml(s) ? 2e-2 : 2e-5;  // ggml's own adds up in F16
    if (!(worst <= allowed)) fail(s, "off by " + std::to_string(worst));
}

// Some tokens of `whole`, computed in another company, have the same bits.
void check_bits(const Problem & p, const std::vector<float> & whole, const Indices & tokens, const Indices & cells,
                int n_threads, const char * how) {
    const Shape & s = p.shape;
    const std::vector<float> found = compute(p, tokens, cells, n_threads);
    const int64_t n = n_heads(s) * s.dv;
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (size_t i = 0; i < tokens.size(); ++i) {
            const float * a = &found[(stream * tokens.size() + i) * n];
            const float * b = &whole[(stream * s.n_tokens + tokens[i]) * n];
            if (std::memcmp(a, b, n * sizeof(float)) == 0) continue;
            return fail(s, "token " + std::to_string(tokens[i]) + " has other bits " + how + ", by " +
                               std::to_string(n_threads) + " threads");
        }
    }
}

void check_company(const Problem & p, const std::vector<float> & whole) {
    const Shape & s = p.shape;
    const Indices all = up_to(s.n_tokens), cells = up_to(s.n_cells);
    std::mt19937 random(7);
    // Threads without a CPU of their own hold up the others: more than two only here.
    for (int n_threads = 1; n_threads <= 4; ++n_threads) check_bits(p, whole, all, cells, n_threads, "in the same batch");
    for (int64_t token = 0; token < s.n_tokens; token += 1 + s.n_tokens / 7) {
        for (int n_threads = 1; n_threads <= 2; ++n_threads) check_bits(p, whole, {token}, cells, n_threads, "alone");
        if (s.n_streams > 1) continue;
        Indices own;
        for (int64_t cell : cells) {
            if (p.mask_of(0, token)[cell] != -INFINITY) own.push_back(cell);
        }
        if (!own.empty()) check_bits(p, whole, {token}, own, 1, "alone, without the others' cells");
    }
    for (int i = 0; i < 4; ++i) {
        Indices some = all;
        std::shuffle(some.begin(), some.end(), random);
        some.resize(1 + random() % some.size());
        check_bits(p, whole, some, cells, 1 + i % 2, "in a batch of others, in another order");
        std::sort(some.begin(), some.end());
        check_bits(p, whole, some, cells, 1 + i % 2, "in a batch of others");
    }
    for (const int64_t n : {2, 7, 16, 33}) {
        for (int64_t first = 0; first < s.n_tokens; first += n) {
            const Indices some(all.begin() + first, all.begin() + std::min(first + n, s.n_tokens));
            check_bits(p, whole, some, cells, 1, "in a part of the batch");
        }
    }
}

std::vector<Shape> shapes() {
    std::vector<Shape> all;
    const auto add = [&](const char * what, const auto & change) {
        Shape s{what};
        change(s);
        all.push_back(s);
    };
    for (const int64_t size : {8, 16, 17, 33, 40, 64, 80, 96, 100, 128, 160, 192, 256}) {
        add("a head size", [&](Shape & s) { s.dk = s.dv = size; });
    }
    add("values shorter than keys", [](Shape & s) { s.dk = 192; s.dv = 128; });
    add("values longer than keys", [](Shape & s) { s.dk = 24; s.dv = 72; });
    add("values as multi-head latent attention has them", [](Shape & s) { s.dk = 576; s.dv = 512; s.n_groups = 1; s.group = 16; });
    for (const int64_t group : {1, 2, 3, 5, 7, 8, 12, 16, 64}) {
        add("heads that share keys", [&](Shape & s) { s.group = group; s.dk = s.dv = 32; });
    }
    add("more heads to a key than fit in", [](Shape & s) { s.group = 65; s.dk = s.dv = 16; s.n_groups = 1; });
    for (const auto [k, v] : {std::pair{GGML_TYPE_F32, GGML_TYPE_F32}, {GGML_TYPE_BF16, GGML_TYPE_BF16}, {GGML_TYPE_Q8_0, GGML_TYPE_Q8_0},
                              {GGML_TYPE_Q8_0, GGML_TYPE_F16}, {GGML_TYPE_F16, GGML_TYPE_Q8_0}, {GGML_TYPE_Q4_0, GGML_TYPE_Q4_0}}) {
        add("a type", [k = k, v = v](Shape & s) { s.k_type = k; s.v_type = v; });
    }
    for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 200}) {
        add("a number of tokens", [&](Shape & s) { s.n_tokens = n; s.dk = s.dv = 32; s.n_cells = 300; });
    }
    for (const int64_t n : {1, 63, 64, 65, 256}) {
        add("a number of cells", [&](Shape & s) { s.n_cells = n; s.n_texts = 1; s.n_tokens = 9; });
    }
    add("many texts", [](Shape & s) { s.n_texts = 16; s.n_tokens = 33; s.n_cells = 700; });
    for (int n_threads = 1; n_threads <= 4; ++n_threads) {
        for (const int64_t n_tokens : {1, 3}) {
            add("a long text", [&](Shape & s) {
                s.n_cells = 5000; s.n_texts = 1; s.n_tokens = n_tokens; s.n_threads = n_threads;
            });
        }
    }
    add("more than the work memory holds", [](Shape & s) { s.n_cells = 40000; s.n_texts = 1; s.n_tokens = 1; s.dk = s.dv = 16; });
    add("capped scores", [](Shape & s) { s.softcap = 3; });
    add("sinks", [](Shape & s) { s.sinks = true; });
    add("sinks and a long text", [](Shape & s) { s.sinks = true; s.n_cells = 3000; s.n_texts = 1; s.n_tokens = 1; });
    add("streams", [](Shape & s) { s.n_streams = 3; });
    add("streams of one token", [](Shape & s) { s.n_streams = 4; s.n_tokens = 1; s.n_texts = 1; s.n_cells = 1500; });
    add("streams under one mask", [](Shape & s) { s.n_streams = 2; s.one_mask = true; });
    add("a mask that is more than yes or no", [](Shape & s) { s.mask_bias = -0.5; });
    add("ALiBi, left to ggml", [](Shape & s) { s.max_bias = 8; s.mask_bias = -1; });
    return all;
}

}  // namespace

int main() {
    for (const Shape & shape : shapes()) {
        const Problem p = make(shape);
        const std::vector<float> whole = compute(p, up_to(shape.n_tokens), up_to(shape.n_cells), shape.n_threads);
        check_sums(p, whole);
        if (!is_left_to_ggml(shape)) check_company(p, whole);
    }
    std::printf(n_failed ? "%d checks failed\n" : "all right\n", n_failed);
    return n_failed > 0;
}
