// Memory while a model loads, on Linux. Where llama.cpp copies weights out of the mapped file (repacked for this CPU), the
// file's pages are let go as soon as they were copied, so that the weights aren't resident twice. It is a hint: nothing
// changes but resident memory (bench/RESULTS.md, "load").
// Tried, and slower: huge pages for the copy (the kernel compacts memory to find them), and a thread that makes its pages
// ahead (the cores have better to do, split_load.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
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
        size_t n_copied = 0, n_mapped = 0;
        for (const auto & range : copies()) {
            if (std::find(before_.begin(), before_.end(), range) == before_.end()) n_copied += range.second;
        }
        each_mapping([&](Range range, const char * name) {
            if (path_ == name) {
                file_.push_back(range);
                n_mapped += range.second;
            }
        });
        // What isn't copied is used where it lies: the embeddings, with which files begin.
        released_ = n_copied < n_mapped ? 1 - static_cast<float>(n_copied) / n_mapped : 0;
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
#else
    explicit LoadMemory(const char *) {}
    void progress(float) {}
#endif
};

}  // namespace tea
