// The gradients of attention for AVX-512 in bf16.

#if defined(__x86_64__)

#include "attention_numbers_bf16.h"

// what is done with a dword comes first
#include "attention_backward_tile.h"

namespace minillm {

void attention_backward_avx512bf16(const AttentionBackward& a, const BackwardTask& task) { backward_task(a, task); }

}  // namespace minillm

#endif
