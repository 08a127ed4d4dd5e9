// Eight fp32 numbers at a time, in and out of every float format. AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "numbers.h"

#define MINILLM_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace minillm {
namespace {  // code for one instruction set must never be merged with that of another

MINILLM_AVX2 inline __m256 load8(const void* x, Dtype dtype, int64_t index) {
    if (dtype == Dtype::f32) return _mm256_loadu_ps(static_cast<const float*>(x) + index);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + index));
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

MINILLM_AVX2 inline void store8(void* x, Dtype dtype, int64_t index, __m256 value) {
    if (dtype == Dtype::f32) {
        _mm256_storeu_ps(static_cast<float*>(x) + index, value);
        return;
    }
    if (dtype == Dtype::f16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(x) + index),
                         _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return;
    }
    alignas(32) float numbers[8];
    _mm256_store_ps(numbers, value);
    for (int i = 0; i < 8; ++i) store(x, dtype, index + i, numbers[i]);
}

}  // namespace
}  // namespace minillm
