// Sixteen fp32 numbers at a time, in and out of every float format. AVX-512 F and BW.
#pragma once

#include <immintrin.h>

#include "numbers.h"

#define MINILLM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))

// Loops of constant length over registers: unrolled before arrays are placed, or gcc keeps the sums in memory as well.
#define MINILLM_UNROLL _Pragma("GCC unroll 8")
#define MINILLM_UNROLL16 _Pragma("GCC unroll 16")

namespace minillm {
namespace {  // code for one instruction set must never be merged with that of another

MINILLM_AVX512 inline __mmask16 first(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

// x[index .. index + 15] as fp32; beyond `count` numbers zero, and not read.
MINILLM_AVX512 inline __m512 load16(const void* x, Dtype dtype, int64_t index, int64_t count) {
    const __mmask16 mask = first(count);
    if (dtype == Dtype::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + index);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + index);
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The same of sixteen numbers that are there.
MINILLM_AVX512 inline __m512 load_full16(const void* x, Dtype dtype, int64_t index) {
    if (dtype == Dtype::f32) return _mm512_loadu_ps(static_cast<const float*>(x) + index);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + index));
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// f32_to_bf16 sixteen times. Not vcvtneps2bf16, which takes subnormals for zero.
MINILLM_AVX512 inline __m256i to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
}

MINILLM_AVX512 inline void store16(void* x, Dtype dtype, int64_t index, int64_t count, __m512 value) {
    const __mmask16 mask = first(count);
    if (dtype == Dtype::f32) {
        _mm512_mask_storeu_ps(static_cast<float*>(x) + index, mask, value);
        return;
    }
    const __m256i half =
        dtype == Dtype::bf16 ? to_bf16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(x) + index, mask, half);
}

// 2^x for x <= 0: a polynomial for the fraction, 8e-8 of the value away at most (least squares in the largest error),
// and the exponent from its whole part. 2^-infinity is 0.
MINILLM_AVX512 inline __m512 exp2(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    const float by[] = {0x1.ec320ap-10f, 0x1.26900ep-7f, 0x1.c95446p-5f,
                        0x1.ebd5a8p-3f,  0x1.62e4f6p-1f, 0x1.fffffep-1f};
    __m512 power = _mm512_set1_ps(by[0]);
    MINILLM_UNROLL16
    for (int i = 1; i < 6; ++i) power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(by[i]));
    return _mm512_scalef_ps(power, x);
}

// Sixteen rows of 64 bytes, as dwords, transposed: out[i] holds dword i of every row.
MINILLM_AVX512 inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    MINILLM_UNROLL
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    MINILLM_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    MINILLM_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    MINILLM_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace
}  // namespace minillm
