// What the AVX-512 variants of NF4 share: 64 bytes of a row and the absmax of each of their sixteen lanes.
#pragma once

#include <algorithm>

#include "nf4.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {  // code for one instruction set must never be merged with that of another

// How far ahead of its use a row is asked for: rows follow each other in memory, and a line costs more instructions
// here than in int8, so that the processor by itself has too few under way. 4096: 10 to 15% faster than none, 1024
// about equal.
constexpr int64_t prefetch_bytes = 4096;

// 128 weights of the row; beyond its end zeros, and not read. is_inside: its end is at least 256 weights away.
template <bool is_inside>
MINILLM_AVX512 inline __m512i packed_at(const Nf4Row& row, int64_t k) {
    const uint8_t* packed = row.packed + k / 2;
    _mm_prefetch(packed + prefetch_bytes, _MM_HINT_T0);
    const int64_t bytes = (row.K - k) / 2;
    return is_inside || bytes >= 64 ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi8((1ull << bytes) - 1, packed);
}

// A lane of 32 bits holds eight weights: lane i belongs to block 8 i / block of those that packed_at touches.
MINILLM_AVX512 inline __m512i block_of_lane(int shift) {
    const __m512i first_weight = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    return _mm512_srlv_epi32(first_weight, _mm512_set1_epi32(shift));
}

template <bool is_inside>
MINILLM_AVX512 inline __m512 absmax_at(const Nf4Row& row, int64_t k, __m512i lanes) {
    const float* absmax = row.absmax + (k >> row.shift);
    const int64_t blocks = (row.K - k) >> row.shift;  // 0 within a block longer than 128
    if (is_inside || blocks >= 4) return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(absmax)));
    return _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(first(std::max<int64_t>(blocks, 1)), absmax));
}

}  // namespace
}  // namespace minillm
