// int8 kernels for AVX-512 with VNNI: 64 products an instruction, sums kept in sixteen int32 lanes.
//
// The weights are the unsigned side of vpdpbusd (w ^ 0x80 = w + 128, see int8_linear.h), so that only the sum of q,
// once a row of x, is needed to take the 128 away again, and q can be broadcast.

#if defined(__x86_64__)

#include <algorithm>
#include <limits>

#include "int8_linear.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

MINILLM_AVX512 float absmax(const void* x, Dtype dtype, int64_t K, float threshold, uint8_t* is_outlier) {
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512 largest = _mm512_setzero_ps();
    __mmask16 nans = 0;
    for (int64_t k = 0; k < K; k += 16) {
        const __m512 value = load16(x, dtype, k, K - k), size = _mm512_abs_ps(value);
        const __mmask16 outside = _mm512_cmp_ps_mask(size, limit, _CMP_GE_OQ);
        nans |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
        largest = _mm512_mask_max_ps(largest, static_cast<__mmask16>(~outside), largest, size);
        if (outside)
            for (int64_t i = 0; i < 16 && k + i < K; ++i)
                if (outside >> i & 1) is_outlier[k + i] = 1;
    }
    return nans ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
}

MINILLM_AVX512 void quantise(const void* x, Dtype dtype, int64_t K, float scale, int8_t* q) {
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale * 127.0f : 0.0f);
    const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    for (int64_t k = 0; k < K; k += 16) {
        const __m512 value = _mm512_mul_ps(load16(x, dtype, k, K - k), inverse);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(value, most), least));  // ties to even
        _mm_mask_storeu_epi8(q + k, first(K - k), _mm512_cvtepi32_epi8(rounded));
    }
}

MINILLM_AVX512 void dequantise(const int8_t* w, float scale, int64_t K, void* out, Dtype dtype) {
    const __m512 factor = _mm512_set1_ps(scale * (1.0f / 127));
    for (int64_t k = 0; k < K; k += 16) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(K - k), w + k));
        store16(out, dtype, k, K - k, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factor));
    }
}

// The sum of sixteen lanes, which may wrap: _mm512_reduce_add_epi32 ends in an addition of ints, which must not.
MINILLM_AVX512 inline int32_t sum_of_lanes(__m512i x) {
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i pair = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}

MINILLM_AVX512 int32_t sum_of(const int8_t* q, int64_t stride) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < stride; k += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(q + k));
    return sum_of_lanes(sum);
}

// R rows of w against M rows of q. The last bytes of a row are masked; q is zero there.
template <int M, int R>
MINILLM_AVX512 void dot_block(const int8_t* q, int64_t stride, const int8_t* w, int64_t K, const int32_t* sums_of_q,
                              int32_t* sums) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i total[M][R];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) MINILLM_UNROLL
    for (int r = 0; r < R; ++r) total[m][r] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
        __m512i row[R];
        MINILLM_UNROLL
        for (int r = 0; r < R; ++r) row[r] = _mm512_xor_si512(_mm512_loadu_si512(w + r * K + k), flip);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i x = _mm512_loadu_si512(q + m * stride + k);
            MINILLM_UNROLL
            for (int r = 0; r < R; ++r) total[m][r] = _mm512_dpbusd_epi32(total[m][r], row[r], x);
        }
    }
    if (k < K) {
        const __mmask64 rest = (1ull << (K - k)) - 1;
        MINILLM_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m512i row = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, w + r * K + k), flip);
            MINILLM_UNROLL
            for (int m = 0; m < M; ++m)
                total[m][r] = _mm512_dpbusd_epi32(total[m][r], row, _mm512_loadu_si512(q + m * stride + k));
        }
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) MINILLM_UNROLL
    for (int r = 0; r < R; ++r)
        sums[m * max_panel + r] = static_cast<int32_t>(static_cast<uint32_t>(sum_of_lanes(total[m][r])) -
                                                       128u * static_cast<uint32_t>(sums_of_q[m]));
}

// One row of x: four streams of sums hide the latency, one row of w at a time keeps the memory's stream whole.
MINILLM_AVX512 void dot_one(const int8_t* q, const int8_t* w, int64_t n, int64_t K, int32_t sum_of_q, int32_t* sums) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t j = 0; j < n; ++j) {
        const int8_t* row = w + j * K;
        __m512i total[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                            _mm512_setzero_si512()};
        int64_t k = 0;
        for (; k + 256 <= K; k += 256) MINILLM_UNROLL
        for (int i = 0; i < 4; ++i)
            total[i] = _mm512_dpbusd_epi32(total[i], _mm512_xor_si512(_mm512_loadu_si512(row + k + 64 * i), flip),
                                           _mm512_loadu_si512(q + k + 64 * i));
        for (; k < K; k += 64) {
            const __mmask64 rest = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
            total[0] = _mm512_dpbusd_epi32(total[0], _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, row + k), flip),
                                           _mm512_loadu_si512(q + k));
        }
        const __m512i all =
            _mm512_add_epi32(_mm512_add_epi32(total[0], total[1]), _mm512_add_epi32(total[2], total[3]));
        sums[j] =
            static_cast<int32_t>(static_cast<uint32_t>(sum_of_lanes(all)) - 128u * static_cast<uint32_t>(sum_of_q));
    }
}

template <int M>
MINILLM_AVX512 void dot_rows(const int8_t* q, int64_t stride, const int8_t* w, int64_t n, int64_t K, int32_t* sums) {
    int32_t sums_of_q[M];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) sums_of_q[m] = sum_of(q + m * stride, stride);
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) dot_block<M, 2>(q, stride, w + j * K, K, sums_of_q, sums + j);
    if (j < n) dot_block<M, 1>(q, stride, w + j * K, K, sums_of_q, sums + j);
}

void dot(const int8_t* q, int64_t stride, int64_t M, const int8_t* w, int64_t n, int64_t K, int32_t* sums) {
    switch (M) {
        case 1:
            dot_one(q, w, n, K, sum_of(q, stride), sums);
            break;
        case 2:
            dot_rows<2>(q, stride, w, n, K, sums);
            break;
        case 3:
            dot_rows<3>(q, stride, w, n, K, sums);
            break;
        case 4:
            dot_rows<4>(q, stride, w, n, K, sums);
            break;
        case 5:
            dot_rows<5>(q, stride, w, n, K, sums);
            break;
        case 6:
            dot_rows<6>(q, stride, w, n, K, sums);
            break;
        case 7:
            dot_rows<7>(q, stride, w, n, K, sums);
            break;
        default:
            dot_rows<8>(q, stride, w, n, K, sums);
    }
}

// --- panels: packed[k / 4][j][k % 4] = w[j, k] ^ 0x80, j < 64; columns beyond n and k beyond K are w = 0

MINILLM_AVX512 void pack(const int8_t* w, int64_t n, int64_t K, uint8_t* packed) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < K; k += 64) {
        const __mmask64 rest = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
        for (int64_t j0 = 0; j0 < max_panel; j0 += 16) {
            __m512i r[16];
            for (int64_t j = 0; j < 16; ++j) {
                const __m512i row =
                    j0 + j < n ? _mm512_maskz_loadu_epi8(rest, w + (j0 + j) * K + k) : _mm512_setzero_si512();
                r[j] = _mm512_xor_si512(row, flip);
            }
            transpose(r);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(packed + (k / 4 + i) * 4 * max_panel + 4 * j0, r[i]);
        }
    }
}

// M x 64 sums in registers: per four k, four loads of the panel, M broadcasts and 4 M products.
template <int M>
MINILLM_AVX512 void tile_rows(const int8_t* q, int64_t stride, const uint8_t* packed, int64_t K, int32_t* sums) {
    __m512i total[M][4];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) {
        const __m512i start =
            _mm512_set1_epi32(static_cast<int32_t>(-128u * static_cast<uint32_t>(sum_of(q + m * stride, stride))));
        MINILLM_UNROLL
        for (int i = 0; i < 4; ++i) total[m][i] = start;
    }
    for (int64_t k = 0; k < K; k += 4) {
        __m512i w[4];
        MINILLM_UNROLL
        for (int i = 0; i < 4; ++i) w[i] = _mm512_load_si512(packed + k * max_panel + 64 * i);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(q + m * stride + k));
            MINILLM_UNROLL
            for (int i = 0; i < 4; ++i) total[m][i] = _mm512_dpbusd_epi32(total[m][i], w[i], x);
        }
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) MINILLM_UNROLL
    for (int i = 0; i < 4; ++i) _mm512_store_si512(sums + m * max_panel + 16 * i, total[m][i]);
}

constexpr int64_t most_tile_rows = 6;  // 24 of 32 registers hold sums

void tile(const int8_t* q, int64_t stride, int64_t M, const uint8_t* packed, int64_t K, int32_t* sums) {
    switch (M) {
        case 1:
            tile_rows<1>(q, stride, packed, K, sums);
            break;
        case 2:
            tile_rows<2>(q, stride, packed, K, sums);
            break;
        case 3:
            tile_rows<3>(q, stride, packed, K, sums);
            break;
        case 4:
            tile_rows<4>(q, stride, packed, K, sums);
            break;
        case 5:
            tile_rows<5>(q, stride, packed, K, sums);
            break;
        default:
            tile_rows<6>(q, stride, packed, K, sums);
    }
}

// sixteen columns of R rows from m on. The rows' chains of sums run side by side: one alone would wait four cycles for
// each of its sums.
template <int R>
MINILLM_AVX512 void finish_rows(const Int8Block& b, int64_t m, int64_t j) {
    const __mmask16 mask = first(b.n - j);
    const __m512 scale_w = _mm512_maskz_loadu_ps(mask, b.scale_w + j);
    const __m512 integer_scale = _mm512_mul_ps(scale_w, _mm512_set1_ps(1.0f / (127 * 127)));
    const __m512 float_scale = _mm512_mul_ps(scale_w, _mm512_set1_ps(1.0f / 127));
    const __m512 bias = b.bias ? load16(b.bias, b.dtype, j, b.n - j) : _mm512_setzero_ps();
    __m512 outliers[R];
    MINILLM_UNROLL
    for (int r = 0; r < R; ++r) outliers[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < b.outliers; ++c) {
        const __m512 column = _mm512_maskz_loadu_ps(mask, b.columns + c * max_panel + j);
        MINILLM_UNROLL
        for (int r = 0; r < R; ++r)
            outliers[r] = _mm512_fmadd_ps(_mm512_set1_ps(b.values[(m + r) * b.outliers + c]), column, outliers[r]);
    }
    MINILLM_UNROLL
    for (int r = 0; r < R; ++r) {
        const __m512 sums = _mm512_cvtepi32_ps(_mm512_load_si512(b.sums + (m + r) * max_panel + j));
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(b.scale_x[m + r]), integer_scale);
        const __m512 y = _mm512_fmadd_ps(sums, scale, _mm512_fmadd_ps(outliers[r], float_scale, bias));
        store16(b.y, b.dtype, (m + r) * b.N + j, b.n - j, y);
    }
}

void finish(const Int8Block& b) {
    for (int64_t j = 0; j < b.n; j += 16) {
        int64_t m = 0;
        for (; m + 6 <= b.M; m += 6) finish_rows<6>(b, m, j);
        for (; m + 2 <= b.M; m += 2) finish_rows<2>(b, m, j);
        for (; m < b.M; ++m) finish_rows<1>(b, m, j);
    }
}

}  // namespace

const Int8Kernels& int8_avx512vnni() {
    static const Int8Kernels kernels = {absmax, quantise, dequantise, dot, finish, pack, tile, most_tile_rows};
    return kernels;
}

}  // namespace minillm

#endif
