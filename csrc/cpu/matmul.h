// Products of fp32 matrices of any strides, for training: torch leaves them to MKL, whose AVX-512 kernels run on
// Intel's own processors only.
//
//     c_(m,n) = sum_k a_(m,k) b_(k,n)   or   c_(m,n) += that
//
// Each sum runs in order of k, in blocks of `depth`, fused multiply-adds in fp32; the number of threads changes
// nothing.
#pragma once

#include <cstdint>

#include "isa.h"

namespace minillm {

struct Matrix {
    const float* x;
    int64_t row, column;  // numbers from one to the next

    const float* at(int64_t i, int64_t j) const { return x + i * row + j * column; }
};

struct Matmul {
    Matrix a, b;
    float* c;       // rows of N numbers
    int64_t c_row;  // numbers from one to the next
    int64_t M, N, K;
    bool add;
};

void matmul(const Matmul& x, Isa isa, int threads);

void matmul_ref(const Matmul& x, int threads);
#if defined(__x86_64__)
void matmul_avx512(const Matmul& x, int threads);
#endif

}  // namespace minillm
