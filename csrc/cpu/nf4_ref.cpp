// The definition of every NF4 kernel, and the codes.

#include <algorithm>
#include <cmath>

#include "nf4.h"

namespace minillm {
namespace {

// bf16_factor is the c that makes round_bf16(c code) / c best for normal weights in blocks of 64. Root mean square
// error of a weight: 1.02e-3 of it, against 1.36e-3 with c = 1 and about 1.1e-3 when code * absmax is rounded; and the
// mean error is 6e-7 of absmax, not 1.8e-4, so that nothing adds up where all x have one sign. FP4's codes are small
// integers over 12 or 192, exact in bf16 times 12.
constexpr float nf4_factor = 0x1.3042p+0f, fp4_factor = 12.0f;

Nf4Code complete(const float (&code)[16], const int32_t (&order)[16], float bf16_factor) {
    Nf4Code all{};
    all.bf16_factor = bf16_factor;
    for (int i = 0; i < 16; ++i) {
        all.code[i] = code[i];
        all.order[i] = order[i];
        all.bf16_code[i] = f32_to_bf16(code[i] * bf16_factor);
    }
    for (int i = 0; i < 15; ++i) all.bounds[i] = (code[order[i]] + code[order[i + 1]]) / 2;
    return all;
}

// Quantiles of the normal distribution (§3 of the paper), as bitsandbytes has them to the last bit.
Nf4Code normal_floats() {
    return complete({-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                     0.7229568362236023f, 1.0f},
                    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, nf4_factor);
}

// Sign, two bits of exponent, one of mantissa. The two zeros are different codes: 0 is code 0, a little more is code 8.
Nf4Code small_floats() {
    return complete({0 / 12.0f, 0.0625f / 12, 8 / 12.0f, 12 / 12.0f, 4 / 12.0f, 6 / 12.0f, 2 / 12.0f, 3 / 12.0f,
                     0 / 12.0f, -0.0625f / 12, -8 / 12.0f, -12 / 12.0f, -4 / 12.0f, -6 / 12.0f, -2 / 12.0f, -3 / 12.0f},
                    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}, fp4_factor);
}

float absmax_of(const void* x, Dtype dtype, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float size = std::fabs(load(x, dtype, i));
        if (size > largest || std::isnan(size)) largest = size;
        if (std::isnan(size)) break;
    }
    return largest;
}

// As bitsandbytes: whole blocks are multiplied by 1 / absmax; a short one at the end is divided by absmax, and if it is
// all zeros its absmax is 1e-38. The rank is the number of bounds below; NaN is above all.
float quantise(const void* x, Dtype dtype, int64_t count, bool is_short, const Nf4Code& code, uint8_t* q) {
    const float absmax = absmax_of(x, dtype, count), divisor = std::max(absmax, 1e-38f), inverse = 1.0f / divisor;
    for (int64_t i = 0; i < count; ++i) {
        const float value = load(x, dtype, i), scaled = is_short ? value / divisor : value * inverse;
        int rank = 0;
        while (rank < 15 && !(code.bounds[rank] >= scaled)) ++rank;
        q[i] = static_cast<uint8_t>(code.order[rank]);
    }
    return is_short ? divisor : absmax;
}

void dequantise(const uint8_t* packed, const float* code, float absmax, int64_t count, void* out, Dtype dtype) {
    for (int64_t i = 0; i < count; ++i) store(out, dtype, i, code[packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * absmax);
}

void widen(const uint8_t* codes, const float* map, float scale, float offset, int64_t count, float* out) {
    for (int64_t b = 0; b < count; ++b) out[b] = map[codes[b]] * scale + offset;
}

void multiply(const float* x, int64_t M, const float* w, int64_t K, float* y) {
    for (int64_t m = 0; m < M; ++m) {
        double sum = 0;  // one fp32 sum after the other would lose more than the sixteen of a vector do
        for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(x[m * K + k]) * w[k];
        y[m] = static_cast<float>(sum);
    }
}

}  // namespace

const Nf4Code& nf4_code(Nf4Kind kind) {
    static const Nf4Code nf4 = normal_floats(), fp4 = small_floats();
    return kind == Nf4Kind::nf4 ? nf4 : fp4;
}

const Nf4Kernels& nf4_ref() {
    static const Nf4Kernels kernels = {quantise, dequantise, nullptr, widen, multiply, nullptr, nullptr, 0};
    return kernels;
}

}  // namespace minillm
