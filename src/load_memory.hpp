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

    // Called by llama.cpp before each tensor is read, once all buffers are there.
    void progress(float fraction) {
        if (!begun_) begin();
        if (n_copied_ >= n_mapped_ / 4) release(fraction);
    }

  private:
    using Range = std::pair<void *, size_t>;
    static constexpr size_t large = 8u << 20;
    static constexpr size_t step = 1u << 20;

    void begin() {
        begun_ = true;
        std::vector<Range> fresh;
        for (const auto & range : copies()) {
            if (std::find(before_.begin(), before_.end(), range) != before_.end()) continue;
            fresh.push_back(range);
            n_copied_ += range.second;
        }
        if (std::thread::hardware_concurrency() > 1) ahead_ = std::thread(&LoadMemory::populate, this, std::move(fresh));
        each_mapping([&](Range range, const char * name) {
            if (path_ == name) {
                file_.push_back(range);
                n_mapped_ += range.second;
            }
        });
    }

    // Lets go of the file's first `fraction`, which is about what was read: tensors are read in the file's order.
    void release(float fraction) {
        if (fraction < released_ + 0.1f) return;
        for (const auto & [address, size] : file_) {
            const auto from = static_cast<size_t>(released_ * size) & ~(step - 1);
            const auto to = static_cast<size_t>(fraction * size) & ~(step - 1);
            madvise(static_cast<char *>(address) + from, to - from, MADV_DONTNEED);
        }
        released_ = fraction;
    }

    void populate(std::vector<Range> ranges) {
#ifdef MADV_POPULATE_WRITE
        for (const auto & [address, size] : ranges) {
            for (size_t at = 0; at < size && !stop_; at += step) {
                if (madvise(static_cast<char *>(address) + at, std::min(step, size - at), MADV_POPULATE_WRITE)) return;
            }
        }
#endif
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
            visit(Range(reinterpret_cast<void *>(begin), end - begin), line + at);
        }
        std::fclose(maps);
    }

    std::string path_;
    std::vector<Range> before_, file_;
    size_t n_copied_ = 0, n_mapped_ = 0;
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
