// A dword of attention in fp32, one number: fp16 and bf16 become fp32 where they are read. AVX-512.
#pragma once

#include "vectors_avx512.h"

#define MINILLM_TILE MINILLM_AVX512

namespace minillm {
namespace {

struct Numbers {
    static constexpr int packed = 1;

    MINILLM_TILE static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }

    // x[e .. e + 15]; beyond `count` numbers zero, and not read.
    MINILLM_TILE static __m512i row(const void* x, Dtype dtype, int64_t e, int64_t count) {
        return _mm512_castps_si512(load16(x, dtype, e, count));
    }

    MINILLM_TILE static __m512i values(const void* value, const void*, Dtype dtype, int64_t e, int64_t count) {
        return row(value, dtype, e, count);
    }

    MINILLM_TILE static __m512i pack(const __m512 (&weight)[1]) { return _mm512_castps_si512(weight[0]); }

    MINILLM_TILE static void store_row(int32_t* out, __m512 x) { _mm512_storeu_ps(out, x); }
};

}  // namespace
}  // namespace minillm
