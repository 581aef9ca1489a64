// Memory while a model loads, on Linux. Where llama.cpp copies weights out of the mapped file (repacked for this CPU),
//  - a second thread has the system make the copy's pages ahead of the one that fills them,
//  - the file's pages are let go as soon as they were copied, so that the weights aren't resident twice.
// Both are hints: nothing changes but time and resident memory (bench/RESULTS.md, "load"). Huge pages were tried for the
// copy, and cost more (the kernel compacts memory to find them) than the page faults they save.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tea {

class LoadMemory {
  public:
#ifdef __linux__
    explicit LoadMemory(const char * path) : path_(path), before_(copies()) {}
    LoadMemory(const LoadMemory &) = delete;
    ~LoadMemory() {
        stop_ = true;
        if (ahead_.joinable()) ahead_.join();
    }

    // Called by llama.cpp before each tensor is read, once all buffers are there, and with 1 at the end.
    void progress(float fraction) {
        if (!begun_) begin();
        if (fraction >= released_ + 0.05f) release(fraction);
    }

  private:
    using Range = std::pair<void *, size_t>;
    static constexpr size_t large = 16u << 20;  // twice a thread's stack
    static constexpr size_t step = 1u << 20;

    void begin() {
        begun_ = true;
        std::vector<Range> fresh;
        size_t n_copied = 0, n_mapped = 0;
        for (const auto & range : copies()) {
            if (std::find(before_.begin(), before_.end(), range) != before_.end()) continue;
            fresh.push_back(range);
            n_copied += range.second;
        }
        each_mapping([&](Range range, const char * name) {
            if (path_ == name) {
                file_.push_back(range);
                n_mapped += range.second;
            }
        });
        if (n_copied < n_mapped / 4) {
            file_.clear();
            return;
        }
        // What isn't copied is used where it lies: the embeddings, with which files begin.
        released_ = n_mapped > n_copied ? 1 - static_cast<float>(n_copied) / n_mapped : 0;
        try {
            ahead_ = std::thread(&LoadMemory::populate, this, std::move(fresh));
        } catch (const std::system_error &) {  // no thread to be had: the pages are made when they are filled
        }
    }

    void populate(std::vector<Range> ranges) {
#ifdef MADV_POPULATE_WRITE
        for (const auto & [address, size] : ranges) {
            for (size_t at = 0; at < size && !stop_; at += step) {
                madvise(static_cast<char *>(address) + at, std::min(step, size - at), MADV_POPULATE_WRITE);
            }
        }
#endif
    }

    // Lets go of the file's first `fraction`, which is about what was read: tensors are read in the file's order.
    // Not at the end: llama.cpp has unmapped a part of the file then, and the addresses may be somebody else's.
    void release(float fraction) {
        if (fraction >= 1) return;
        for (const auto & [address, size] : file_) {
            const auto from = static_cast<size_t>(released_ * size) & ~(step - 1);
            const auto to = static_cast<size_t>(fraction * size) & ~(step - 1);
            madvise(static_cast<char *>(address) + from, to - from, MADV_DONTNEED);
        }
        released_ = fraction;
    }

    // Large anonymous mappings: where malloc puts a buffer of weights.
    static std::vector<Range> copies() {
        std::vector<Range> found;
        each_mapping([&](Range range, const char * name) {
            if (!*name && range.second >= large) found.push_back(range);
        });
        return found;
    }

    template <class Visit>
    static void each_mapping(Visit visit) {
        std::FILE * maps = std::fopen("/proc/self/maps", "re");
        if (!maps) return;
        char line[8192];
        while (std::fgets(line, sizeof line, maps)) {
            unsigned long begin, end, offset, inode;
            char mode[8], device[16];
            int at = 0;
            if (std::sscanf(line, "%lx-%lx %7s %lx %15s %lu %n", &begin, &end, mode, &offset, device, &inode, &at) < 6) continue;
            line[std::strcspn(line, "\n")] = 0;
            if (mode[0] != 'r') continue;
            visit(Range(reinterpret_cast<void *>(begin), end - begin), line + at);
        }
        std::fclose(maps);
    }

    std::string path_;
    std::vector<Range> before_, file_;
    float released_ = 0;
    bool begun_ = false;
    std::atomic<bool> stop_{false};
    std::thread ahead_;
#else
    explicit LoadMemory(const char *) {}
    void progress(float) {}
#endif
};

}  // namespace tea
