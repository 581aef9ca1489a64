// What stands between llama.cpp and the interpreter: its asserts become C++ exceptions, its log lines are kept.
//
// ggml_abort() calls our callback before it calls abort(). On a thread that is inside a Guard the callback throws, the
// exception unwinds through llama.cpp, and Cython turns it into a Python exception. On ggml's own worker threads nobody
// could catch it: the message is printed and the process ends, as it would without us.
#pragma once

#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "ggml.h"
#include "llama.h"

namespace tea {

struct Fault : std::runtime_error {  // an assert inside llama.cpp
    using std::runtime_error::runtime_error;
};

inline thread_local int guards = 0;
struct Guard {
    Guard() { ++guards; }
    ~Guard() { --guards; }
};

inline void on_abort(const char * message) {
    if (guards > 0) throw Fault(message);
    std::fprintf(stderr, "%s\n", message);
}

// --- logs ---------------------------------------------------------------------------------------------------------
// The error lines of the current call on this thread go into its message; all lines wait in a bounded queue until
// Python, holding the GIL again, hands them to logging.

struct LogLine {
    int level;
    std::string text;
};

inline std::atomic<int> log_level{GGML_LOG_LEVEL_WARN};  // lines below it are not kept
inline std::mutex log_mutex;
inline std::deque<LogLine> log_lines;
inline thread_local std::string last_words;

inline void on_log(ggml_log_level level, const char * text, void *) {
    static thread_local int previous = GGML_LOG_LEVEL_INFO;
    if (level == GGML_LOG_LEVEL_CONT) level = static_cast<ggml_log_level>(previous);
    previous = level;
    if (level == GGML_LOG_LEVEL_ERROR && last_words.size() < 4096) last_words += text;
    if (level < log_level.load(std::memory_order_relaxed)) return;
    std::lock_guard<std::mutex> lock(log_mutex);
    if (log_lines.size() < 10000) log_lines.push_back({level, text});
}

inline std::string take_last_words() {
    std::string words;
    words.swap(last_words);
    while (!words.empty() && std::isspace(static_cast<unsigned char>(words.back()))) words.pop_back();
    std::replace(words.begin(), words.end(), '\n', ' ');
    return words;
}

inline bool take_log_line(LogLine & line) {
    std::lock_guard<std::mutex> lock(log_mutex);
    if (log_lines.empty()) return false;
    line = std::move(log_lines.front());
    log_lines.pop_front();
    return true;
}

// --- exceptions ---------------------------------------------------------------------------------------------------
inline PyObject * engine_fault = nullptr;  // borrowed from the module, which lives as long as the process

// Cython's `except +raise_fault`: called with the GIL inside the catch block.
inline void raise_fault() {
    try {
        throw;
    } catch (const std::bad_alloc &) {
        PyErr_SetString(PyExc_MemoryError, "llama.cpp could not allocate memory");
    } catch (const std::exception & e) {
        PyErr_SetString(engine_fault, e.what());
    } catch (...) {
        PyErr_SetString(engine_fault, "llama.cpp threw something that is no std::exception");
    }
}

inline void install() {
    ggml_set_abort_callback(on_abort);
    llama_log_set(on_log, nullptr);
}

// Calls of llama.cpp that can assert, throw, or both.
template <class Function, class... Args>
inline auto guarded(Function function, Args... args) {
    Guard guard;
    return function(args...);
}

inline llama_model * load_model(const char * path, const llama_model_params & p) { return guarded(llama_model_load_from_file, path, p); }
inline llama_context * new_context(llama_model * m, const llama_context_params & p) { return guarded(llama_init_from_model, m, p); }
inline int32_t decode(llama_context * c, const llama_batch & b) { return guarded(llama_decode, c, b); }
inline int32_t encode(llama_context * c, const llama_batch & b) { return guarded(llama_encode, c, b); }
inline int32_t tokenize(const llama_vocab * v, const char * text, int32_t n, llama_token * out, int32_t n_max, bool special, bool parse) {
    return guarded(llama_tokenize, v, text, n, out, n_max, special, parse);
}
inline int32_t detokenize(const llama_vocab * v, const llama_token * t, int32_t n, char * out, int32_t n_max, bool remove, bool unparse) {
    return guarded(llama_detokenize, v, t, n, out, n_max, remove, unparse);
}

}  // namespace tea
