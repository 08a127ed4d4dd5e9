// The float formats of tensors, one number at a time: the scalar definition that every vector variant repeats.
#pragma once

#include <cstdint>
#include <cstring>

namespace minillm {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float bf16_to_f32(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t f32_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// 5 bits of exponent, 10 of mantissa; subnormals are multiples of 2^-24.
inline float f16_to_f32(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = (x >> 10) & 0x1f, mantissa = x & 0x3ff;
    if (exponent == 0x1f) return from_bits(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t f32_to_f16(float x) {
    const uint32_t bits = to_bits(x), size = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00 | ((size >> 13) & 0x3ff));
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
    if (size < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded, in the last bits
        const uint32_t sum = to_bits(from_bits(size) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
    }
    const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float load(const void* x, Dtype dtype, int64_t index) {
    switch (dtype) {
        case Dtype::f32:
            return static_cast<const float*>(x)[index];
        case Dtype::bf16:
            return bf16_to_f32(static_cast<const uint16_t*>(x)[index]);
        default:
            return f16_to_f32(static_cast<const uint16_t*>(x)[index]);
    }
}

inline void store(void* x, Dtype dtype, int64_t index, float value) {
    switch (dtype) {
        case Dtype::f32:
            static_cast<float*>(x)[index] = value;
            break;
        case Dtype::bf16:
            static_cast<uint16_t*>(x)[index] = f32_to_bf16(value);
            break;
        default:
            static_cast<uint16_t*>(x)[index] = f32_to_f16(value);
    }
}

inline const void* offset(const void* x, Dtype dtype, int64_t count) {
    return static_cast<const char*>(x) + count * size_of(dtype);
}

inline void* offset(void* x, Dtype dtype, int64_t count) { return static_cast<char*>(x) + count * size_of(dtype); }

}  // namespace minillm
