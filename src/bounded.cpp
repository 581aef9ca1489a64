// What C++ code of this extension allocates is counted on threads that are told to (bounded.hpp). The symbols are
// hidden, so nothing outside the extension is concerned; memory may be given back by either side, as it is malloc's.
#include "bounded.hpp"

#include <cstdlib>

#if defined(__APPLE__)
#include <malloc/malloc.h>
#define malloc_usable_size malloc_size
#else
#include <malloc.h>
#endif

void * operator new(std::size_t n) {
    tea::Budget * budget = tea::counting;
    if (budget != nullptr) budget->check(n);
    void * memory = std::malloc(n == 0 ? 1 : n);
    if (memory == nullptr) throw std::bad_alloc();
    if (budget != nullptr) budget->take(malloc_usable_size(memory));
    return memory;
}

void operator delete(void * memory) noexcept {
    if (tea::counting != nullptr && memory != nullptr) tea::counting->give(malloc_usable_size(memory));
    std::free(memory);
}

void * operator new[](std::size_t n) { return ::operator new(n); }
void operator delete[](void * memory) noexcept { ::operator delete(memory); }
void operator delete(void * memory, std::size_t) noexcept { ::operator delete(memory); }
void operator delete[](void * memory, std::size_t) noexcept { ::operator delete(memory); }
