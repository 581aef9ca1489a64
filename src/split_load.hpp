// Loads a model's weights on a thread of their own, while the caller loads its vocabulary (`vocab_only`) beside it.
//
// llama.cpp reads one after the other on one thread, and of a 0.5B model with 152k tokens the vocabulary is three
// quarters of the time. The weights' llama_model is told that it has no vocabulary, only how many tokens there are: that
// is all its graphs and contexts ask of it. Everything about tokens and templates is asked of the other one.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "gguf.h"
#include "guard.hpp"

namespace tea {

class SplitLoad {
  public:
    SplitLoad(const char * path, const llama_model_params & params) : path_(path), params_(params) {
        thread_ = std::thread(&SplitLoad::work, this);
    }
    SplitLoad(const SplitLoad &) = delete;
    ~SplitLoad() {
        thread_.join();
        llama_model_free(weights_);
    }

    // True once the thread has done what it can.
    bool wait_ms(int ms) {
        std::unique_lock<std::mutex> lock(mutex_);
        return changed_.wait_for(lock, std::chrono::milliseconds(ms), [this] { return done_; });
    }

    // The weights, now the caller's to free; null if they could not be loaded this way.
    llama_model * take() {
        llama_model * weights = weights_;
        weights_ = nullptr;
        return weights;
    }

  private:
    void work() {
        try {
            weights_ = load();
        } catch (const std::exception &) {  // the caller loads the plain way, and meets it there
        }
        take_last_words();
        std::lock_guard<std::mutex> lock(mutex_);
        done_ = true;
        changed_.notify_all();
    }

    llama_model * load() {
        llama_model_kv_override overrides[3] = {};
        if (!describe_vocabulary(overrides)) return nullptr;
        params_.kv_overrides = overrides;
        return load_model(path_.c_str(), params_);
    }

    bool describe_vocabulary(llama_model_kv_override * overrides) const {
        Guard guard;
        gguf_context * file = gguf_init_from_file(path_.c_str(), {/*no_alloc=*/true, /*ctx=*/nullptr});
        if (!file) return false;
        const int64_t arch = gguf_find_key(file, "general.architecture");
        const int64_t tokens = gguf_find_key(file, "tokenizer.ggml.tokens");
        const bool known = arch >= 0 && gguf_get_kv_type(file, arch) == GGUF_TYPE_STRING &&  //
                           tokens >= 0 && gguf_get_kv_type(file, tokens) == GGUF_TYPE_ARRAY;
        if (known) {
            overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            std::strcpy(overrides[0].key, "tokenizer.ggml.model");
            std::strcpy(overrides[0].val_str, "no_vocab");
            overrides[1].tag = LLAMA_KV_OVERRIDE_TYPE_INT;
            std::snprintf(overrides[1].key, sizeof overrides[1].key, "%s.vocab_size", gguf_get_val_str(file, arch));
            overrides[1].val_i64 = gguf_get_arr_n(file, tokens);
        }
        gguf_free(file);
        return known;
    }

    std::string path_;
    llama_model_params params_;
    llama_model * weights_ = nullptr;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool done_ = false;
    std::thread thread_;
};

}  // namespace tea
