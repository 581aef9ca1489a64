// Included before all else in every file of llama.cpp's common library (CMakeLists.txt): checkpoints for bounded.hpp
// where its Jinja recurses without allocating, and a note of which parts of a rendered text are the caller's.
#pragma once

#include <cstddef>

// Strings, and streams into strings, are compiled here and not taken from libstdc++.so, so that their memory is counted.
#ifdef __GLIBCXX__
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE -1  // all but basic_string are taken from there
#include <istream>
#include <locale>
#include <ostream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE -1
#endif

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bounded.hpp"

// value.h: is_hashable() walks a nest of tuples, in which each may be shared by many.
#define all_of(first, ...) all_of((::tea::checkpoint(), first), __VA_ARGS__)

// value.cpp, runtime.cpp: whatever walks a value asks for its type.
#define is_val is_val_unchecked
#include "jinja/value.h"
#undef is_val
namespace jinja {
template <typename T>
bool is_val(const value & ptr) {
    ::tea::checkpoint();
    return is_val_unchecked<T>(ptr);
}
template <typename T>
bool is_val(const value_t * ptr) {
    ::tea::checkpoint();
    return is_val_unchecked<T>(ptr);
}
}  // namespace jinja
#include "jinja/runtime.h"

namespace tea {

// A rendered text, as (is it the caller's, text) of each part.
using RenderedParts = std::vector<std::pair<bool, std::string>>;

inline thread_local std::vector<RenderedParts> * renders = nullptr;  // where to note them; nullptr: nowhere

inline const jinja::value & note_render(const jinja::value & rendered) {
    if (renders != nullptr) {
        auto parts = jinja::mk_val<jinja::value_string>();
        jinja::gather_string_parts_recursive(rendered, parts);
        RenderedParts & noted = renders->emplace_back();
        for (const auto & part : parts->val_str.parts) noted.emplace_back(part.is_input, part.val);
    }
    return rendered;
}

}  // namespace tea

// chat.cpp: the one place where a template's output becomes text.
#define gather_string_parts(rendered) gather_string_parts(::tea::note_render(rendered))

// chat.cpp, caps.cpp: `runtime.execute(program)`. The temporary lives until it has returned.
#ifdef TEA_COUNT_EXECUTE
#define execute(program) execute((::tea::Counting(), program))
#endif
