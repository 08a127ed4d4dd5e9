// NF4 kernels for AVX-512: sixteen codes at a time, one vpermps each; x in fp32.

#if defined(__x86_64__)

#include "nf4_avx512.h"

#include <algorithm>
#include <limits>

#include "nf4.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

MINILLM_AVX512 float absmax_of(const void* x, Dtype dtype, int64_t count) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 nans = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 size = _mm512_abs_ps(load16(x, dtype, i, count - i));
        nans |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, size);
    }
    return nans ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
}

// The number of bounds below, by halving: is it at least 8, then 4 more, 2 more, 1 more?
MINILLM_AVX512 inline __m512i rank_of(__m512 value, __m512 bounds) {
    __m512i rank = _mm512_setzero_si512();
    MINILLM_UNROLL
    for (int step = 8; step > 0; step /= 2) {
        const __m512i last = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
        const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(last, bounds), value, _CMP_NGE_UQ);
        rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
    }
    return rank;
}

MINILLM_AVX512 float quantise(const void* x, Dtype dtype, int64_t count, bool is_short, const Nf4Code& code,
                              uint8_t* q) {
    const float absmax = absmax_of(x, dtype, count), divisor = std::max(absmax, 1e-38f);
    const __m512 by = _mm512_set1_ps(divisor), inverse = _mm512_set1_ps(1.0f / divisor);
    const __m512 bounds = _mm512_loadu_ps(code.bounds);
    const __m512i order = _mm512_loadu_si512(code.order);
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 value = load16(x, dtype, i, count - i);
        const __m512 scaled = is_short ? _mm512_div_ps(value, by) : _mm512_mul_ps(value, inverse);
        const __m512i found = _mm512_permutexvar_epi32(rank_of(scaled, bounds), order);
        _mm_mask_storeu_epi8(q + i, first(count - i), _mm512_cvtepi32_epi8(found));
    }
    return is_short ? divisor : absmax;
}

MINILLM_AVX512 void dequantise(const uint8_t* packed, const float* code, float absmax, int64_t count, void* out,
                               Dtype dtype) {
    const __m512 table = _mm512_loadu_ps(code), scale = _mm512_set1_ps(absmax);
    const __m512i shifts = _mm512_set1_epi64(int64_t{4});  // dwords 4, 0, 4, 0, ...: high half byte first
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t bytes = std::min<int64_t>(8, (count - i + 1) / 2);
        const __m128i eight = _mm_maskz_loadu_epi8(first(bytes), packed + i / 2);
        const __m512i index = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(eight, eight)), shifts);
        store16(out, dtype, i, count - i, _mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale));
    }
}

// Sixteen numbers in 16 bits, twice over: what `table` is where a lookup goes by five bits, the lowest four of which
// count.
MINILLM_AVX512 inline __m512i halves(__m512 x, Dtype dtype) {
    const __m256i half =
        dtype == Dtype::bf16 ? to_bf16(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_broadcast_i64x4(half);
}

// A block has sixteen different numbers: they are scaled and rounded once, and looked up, 32 an instruction.
MINILLM_AVX512 void dequantise_16_bits(const uint8_t* packed, __m512i table, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; i += 32) {
        const int64_t left = count - i;
        const __m128i bytes = left >= 32 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2))
                                         : _mm_maskz_loadu_epi8(first(left / 2), packed + i / 2);
        const __m512i both = _mm512_cvtepu8_epi32(bytes);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
        const __m512i found = _mm512_permutexvar_epi16(index, table);
        if (left >= 32)
            _mm512_storeu_si512(out + i, found);
        else
            _mm512_mask_storeu_epi16(out + i, (1u << left) - 1, found);
    }
}

MINILLM_AVX512 void dequantise_blocks(const uint8_t* packed, const float* code, const float* absmax, int64_t blocks,
                                      int64_t block, void* out, Dtype dtype) {
    const __m512 table = _mm512_loadu_ps(code);
    for (int64_t b = 0; b < blocks; ++b, packed += block / 2) {
        if (dtype == Dtype::f32) {
            dequantise(packed, code, absmax[b], block, offset(out, dtype, b * block), dtype);
            continue;
        }
        const __m512i scaled = halves(_mm512_mul_ps(table, _mm512_set1_ps(absmax[b])), dtype);
        dequantise_16_bits(packed, scaled, block, static_cast<uint16_t*>(out) + b * block);
    }
}

// A table of 256 in sixteen registers: eight lookups by the low five bits of a code, of which the other three choose.
MINILLM_AVX512 void widen(const uint8_t* codes, const float* map, float scale, float offset, int64_t count,
                          float* out) {
    __m512 table[16];
    MINILLM_UNROLL
    for (int t = 0; t < 16; ++t) table[t] = _mm512_loadu_ps(map + 16 * t);
    for (int64_t b = 0; b < count; b += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count - b), codes + b));
        __m512 found[8];
        MINILLM_UNROLL
        for (int t = 0; t < 8; ++t) found[t] = _mm512_permutex2var_ps(table[2 * t], code, table[2 * t + 1]);
        MINILLM_UNROLL
        for (int bit = 0; bit < 3; ++bit) {
            const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32 << bit));
            MINILLM_UNROLL
            for (int t = 0; t < 4 >> bit; ++t) found[t] = _mm512_mask_blend_ps(upper, found[2 * t], found[2 * t + 1]);
        }
        const __m512 product = _mm512_mul_ps(found[0], _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(out + b, first(count - b), _mm512_add_ps(product, _mm512_set1_ps(offset)));
    }
}

MINILLM_AVX512 void multiply(const float* x, int64_t M, const float* w, int64_t K, float* y) {
    for (int64_t m = 0; m < M; ++m, x += K) {
        __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        int64_t k = 0;
        for (; k + 32 <= K; k += 32) MINILLM_UNROLL
        for (int i = 0; i < 2; ++i)
            total[i] = _mm512_fmadd_ps(_mm512_loadu_ps(x + k + 16 * i), _mm512_loadu_ps(w + k + 16 * i), total[i]);
        for (; k < K; k += 16)
            total[0] = _mm512_fmadd_ps(load16(x, Dtype::f32, k, K - k), load16(w, Dtype::f32, k, K - k), total[0]);
        y[m] = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    }
}

// --- rows as they lie: a dword of packed holds eight numbers; lane i of vector t meets x[8 i + (t ^ 1)]

void arrange(const void* x, Dtype dtype, int64_t K, void* arranged) {
    float* out = static_cast<float*>(arranged);
    for (int64_t k = 0; k < K; k += nf4_chunk, out += nf4_chunk)
        for (int64_t t = 0; t < 8; ++t)
            for (int64_t i = 0; i < 16; ++i) {
                const int64_t from = k + 8 * i + (t ^ 1);
                out[16 * t + i] = from < K ? load(x, dtype, from) : 0.0f;
            }
}

template <int M>
MINILLM_AVX512 void dot_rows(const float* x, const Nf4Row& row, const Nf4Code& code, float* y) {
    const int64_t stride = (row.K + nf4_chunk - 1) / nf4_chunk * nf4_chunk;
    const __m512 table = _mm512_loadu_ps(code.code);
    const __m512i lanes = block_of_lane(row.shift);
    __m512 total[M];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < row.K; k += nf4_chunk) {
        __m512i packed = packed_at<false>(row, k);
        __m512 sum[M];
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_ps();
        MINILLM_UNROLL
        for (int t = 0; t < 8; ++t) {
            const __m512 weights = _mm512_permutexvar_ps(packed, table);
            packed = _mm512_srli_epi32(packed, 4);
            MINILLM_UNROLL
            for (int m = 0; m < M; ++m)
                sum[m] = _mm512_fmadd_ps(weights, _mm512_load_ps(x + m * stride + k + 16 * t), sum[m]);
        }
        const __m512 scale = absmax_at<false>(row, k, lanes);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(sum[m], scale, total[m]);
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) y[m] = _mm512_reduce_add_ps(total[m]);
}

void dot(const void* arranged, int64_t M, const Nf4Row& row, const Nf4Code& code, float* y) {
    const float* x = static_cast<const float*>(arranged);
    switch (M) {
        case 1:
            dot_rows<1>(x, row, code, y);
            break;
        case 2:
            dot_rows<2>(x, row, code, y);
            break;
        case 3:
            dot_rows<3>(x, row, code, y);
            break;
        case 4:
            dot_rows<4>(x, row, code, y);
            break;
        case 5:
            dot_rows<5>(x, row, code, y);
            break;
        case 6:
            dot_rows<6>(x, row, code, y);
            break;
        case 7:
            dot_rows<7>(x, row, code, y);
            break;
        default:
            dot_rows<8>(x, row, code, y);
    }
}

}  // namespace

const Nf4Kernels& nf4_avx512() {
    static const Nf4Kernels kernels = {quantise, dequantise, dequantise_blocks,        widen, multiply,
                                       arrange,  dot,        nf4_chunk * sizeof(float)};
    return kernels;
}

}  // namespace minillm

#endif
