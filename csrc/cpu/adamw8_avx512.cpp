// The 8-bit AdamW step sixteen numbers at a time.

#if defined(__x86_64__)

#include "adamw8.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

constexpr int steps = 65536;

// A table of 256 in sixteen registers: eight lookups by the low five bits of a code, of which the other three choose.
// Beyond `count` zeros.
MINILLM_AVX512 void expand(const Adamw8Moment& moment, int64_t begin, int count, float* out) {
    __m512 table[16];
    MINILLM_UNROLL
    for (int t = 0; t < 16; ++t) table[t] = _mm512_loadu_ps(moment.map.map + 16 * t);
    const __m512 absmax = _mm512_set1_ps(moment.absmax[begin / adamw8_block]);
    for (int i = 0; i < count; i += 16) {
        const __mmask16 mask = first(count - i);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, moment.codes + begin + i));
        __m512 found[8];
        MINILLM_UNROLL
        for (int t = 0; t < 8; ++t) found[t] = _mm512_permutex2var_ps(table[2 * t], code, table[2 * t + 1]);
        MINILLM_UNROLL
        for (int bit = 0; bit < 3; ++bit) {
            const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32 << bit));
            MINILLM_UNROLL
            for (int t = 0; t < 4 >> bit; ++t) found[t] = _mm512_mask_blend_ps(upper, found[2 * t], found[2 * t + 1]);
        }
        _mm512_store_ps(out + i, _mm512_maskz_mul_ps(mask, found[0], absmax));
    }
}

struct Largest {
    __m512 m, v;
};

// p steps, m and v become the new ones.
MINILLM_AVX512 Largest update(const Adamw8& step, const Adamw8Rates& r, int64_t begin, int count, float* m, float* v) {
    Largest largest = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512 rest1 = _mm512_set1_ps(r.rest1), beta1 = _mm512_set1_ps(r.beta1), rest2 = _mm512_set1_ps(r.rest2),
                 beta2 = _mm512_set1_ps(r.beta2), decay = _mm512_set1_ps(r.decay), size = _mm512_set1_ps(r.size),
                 root = _mm512_set1_ps(r.root), eps = _mm512_set1_ps(r.eps);
    for (int i = 0; i < count; i += 16) {
        const __m512 g = load16(step.g, step.dtype, begin + i, count - i);
        const __m512 p = load16(step.p, step.dtype, begin + i, count - i);
        const __m512 new_m = _mm512_fmadd_ps(g, rest1, _mm512_mul_ps(_mm512_load_ps(m + i), beta1));
        const __m512 new_v = _mm512_fmadd_ps(_mm512_mul_ps(rest2, g), g, _mm512_mul_ps(_mm512_load_ps(v + i), beta2));
        const __m512 divisor = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(new_v), root), eps);
        const __m512 change = _mm512_div_ps(_mm512_mul_ps(size, new_m), divisor);
        store16(step.p, step.dtype, begin + i, count - i, _mm512_add_ps(_mm512_mul_ps(p, decay), change));
        _mm512_store_ps(m + i, new_m);
        _mm512_store_ps(v + i, new_v);
        largest.m = _mm512_max_ps(largest.m, _mm512_abs_ps(new_m));
        largest.v = _mm512_max_ps(largest.v, new_v);
    }
    return largest;
}

// Steps by vectors, codes one by one from the table.
MINILLM_AVX512 void compress(const float* x, float absmax, int64_t begin, int count, const Adamw8Moment& moment) {
    alignas(64) uint16_t step[adamw8_block];
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f), inverse = _mm512_set1_ps(1.0f / absmax);
    for (int i = 0; i < count; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(x + i), inverse);
        const __m512 unit = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-1.0f)), one);  // NaN becomes -1
        const __m512 part = _mm512_mul_ps(_mm512_add_ps(unit, one), half);
        const __m512 place = _mm512_add_ps(_mm512_mul_ps(part, _mm512_set1_ps(steps - 1)), half);
        _mm256_store_si256(reinterpret_cast<__m256i*>(step + i), _mm512_cvtepi32_epi16(_mm512_cvttps_epi32(place)));
    }
    const uint8_t* code_of = moment.map.codes;
    uint8_t* codes = moment.codes + begin;
    int i = 0;
    for (; i + 8 <= count; i += 8) MINILLM_UNROLL
    for (int k = 0; k < 8; ++k) codes[i + k] = code_of[step[i + k]];
    for (; i < count; ++i) codes[i] = code_of[step[i]];
}

MINILLM_AVX512 void finish(const float* x, __m512 largest, int64_t begin, int count, const Adamw8Moment& moment) {
    const float absmax = _mm512_reduce_max_ps(largest);
    moment.absmax[begin / adamw8_block] = absmax;
    if (absmax > 0) {
        compress(x, absmax, begin, count, moment);
    } else {
        for (int i = 0; i < count; ++i) moment.codes[begin + i] = 0;
    }
}

}  // namespace

MINILLM_AVX512 void adamw8_avx512(const Adamw8& step, const Adamw8Rates& rates, int64_t begin, int count) {
    alignas(64) float m[adamw8_block], v[adamw8_block];
    expand(step.m, begin, count, m);
    expand(step.v, begin, count, v);
    const Largest largest = update(step, rates, begin, count, m, v);
    finish(m, largest.m, begin, count, step.m);
    finish(v, largest.v, begin, count, step.v);
}

}  // namespace minillm

#endif
