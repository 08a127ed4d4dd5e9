// Attention for AVX-512 in fp32.

#if defined(__x86_64__)

#include "attention_numbers.h"

// what is done with a dword comes first
#include "attention_tile.h"

namespace minillm {

void attention_avx512(const Attention& a, const AttentionRows& rows) { attend_rows(a, rows); }

}  // namespace minillm

#endif
