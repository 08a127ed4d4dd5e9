// The definitions of the block operations, and who computes which rows.

#include "block_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace minillm {
namespace {

float rounded(float x, Dtype dtype) {
    if (dtype == Dtype::bf16) return bf16_to_f32(f32_to_bf16(x));
    return dtype == Dtype::f16 ? f16_to_f32(f32_to_f16(x)) : x;
}

void rms_norm_row(const void* x, const void* weight, void* y, Dtype dtype, int64_t D, float eps) {
    double sum = 0;
    for (int64_t i = 0; i < D; ++i) sum += static_cast<double>(load(x, dtype, i)) * load(x, dtype, i);
    const float factor = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(D) + eps));
    for (int64_t i = 0; i < D; ++i)
        store(y, dtype, i, load(weight, dtype, i) * rounded(load(x, dtype, i) * factor, dtype));
}

void rotate_head(const void* x, const void* cos, const void* sin, void* y, Dtype dtype, int64_t E, int64_t d) {
    for (int64_t i = 0; i < d; ++i) {
        const float other = i < d / 2 ? -load(x, dtype, i + d / 2) : load(x, dtype, i - d / 2);
        const float turned = rounded(load(x, dtype, i) * load(cos, dtype, i), dtype);
        store(y, dtype, i, turned + rounded(other * load(sin, dtype, i), dtype));
    }
    std::memcpy(offset(y, dtype, d), offset(x, dtype, d), (E - d) * size_of(dtype));
}

void swiglu_span(const void* gate, const void* up, void* y, Dtype dtype, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = load(gate, dtype, i);
        store(y, dtype, i, rounded(g / (1.0f + std::exp(-g)), dtype) * load(up, dtype, i));
    }
}

void add_span(const void* a, const void* b, void* y, Dtype dtype, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store(y, dtype, i, load(a, dtype, i) + load(b, dtype, i));
}

const BlockKernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512vnni) return block_avx512();
#endif
    (void)isa;
    return block_ref();
}

// Numbers for which a second thread is worth waking.
constexpr int64_t worth_a_thread = 16384;

int useful(int threads, int64_t numbers) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, numbers / worth_a_thread)));
}

}  // namespace

const BlockKernels& block_ref() {
    static const BlockKernels kernels = {rms_norm_row, rotate_head, swiglu_span, add_span};
    return kernels;
}

void rms_norm(const void* x, const void* weight, void* y, Dtype dtype, int64_t M, int64_t D, float eps, Isa isa,
              int threads) {
    const BlockKernels& kernels = kernels_of(isa);
    parallel(useful(threads, M * D), [&](int thread, int count) {
        const Range rows = share(M, 1, thread, count);
        for (int64_t m = rows.begin; m < rows.end; ++m)
            kernels.rms_norm_row(offset(x, dtype, m * D), weight, offset(y, dtype, m * D), dtype, D, eps);
    });
}

void rotate(const Rotation& r, Isa isa, int threads) {
    const BlockKernels& kernels = kernels_of(isa);
    parallel(useful(threads, r.rows * r.heads * r.E), [&](int thread, int count) {
        const Range rows = share(r.rows, 1, thread, count);
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t head = 0; head < r.heads; ++head) {
                const int64_t table = row % r.tables * r.d;
                kernels.rotate_head(offset(r.x, r.dtype, row * r.row_stride + head * r.head_stride),
                                    offset(r.cos, r.dtype, table), offset(r.sin, r.dtype, table),
                                    offset(r.y, r.dtype, (row * r.heads + head) * r.E), r.dtype, r.E, r.d);
            }
    });
}

void swiglu(const void* gate, const void* up, void* y, Dtype dtype, int64_t count, Isa isa, int threads) {
    const BlockKernels& kernels = kernels_of(isa);
    parallel(useful(threads, count), [&](int thread, int threads) {
        const Range range = share(count, 16, thread, threads);
        kernels.swiglu(offset(gate, dtype, range.begin), offset(up, dtype, range.begin), offset(y, dtype, range.begin),
                       dtype, range.end - range.begin);
    });
}

void add(const void* a, const void* b, void* y, Dtype dtype, int64_t count, Isa isa) {
    kernels_of(isa).add(a, b, y, dtype, count);
}

}  // namespace minillm
