// The block operations sixteen numbers at a time.

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

#include "block_ops.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

MINILLM_AVX512 inline __m512 rounded(__m512 x, Dtype dtype) {
    if (dtype == Dtype::f32) return x;
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16));
}

MINILLM_AVX512 void rms_norm_row(const void* x, const void* weight, void* y, Dtype dtype, int64_t D, float eps) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < D; i += 16) {
        const __m512 value = load16(x, dtype, i, D - i);
        sum[i / 16 % 2] = _mm512_fmadd_ps(value, value, sum[i / 16 % 2]);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / static_cast<float>(D);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (int64_t i = 0; i < D; i += 16) {
        const __m512 unit = rounded(_mm512_mul_ps(load16(x, dtype, i, D - i), factor), dtype);
        store16(y, dtype, i, D - i, _mm512_mul_ps(load16(weight, dtype, i, D - i), unit));
    }
}

// Products and sum are rounded one by one: no fused multiply-add.
MINILLM_AVX512 void rotate_head(const void* x, const void* cos, const void* sin, void* y, Dtype dtype, int64_t E,
                                int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t left = half - i;
        const __m512 a = load16(x, dtype, i, left), b = load16(x, dtype, half + i, left);
        const __m512 a_cos = rounded(_mm512_mul_ps(a, load16(cos, dtype, i, left)), dtype);
        const __m512 b_sin = rounded(_mm512_mul_ps(b, load16(sin, dtype, i, left)), dtype);
        const __m512 b_cos = rounded(_mm512_mul_ps(b, load16(cos, dtype, half + i, left)), dtype);
        const __m512 a_sin = rounded(_mm512_mul_ps(a, load16(sin, dtype, half + i, left)), dtype);
        store16(y, dtype, i, left, _mm512_sub_ps(a_cos, b_sin));
        store16(y, dtype, half + i, left, _mm512_add_ps(b_cos, a_sin));
    }
    std::memcpy(offset(y, dtype, d), offset(x, dtype, d), (E - d) * size_of(dtype));
}

// exp(x) = 2^n 2^f, n = round(x / ln 2), |f| <= 1/2: x - n ln 2 in two parts, then Taylor's series to the sixth power,
// whose next term is (ln 2 / 2)^7 / 7! = 1.2e-7, half a rounding of fp32. At -150 it is 0 already, at 150 infinity.
MINILLM_AVX512 inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(150.0f), _mm512_max_ps(_mm512_set1_ps(-150.0f), x));  // in this order NaN stays
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

MINILLM_AVX512 void swiglu(const void* gate, const void* up, void* y, Dtype dtype, int64_t count) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 g = load16(gate, dtype, i, count - i);
        const __m512 shrink = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
        const __m512 silu = rounded(_mm512_div_ps(g, shrink), dtype);
        store16(y, dtype, i, count - i, _mm512_mul_ps(silu, load16(up, dtype, i, count - i)));
    }
}

MINILLM_AVX512 void add(const void* a, const void* b, void* y, Dtype dtype, int64_t count) {
    for (int64_t i = 0; i < count; i += 16)
        store16(y, dtype, i, count - i, _mm512_add_ps(load16(a, dtype, i, count - i), load16(b, dtype, i, count - i)));
}

}  // namespace

const BlockKernels& block_avx512() {
    static const BlockKernels kernels = {rms_norm_row, rotate_head, swiglu, add};
    return kernels;
}

}  // namespace minillm

#endif
