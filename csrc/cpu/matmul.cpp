// The definition of a matrix product, and which variant runs.

#include "matmul.h"

#include <cmath>

namespace minillm {

void matmul_ref(const Matmul& x, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < x.M; ++m)
        for (int64_t n = 0; n < x.N; ++n) {
            float sum = x.add ? x.c[m * x.c_row + n] : 0.0f;
            for (int64_t k = 0; k < x.K; ++k) sum = std::fma(*x.a.at(m, k), *x.b.at(k, n), sum);
            x.c[m * x.c_row + n] = sum;
        }
}

void matmul(const Matmul& x, Isa isa, int threads) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512vnni && x.K > 0) return matmul_avx512(x, threads);
#endif
    (void)isa;
    matmul_ref(x, threads);
}

}  // namespace minillm
