// Tells the attention on a CPU (attention.cpp) where in its text each cell of a KV cache stands. llama.cpp puts the next
// token into any cell that is free, so the cells of a text need not lie in its order, and sums in another order have
// other bits.
#pragma once

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid.h"
#include "llama.h"

namespace tea {

inline void show_cells(const llama_kv_cache & cache) {
    for (const uint32_t layer : cache.get_layer_ids()) {
        ggml_tensor * keys = cache.get_k_storage(static_cast<int32_t>(layer));
        const bool on_cpu = keys->buffer && ggml_backend_buffer_is_host(keys->buffer);
        if (on_cpu) keys->extra = const_cast<llama_kv_cells *>(&cache.get_cells(0));
    }
}

// For a context whose sequences share their cells (kv_unified). Other kinds of memory have none, or a few.
inline void show_cells(llama_context * ctx) {
    llama_memory_t memory = llama_get_memory(ctx);
    if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) show_cells(*cache);
    if (const auto * both = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        show_cells(*both->get_base());
        show_cells(*both->get_swa());
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) show_cells(*hybrid->get_mem_attn());
}

}  // namespace tea
