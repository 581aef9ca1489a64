// Attention on a CPU for many texts in one KV cache. Compiled into ggml-cpu in place of its own flash attention, which
// remains behind the name below for what this one leaves out (CMakeLists.txt).
//
// ggml's looks at every cell for every query head, and takes another way through the numbers as the batch grows, so that
// a text's logits depend on who else is in the batch. Here
// - the cells that a token sees are listed once for all heads: cells of other texts cost next to nothing;
// - query heads that share a key head are computed together: keys and values are converted once for all of them;
// - a token's sums run over its own cells in the order of its text, wherever they lie (cell_order.hpp), in blocks counted
//   from the first one. They are the same bits whoever else is in the batch, however many threads there are, and whether
//   the token was part of a prompt or came alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "llama-kv-cells.h"
#include "ops.h"
#include "simd-mappings.h"
#include "vec.h"

extern "C" void tea_upstream_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst);

namespace {

constexpr int64_t BLOCK = 64;      // cells computed at once
constexpr int64_t SPAN = 1024;     // cells whose sums are independent of others, so that threads may share a long text
constexpr int64_t ROWS = 64;       // query rows (tokens times heads) computed at once
constexpr int64_t ROW_STEP = 4;    // rows in registers
#if defined(__AVX512F__)
constexpr int64_t LANES = 32;      // columns in registers
#else
constexpr int64_t LANES = 16;
#endif

constexpr uint16_t HIDDEN = 0xFC00;  // -inf as F16

struct Attention {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    ggml_tensor * dst;
    const llama_kv_cells * places;  // of the cells in their texts; null if they are as they lie
    int64_t dk, dv, n_tokens, n_heads, n_cells, n_streams;
    int64_t dv_padded;        // to whole registers
    int64_t n_groups, group;  // key heads, and query heads to each
    float scale, softcap;

    explicit Attention(ggml_tensor * to)
        : q(to->src[0]), k(to->src[1]), v(to->src[2]), mask(to->src[3]), sinks(to->src[4]), dst(to),
          places(k->view_src ? static_cast<const llama_kv_cells *>(k->view_src->extra) : nullptr), dk(k->ne[0]),
          dv(v->ne[0]), n_tokens(q->ne[1]), n_heads(q->ne[2]), n_cells(k->ne[1]), n_streams(q->ne[3]),
          dv_padded((dv + LANES - 1) / LANES * LANES), n_groups(k->ne[2]), group(n_heads / n_groups) {
        std::memcpy(&scale, to->op_params, sizeof scale);
        std::memcpy(&softcap, to->op_params + 2, sizeof softcap);
        if (softcap != 0.0f) scale /= softcap;
    }

    bool is_ours() const {
        float max_bias;
        std::memcpy(&max_bias, dst->op_params + 1, sizeof max_bias);
        const auto converts = [](const ggml_tensor * t) {
            return t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float != nullptr;
        };
        return mask != nullptr && mask->type == GGML_TYPE_F16 && max_bias == 0.0f && q->type == GGML_TYPE_F32 &&
               q->nb[0] == sizeof(float) && k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
               v->ne[2] == n_groups && mask->ne[2] == 1 && group <= ROWS && converts(k) && converts(v);
    }

    const uint16_t * mask_of(int64_t token, int64_t stream) const {
        return reinterpret_cast<const uint16_t *>(
            static_cast<const char *>(mask->data) + token * mask->nb[1] + (stream % mask->ne[3]) * mask->nb[3]);
    }
};

// Cells in the order of their text. They mostly lie so already, or in a few runs that do.
void sort_cells(const llama_kv_cells & places, std::vector<int32_t> & cells) {
    const auto is_before = [&](int32_t a, int32_t b) {
        return std::pair(places.pos_get(a), a) < std::pair(places.pos_get(b), b);
    };
    auto run = std::is_sorted_until(cells.begin(), cells.end(), is_before);
    while (run != cells.end()) {
        const auto end = std::is_sorted_until(run, cells.end(), is_before);
        std::inplace_merge(cells.begin(), run, end, is_before);
        run = end;
    }
}

// The cells that a token sees, in the order of its text. True if the mask says more of them than that they are seen.
bool list_cells(const Attention & a, int64_t token, int64_t stream, std::vector<int32_t> & out) {
    const uint16_t * mask = a.mask_of(token, stream);
    const int64_t n = a.n_cells;
    out.resize(n + BLOCK);
    int32_t * at = out.data();
    uint16_t bias = 0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t to = std::min(from + BLOCK, n);
        uint16_t any = 0;
        for (int64_t i = from; i < to; ++i) any |= static_cast<uint16_t>(mask[i] != HIDDEN);
        if (!any) continue;
        for (int64_t i = from; i < to; ++i) {
            *at = static_cast<int32_t>(i);
            at += mask[i] != HIDDEN;
            bias |= mask[i] != HIDDEN ? mask[i] : 0;
        }
    }
    out.resize(at - out.data());
    if (a.places) sort_cells(*a.places, out);
    return bias != 0;
}

// Tokens that follow each other in one text: each sees what the one before it saw, and more.
struct Tile {
    int64_t stream, first, n;
    std::vector<int32_t> cells;   // of the last token
    std::vector<int64_t> n_seen;  // of them, by each token
    bool biased;                  // whether the mask holds numbers to be added
};

// The tile that begins with `first`; at most `n_max` tokens.
void find_tile(const Attention & a, int64_t stream, int64_t first, int64_t n_max, Tile & tile, std::vector<int32_t> & next) {
    tile.stream = stream;
    tile.first = first;
    tile.n = 1;
    tile.biased = list_cells(a, first, stream, tile.cells);
    tile.n_seen.assign(1, static_cast<int64_t>(tile.cells.size()));
    for (; tile.n < n_max && first + tile.n < a.n_tokens; ++tile.n) {
        const bool biased = list_cells(a, first + tile.n, stream, next);
        if (next.size() < tile.cells.size() || !std::equal(tile.cells.begin(), tile.cells.end(), next.begin())) return;
        tile.biased |= biased;
        tile.cells.swap(next);
        tile.n_seen.push_back(static_cast<int64_t>(tile.cells.size()));
    }
}

// out[r][0..n_cols) += sum over i < depth of left[r][i] * right[i][0..n_cols), for each r a chain in the order of i.
void multiply_add(float * out, int64_t out_step, const float * left, int64_t left_step, const float * right,
                  int64_t n_rows, int64_t depth, int64_t n_cols) {
    for (int64_t c = 0; c < n_cols; c += LANES) {
        for (int64_t r = 0; r < n_rows; r += ROW_STEP) {
            float sum[ROW_STEP][LANES];
            for (int64_t y = 0; y < ROW_STEP; ++y) std::memcpy(sum[y], out + (r + y) * out_step + c, sizeof sum[y]);
            for (int64_t i = 0; i < depth; ++i) {
                const float * row = right + i * n_cols + c;
                for (int64_t y = 0; y < ROW_STEP; ++y) {
                    const float factor = left[(r + y) * left_step + i];
                    for (int64_t x = 0; x < LANES; ++x) sum[y][x] += factor * row[x];
                }
            }
            for (int64_t y = 0; y < ROW_STEP; ++y) std::memcpy(out + (r + y) * out_step + c, sum[y], sizeof sum[y]);
        }
    }
}

void to_float(const ggml_tensor * t, const void * row, float * out, int64_t n) {
    if (t->type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32(static_cast<const ggml_fp16_t *>(row), out, n);
    } else if (t->type == GGML_TYPE_F32) {
        std::memcpy(out, row, n * sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(row, out, n);
    }
}

// Sums over some cells: weights relative to exp(max), their total, and the values that they weigh.
struct Sums {
    float *max, *total, *values;

    void clear(int64_t n_rows, int64_t dv) const {
        std::fill(max, max + n_rows, -INFINITY);
        std::fill(total, total + n_rows, 0.0f);
        std::fill(values, values + n_rows * dv, 0.0f);
    }

    void add(const Sums & other, int64_t n_rows, int64_t dv) const {
        for (int64_t r = 0; r < n_rows; ++r) {
            if (other.max[r] == -INFINITY) continue;
            const float top = std::max(max[r], other.max[r]);
            const float mine = expf(max[r] - top), theirs = expf(other.max[r] - top);
            total[r] = total[r] * mine + other.total[r] * theirs;
            for (int64_t i = 0; i < dv; ++i) {
                values[r * dv + i] = values[r * dv + i] * mine + other.values[r * dv + i] * theirs;
            }
            max[r] = top;
        }
    }
};

// What one thread computes in.
struct Scratch {
    std::vector<float> memory;
    float *queries, *keys, *values, *weights, *line;
    Sums span, all;

    explicit Scratch(const Attention & a) {
        memory.resize(ROWS * a.dk + BLOCK * (a.dk + a.dv_padded) + ROWS * BLOCK + a.dk + 2 * ROWS * (2 + a.dv_padded));
        float * at = memory.data();
        const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
        queries = take(ROWS * a.dk);
        keys = take(BLOCK * a.dk);
        values = take(BLOCK * a.dv_padded);
        weights = take(ROWS * BLOCK);
        line = take(a.dk);
        span = {take(ROWS), take(ROWS), take(ROWS * a.dv_padded)};
        all = {take(ROWS), take(ROWS), take(ROWS * a.dv_padded)};
    }
};

int64_t rows_of(const Attention & a, const Tile & tile) { return tile.n * a.group; }
int64_t padded(int64_t n_rows) { return (n_rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP; }

// Row r is token r / group, query head r % group of the key head.
void load_queries(const Attention & a, const Tile & tile, int64_t key_head, const Scratch & s) {
    const int64_t n_rows = rows_of(a, tile);
    for (int64_t r = 0; r < n_rows; ++r) {
        const char * row = static_cast<const char *>(a.q->data) + (tile.first + r / a.group) * a.q->nb[1] +
                           (key_head * a.group + r % a.group) * a.q->nb[2] + tile.stream * a.q->nb[3];
        std::memcpy(s.queries + r * a.dk, row, a.dk * sizeof(float));
    }
    std::fill(s.queries + n_rows * a.dk, s.queries + padded(n_rows) * a.dk, 0.0f);
}

void load_block(const Attention & a, const Tile & tile, int64_t key_head, int64_t from, int64_t n, const Scratch & s) {
    const char * keys = static_cast<const char *>(a.k->data) + key_head * a.k->nb[2] + tile.stream * a.k->nb[3];
    const char * values = static_cast<const char *>(a.v->data) + key_head * a.v->nb[2] + tile.stream * a.v->nb[3];
    for (int64_t j = 0; j < n; ++j) {
        const int64_t cell = tile.cells[from + j];
        to_float(a.k, keys + cell * a.k->nb[1], s.line, a.dk);
        for (int64_t d = 0; d < a.dk; ++d) s.keys[d * BLOCK + j] = s.line[d];
        to_float(a.v, values + cell * a.v->nb[1], s.values + j * a.dv_padded, a.dv);
    }
    for (int64_t d = 0; n < BLOCK && d < a.dk; ++d) std::fill(s.keys + d * BLOCK + n, s.keys + (d + 1) * BLOCK, 0.0f);
    std::fill(s.values + n * a.dv_padded, s.values + BLOCK * a.dv_padded, 0.0f);
}

// The sums over one span of the tile's cells, into s.span.
void compute_span(const Attention & a, const Tile & tile, int64_t key_head, int64_t span, const Scratch & s) {
    const int64_t n_rows = rows_of(a, tile), n_padded = padded(n_rows);
    s.span.clear(n_padded, a.dv_padded);
    const int64_t end = std::min((span + 1) * SPAN, static_cast<int64_t>(tile.cells.size()));
    for (int64_t from = span * SPAN; from < end; from += BLOCK) {
        load_block(a, tile, key_head, from, std::min(BLOCK, end - from), s);
        std::fill(s.weights, s.weights + n_padded * BLOCK, 0.0f);
        multiply_add(s.weights, BLOCK, s.queries, a.dk, s.keys, n_padded, a.dk, BLOCK);
        for (int64_t r = 0; r < n_rows; ++r) {
            float * w = s.weights + r * BLOCK;
            const int64_t n_seen = std::clamp<int64_t>(tile.n_seen[r / a.group] - from, 0, BLOCK);
            if (n_seen == 0) {
                std::fill(w, w + BLOCK, 0.0f);
                continue;
            }
            for (int64_t j = 0; j < BLOCK; ++j) w[j] *= a.scale;
            if (a.softcap != 0.0f) {
                for (int64_t j = 0; j < BLOCK; ++j) w[j] = a.softcap * tanhf(w[j]);
            }
            if (tile.biased) {
                const uint16_t * mask = a.mask_of(tile.first + r / a.group, tile.stream);
                for (int64_t j = 0; j < n_seen; ++j) w[j] += GGML_CPU_FP16_TO_FP32(mask[tile.cells[from + j]]);
            }
            std::fill(w + n_seen, w + BLOCK, -INFINITY);
            float top = s.span.max[r];
            for (int64_t j = 0; j < BLOCK; ++j) top = std::max(top, w[j]);
            const float keep = expf(s.span.max[r] - top);
            s.span.max[r] = top;
            s.span.total[r] = s.span.total[r] * keep + static_cast<float>(ggml_vec_soft_max_f32(BLOCK, w, w, top));
            for (int64_t i = 0; i < a.dv_padded; ++i) s.span.values[r * a.dv_padded + i] *= keep;
        }
        multiply_add(s.span.values, a.dv_padded, s.weights, BLOCK, s.values, n_padded, BLOCK, a.dv_padded);
    }
}

void store(const Attention & a, const Tile & tile, int64_t key_head, const Sums & sums) {
    const int64_t n_rows = rows_of(a, tile);
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t token = tile.first + r / a.group, head = key_head * a.group + r % a.group;
        float max = sums.max[r], total = sums.total[r], keep = 1.0f;
        if (a.sinks) {
            const float sink = static_cast<const float *>(a.sinks->data)[head];
            const float top = std::max(max, sink);
            keep = expf(max - top);
            total = total * keep + expf(sink - top);
        }
        const float factor = total == 0.0f ? 0.0f : keep / total;
        float * out = reinterpret_cast<float *>(
            static_cast<char *>(a.dst->data) + head * a.dst->nb[1] + token * a.dst->nb[2] + tile.stream * a.dst->nb[3]);
        for (int64_t i = 0; i < a.dv; ++i) out[i] = sums.values[r * a.dv_padded + i] * factor;
    }
}

int64_t n_spans(const Tile & tile) { return (static_cast<int64_t>(tile.cells.size()) + SPAN - 1) / SPAN; }

void compute(const Attention & a, const Tile & tile, int64_t key_head, const Scratch & s) {
    load_queries(a, tile, key_head, s);
    s.all.clear(padded(rows_of(a, tile)), a.dv_padded);
    for (int64_t span = 0; span < n_spans(tile); ++span) {
        compute_span(a, tile, key_head, span, s);
        s.all.add(s.span, rows_of(a, tile), a.dv_padded);
    }
    store(a, tile, key_head, s.all);
}

// A few tokens that see many cells: each span of cells is another piece of work. Only if it fits into the work memory.
bool compute_by_spans(const Attention & a, const ggml_compute_params * params, const Tile & tile, const Scratch & s) {
    const int64_t n_rows = rows_of(a, tile), spans = n_spans(tile), row_size = 2 + a.dv_padded;
    if (n_rows * a.n_groups * spans * row_size * sizeof(float) > params->wsize) return false;
    const auto sums_of = [&](int64_t item) {
        float * at = static_cast<float *>(params->wdata) + item * n_rows * row_size;
        return Sums{at, at + n_rows, at + 2 * n_rows};
    };
    for (int64_t item = params->ith; item < a.n_groups * spans; item += params->nth) {
        load_queries(a, tile, item / spans, s);
        compute_span(a, tile, item / spans, item % spans, s);
        const Sums to = sums_of(item);
        std::copy(s.span.max, s.span.max + n_rows, to.max);
        std::copy(s.span.total, s.span.total + n_rows, to.total);
        std::copy(s.span.values, s.span.values + n_rows * a.dv_padded, to.values);
    }
    ggml_barrier(params->threadpool);
    for (int64_t head = params->ith; head < a.n_groups; head += params->nth) {
        s.all.clear(n_rows, a.dv_padded);
        for (int64_t span = 0; span < spans; ++span) s.all.add(sums_of(head * spans + span), n_rows, a.dv_padded);
        store(a, tile, head, s.all);
    }
    return true;
}

}  // namespace

void ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    const Attention a(dst);
    if (!a.is_ours()) return tea_upstream_flash_attn_ext(params, dst);
    const Scratch s(a);
    Tile tile;
    std::vector<int32_t> next;
    const int64_t n_max = std::max<int64_t>(ROWS / a.group, 1);

    if (a.n_tokens == 1 && a.n_streams == 1 && a.n_groups < 2 * params->nth) {
        find_tile(a, 0, 0, 1, tile, next);
        if (n_spans(tile) > 1 && compute_by_spans(a, params, tile, s)) return;
    }
    // Every thread takes every nth piece of work: a tile, or a tile and one of its key heads where tiles are few.
    const bool by_head = (a.n_tokens + n_max - 1) / n_max < 4 * params->nth;
    int64_t item = 0;
    for (int64_t stream = 0; stream < a.n_streams; ++stream) {
        for (int64_t first = 0; first < a.n_tokens; first += tile.n) {
            find_tile(a, stream, first, n_max, tile, next);
            for (int64_t head = 0; head < a.n_groups; ++head) {
                if (item % params->nth == params->ith) compute(a, tile, head, s);
                item += by_head;
            }
            item += !by_head;
        }
    }
}
