// The gradients of attention for AVX-512 in fp32.

#if defined(__x86_64__)

#include "attention_numbers.h"

// what is done with a dword comes first
#include "attention_backward_tile.h"

namespace minillm {

void attention_backward_avx512(const AttentionBackward& a, const BackwardTask& task) { backward_task(a, task); }

}  // namespace minillm

#endif
