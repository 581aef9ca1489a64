// Work that somebody else wrote (a model file's chat template), within bounds of time, memory and stack.
//
// llama.cpp's Jinja has none. Here it runs on a thread whose stack is large, and what it allocates is counted
// (bounded.cpp): whatever loops or nests without an end allocates as it goes, or passes a checkpoint (jinja_hooks.hpp).
// What is over its bounds gets exceptions from there on. Code around it, which may not be ready for an exception where it
// allocates (nlohmann::json does in its destructor), gets none.
#pragma once

#include <pthread.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace tea {

struct Exceeded : std::bad_alloc {
    const char * what() const noexcept override { return "a bound was exceeded"; }
};

struct Bounds {
    size_t n_bytes;      // that may be held at once
    int seconds;
    // What may be used of the stack; the rest is for destructors, which recurse over as much as n_bytes can hold.
    static constexpr size_t N_STACK = 64 << 20, N_STACK_IN_ALL = 256 << 20;
};

class Budget {
  public:
    explicit Budget(const Bounds & bounds) : bounds_(bounds), end_(Clock::now() + std::chrono::seconds(bounds.seconds)) {
        stack_end_ = reinterpret_cast<uintptr_t>(this) - Bounds::N_STACK;
    }

    // What was exceeded, or nullptr.
    const char * exceeded() const { return exceeded_; }

    void check(size_t n_more = 0) {
        const char here = 0;
        if (exceeded_ == nullptr) {
            if (n_held_ + n_more > bounds_.n_bytes) exceeded_ = "it takes too much memory";
            else if (reinterpret_cast<uintptr_t>(&here) < stack_end_) exceeded_ = "it nests too deeply";
            else if (++n_checks_ % 64 == 0 && Clock::now() > end_) exceeded_ = "it takes too long";
            else return;
        }
        if (std::uncaught_exceptions() == 0) throw Exceeded();  // else a destructor needs memory
    }

    void take(size_t n) { n_held_ += n; }
    void give(size_t n) { n_held_ -= n < n_held_ ? n : n_held_; }  // it may be older than this budget

  private:
    using Clock = std::chrono::steady_clock;
    Bounds bounds_;
    Clock::time_point end_;
    uintptr_t stack_end_;
    size_t n_held_ = 0;
    uint32_t n_checks_ = 0;
    const char * exceeded_ = nullptr;
};

inline thread_local Budget * budget = nullptr;    // of the work on this thread
inline thread_local Budget * counting = nullptr;  // the same, while allocations count

struct Counting {
    Counting() { counting = budget; }
    ~Counting() { counting = nullptr; }
};

inline void checkpoint() {
    if (budget != nullptr) budget->check();
}

// Runs `work`, which doesn't recurse deeply, on this thread. False where it exceeds its bounds.
template <class Work>
bool run_counted(const Bounds & bounds, Work work) {
    Budget own(bounds);
    struct Current {
        explicit Current(Budget * own) { budget = own; }
        ~Current() { budget = nullptr; }
    } current(&own);
    try {
        Counting counting;
        work();
    } catch (...) {
        if (own.exceeded() == nullptr) throw;
    }
    return own.exceeded() == nullptr;
}

// Runs `work` on a thread of its own; throws what it throws, and std::runtime_error where it exceeds its bounds.
template <class Work>
void run_bounded(const Bounds & bounds, Work work) {
    struct Run {
        const Bounds & bounds;
        Work & work;
        std::exception_ptr error;
        const char * exceeded;
    } run{bounds, work, nullptr, nullptr};
    const auto main = [](void * data) -> void * {
        Run & run = *static_cast<Run *>(data);
        Budget own(run.bounds);
        budget = &own;
        try {
            run.work();
        } catch (...) {
            run.error = std::current_exception();
        }
        budget = nullptr;
        run.exceeded = own.exceeded();
        return nullptr;
    };
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, Bounds::N_STACK_IN_ALL);
    const int failed = pthread_create(&thread, &attributes, main, &run);
    pthread_attr_destroy(&attributes);
    if (failed) throw std::runtime_error("no thread could be started for it");
    pthread_join(thread, nullptr);
    if (run.exceeded != nullptr) throw std::runtime_error(run.exceeded);
    if (run.error) std::rethrow_exception(run.error);
}

}  // namespace tea
