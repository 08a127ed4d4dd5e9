// NF4 for x in bf16: a vpermw turns 32 codes into bf16, a vdpbf16ps multiplies them by 32 numbers of x.
//
// 128 weights, 64 bytes, cost three shifts, four vpermw, four vdpbf16ps and, for their two blocks' absmax, a vpermps
// and a fused multiply-add: 13 instructions. vdpbf16ps sums in fp32, rounds to nearest and takes subnormals for zero.

#if defined(__x86_64__)

#include "nf4.h"
#include "nf4_avx512.h"

#define MINILLM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,f16c,fma")))

namespace minillm {
namespace {

// out[s][w] = x[4 w + {1, 0, 3, 2}[s]]: what meets the half byte at bits 4 s of word w.
MINILLM_BF16 void arrange(const void* x, Dtype, int64_t K, void* arranged) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    uint16_t* out = static_cast<uint16_t*>(arranged);
    for (int64_t k = 0; k < K; k += nf4_chunk, out += nf4_chunk)
        for (int64_t w = 0; w < 32; w += 8) {  // eight quadwords of four numbers
            const int64_t count = K - k - 4 * w;
            const __mmask32 mask = count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
            const __m512i fours = _mm512_maskz_loadu_epi16(mask, in + k + 4 * w);
            const auto words = [&](int s) { return reinterpret_cast<__m128i*>(out + 32 * s + w); };
            _mm_store_si128(words(0), _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 16)));
            _mm_store_si128(words(1), _mm512_cvtepi64_epi16(fours));
            _mm_store_si128(words(2), _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 48)));
            _mm_store_si128(words(3), _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 32)));
        }
}

MINILLM_BF16 inline __m512 multiply_add(__m512 sum, __m512i weights, const uint16_t* x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(_mm512_load_si512(x)));
}

// The 128 weights from k on.
template <int M, bool is_inside>
MINILLM_BF16 inline void dot_chunk(const uint16_t* x, int64_t stride, const Nf4Row& row, int64_t k, __m512i table,
                                   __m512i lanes, __m512* total) {
    const __m512i packed = packed_at<is_inside>(row, k);
    __m512i weights[4];
    MINILLM_UNROLL
    for (int s = 0; s < 4; ++s) weights[s] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4 * s), table);
    const __m512 scale = absmax_at<is_inside>(row, k, lanes);
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        __m512 sum = _mm512_setzero_ps();
        MINILLM_UNROLL
        for (int s = 0; s < 4; ++s) sum = multiply_add(sum, weights[s], x + m * stride + k + 32 * s);
        total[m] = _mm512_fmadd_ps(sum, scale, total[m]);
    }
}

template <int M>
MINILLM_BF16 void dot_rows(const uint16_t* x, const Nf4Row& row, const Nf4Code& code, float* y) {
    const int64_t stride = (row.K + nf4_chunk - 1) / nf4_chunk * nf4_chunk;
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code.bf16_code)));
    const __m512i lanes = block_of_lane(row.shift);
    __m512 total[M];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    int64_t k = 0;
    if (row.shift <= 6)
        for (; k + 256 <= row.K; k += nf4_chunk) dot_chunk<M, true>(x, stride, row, k, table, lanes, total);
    for (; k < row.K; k += nf4_chunk) dot_chunk<M, false>(x, stride, row, k, table, lanes, total);
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) y[m] = _mm512_reduce_add_ps(total[m]) * (1.0f / code.bf16_factor);
}

void dot(const void* arranged, int64_t M, const Nf4Row& row, const Nf4Code& code, float* y) {
    const uint16_t* x = static_cast<const uint16_t*>(arranged);
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

const Nf4Kernels& nf4_avx512bf16() {
    const Nf4Kernels& plain = nf4_avx512();
    static const Nf4Kernels kernels = {plain.quantise,
                                       plain.dequantise,
                                       plain.dequantise_blocks,
                                       plain.widen,
                                       plain.multiply,
                                       arrange,
                                       dot,
                                       nf4_chunk * sizeof(uint16_t)};
    return kernels;
}

}  // namespace minillm

#endif
