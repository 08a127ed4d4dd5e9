// A dword of attention in bf16, two numbers: 32 products an instruction, summed in fp32. AVX-512 with BF16.
//
// vdpbf16ps rounds to nearest and takes subnormals for zero; so does vcvtne2ps2bf16, for weights below 2^-126.
#pragma once

#include "vectors_avx512.h"

#define MINILLM_TILE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma")))

namespace minillm {
namespace {

struct Numbers {
    static constexpr int packed = 2;

    MINILLM_TILE static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    // x[e .. e + 31]; beyond `count` numbers zero, and not read.
    MINILLM_TILE static __m512i row(const void* x, Dtype, int64_t e, int64_t count) {
        const uint16_t* numbers = static_cast<const uint16_t*>(x) + e;
        return count >= 32 ? _mm512_loadu_si512(numbers) : _mm512_maskz_loadu_epi16((1u << count) - 1, numbers);
    }

    // (value[e], next[e]) in each of sixteen dwords.
    MINILLM_TILE static __m512i values(const void* value, const void* next, Dtype, int64_t e, int64_t count) {
        const __m512i low = wide(value, e, count);
        return next ? _mm512_or_si512(low, _mm512_slli_epi32(wide(next, e, count), 16)) : low;
    }

    // (weight[0], weight[1]) in each of sixteen dwords.
    MINILLM_TILE static __m512i pack(const __m512 (&weight)[2]) {
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weight[1], weight[0]));
        return _mm512_permutexvar_epi16(pairs(), both);
    }

    MINILLM_TILE static void store_row(int32_t* out, __m512 x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }

  private:
    MINILLM_TILE static __m512i wide(const void* x, int64_t e, int64_t count) {
        const uint16_t* numbers = static_cast<const uint16_t*>(x) + e;
        return _mm512_cvtepu16_epi32(count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers))
                                                 : _mm256_maskz_loadu_epi16(first(count), numbers));
    }

    // 0, 16, 1, 17, ...
    MINILLM_TILE static __m512i pairs() {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(0x100000));
    }
};

}  // namespace
}  // namespace minillm
