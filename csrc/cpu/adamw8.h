// A step of AdamW whose two moments are kept in 8 bits, in blocks of 256 numbers (arXiv 2110.02861 §2).
//
//     m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2                          m, v read as map[code] * absmax
//     p = (1 - lr wd) p + (-lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//     absmax = max |m| of the block, code = codes[floor((clamp(m / absmax, -1, 1) + 1) / 2 * 65535 + 1/2)]; so v
//
// All of it in one pass over p, g and the codes: a block's moments are floating point in the first-level cache only.
// The order of operations, and which product is fused with which sum, is that of torch's vector code, on which
// bitsandbytes' CPU backend runs; so the bits are the same. Every variant gives the same bits.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

constexpr int adamw8_block = 256;

// What a step needs of learning rate, betas and step count t, rounded once to fp32.
struct Adamw8Rates {
    float beta1, rest1;  // b1, 1 - b1
    float beta2, rest2;
    float decay;  // 1 - lr wd
    float size;   // -lr / (1 - b1^t)
    float root;   // sqrt(1 - b2^t)
    float eps;
};

// What the codes of one moment mean, and which code each step gets.
struct Adamw8Map {
    const float* map;      // (256), rising
    const uint8_t* codes;  // (65536)
};

struct Adamw8Moment {
    uint8_t* codes;  // (count)
    float* absmax;   // (ceil(count / 256))
    Adamw8Map map;
};

// p, g (count) in one format; p changes in place, and so do the moments.
struct Adamw8 {
    void* p;
    const void* g;
    Dtype dtype;
    int64_t count;
    Adamw8Moment m, v;
};

void adamw8(const Adamw8& step, const Adamw8Rates& rates, Isa isa, int threads);

// Numbers begin .. begin + count - 1 of a step: a block, or the shorter one at the end.
using Adamw8Kernel = void (*)(const Adamw8& step, const Adamw8Rates& rates, int64_t begin, int count);

void adamw8_ref(const Adamw8& step, const Adamw8Rates& rates, int64_t begin, int count);
#if defined(__x86_64__)
void adamw8_avx512(const Adamw8& step, const Adamw8Rates& rates, int64_t begin, int count);
#endif

}  // namespace minillm
