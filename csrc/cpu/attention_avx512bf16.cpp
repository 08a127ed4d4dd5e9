// Attention for AVX-512 in bf16.

#if defined(__x86_64__)

#include "attention_numbers_bf16.h"

// what is done with a dword comes first
#include "attention_tile.h"

namespace minillm {

void attention_avx512bf16(const Attention& a, const AttentionRows& rows) { attend_rows(a, rows); }

}  // namespace minillm

#endif
