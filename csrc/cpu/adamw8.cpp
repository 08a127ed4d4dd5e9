// The definition of an 8-bit AdamW step on one block, and who steps which blocks.

#include "adamw8.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace minillm {
namespace {

void expand(const Adamw8Moment& moment, int64_t begin, int count, float* out) {
    const float absmax = moment.absmax[begin / adamw8_block];
    for (int i = 0; i < count; ++i) out[i] = moment.map.map[moment.codes[begin + i]] * absmax;
}

// absmax below 2^-128 has an infinite inverse, and 0 times it is NaN: step 0, as in bitsandbytes.
void compress(const float* x, int64_t begin, int count, const Adamw8Moment& moment) {
    float absmax = 0;
    for (int i = 0; i < count; ++i) absmax = std::max(absmax, std::fabs(x[i]));
    const float inverse = 1.0f / absmax;
    for (int i = 0; i < count; ++i) {
        const float unit = std::min(std::max(-1.0f, x[i] * inverse), 1.0f);  // in this order NaN becomes -1
        const int step = static_cast<int>((unit + 1.0f) * 0.5f * 65535.0f + 0.5f);
        moment.codes[begin + i] = absmax == 0 ? 0 : moment.map.codes[step];
    }
    moment.absmax[begin / adamw8_block] = absmax;
}

Adamw8Kernel kernel_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512vnni) return adamw8_avx512;
#endif
    (void)isa;
    return adamw8_ref;
}

// Blocks for which a second thread is worth waking.
constexpr int64_t worth_a_thread = 32;

}  // namespace

void adamw8_ref(const Adamw8& step, const Adamw8Rates& r, int64_t begin, int count) {
    float m[adamw8_block], v[adamw8_block];
    expand(step.m, begin, count, m);
    expand(step.v, begin, count, v);
    for (int i = 0; i < count; ++i) {
        const float g = load(step.g, step.dtype, begin + i);
        m[i] = std::fma(g, r.rest1, m[i] * r.beta1);
        v[i] = std::fma(r.rest2 * g, g, v[i] * r.beta2);
        const float change = r.size * m[i] / (std::sqrt(v[i]) / r.root + r.eps);
        store(step.p, step.dtype, begin + i, load(step.p, step.dtype, begin + i) * r.decay + change);
    }
    compress(m, begin, count, step.m);
    compress(v, begin, count, step.v);
}

void adamw8(const Adamw8& step, const Adamw8Rates& rates, Isa isa, int threads) {
    const Adamw8Kernel kernel = kernel_of(isa);
    const int64_t useful = std::max<int64_t>(1, step.count / adamw8_block / worth_a_thread);
    parallel(static_cast<int>(std::min<int64_t>(threads, useful)), [&](int thread, int threads) {
        const Range range = share(step.count, adamw8_block, thread, threads);
        for (int64_t begin = range.begin; begin < range.end; begin += adamw8_block)
            kernel(step, rates, begin, static_cast<int>(std::min<int64_t>(adamw8_block, range.end - begin)));
    });
}

}  // namespace minillm
