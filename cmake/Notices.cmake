# Writes to OUT the copyright notices that stand only inside source files of llama.cpp in DIR that are linked in.
function(tea_llm_write_notices dir out)
  file(READ "${dir}/ggml/src/ggml-cpu/llamafile/sgemm.cpp" sgemm LIMIT 4096)
  string(REGEX MATCH "^(//[^\n]*\n)+" sgemm "${sgemm}")
  file(READ "${dir}/ggml/src/ggml-cpu/ops.cpp" ops)
  string(REGEX MATCH "// YaRN algorithm[^\n]*\n// MIT licensed[^\n]*\n" yarn "${ops}")
  string(REGEX REPLACE "(^|\n)// ?" "\\1" notices
    "${sgemm}\n--- YaRN, in ggml's CPU backend; the terms are those of LICENSE ---\n\n${yarn}")
  file(WRITE "${out}" "--- llamafile's matrix multiplication, in ggml's CPU backend ---\n\n${notices}")
endfunction()
