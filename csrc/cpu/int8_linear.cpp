// Who does what: quantise x, share the rows of w among threads, block by block, and finish each block while it is warm.
//
//     M <= max_rows    weights are streamed once, at the memory's speed, as they lie (`dot`)
//     more             a panel of 64 rows of w is packed into this thread's cache and meets all rows of x (`tile`)

#include "int8_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace minillm {
namespace {

const Int8Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512vnni) return int8_avx512vnni();
    if (isa == Isa::avx2) return int8_avx2();
#endif
    (void)isa;
    return int8_ref();
}

int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }

// x as int8, and what stays float.
struct Quantised {
    int8_t* q;  // (M, stride)
    int64_t stride;
    float* scale;      // (M)
    int64_t* columns;  // (outliers)
    float* values;     // (M, outliers)
    int64_t outliers;
};

struct Memory {
    Scratch q, scale, flags, columns, values, packed, outlier_columns;
};

thread_local Memory memory;

void quantise_row(const Int8Input& in, const Int8Kernels& kernels, const Quantised& out, int64_t m) {
    const void* x = offset(in.x, in.dtype, m * in.K);
    int8_t* q = out.q + m * out.stride;
    kernels.quantise(x, in.dtype, in.K, out.scale[m], q);
    std::memset(q + in.K, 0, out.stride - in.K);
    for (int64_t c = 0; c < out.outliers; ++c) {
        q[out.columns[c]] = 0;
        out.values[m * out.outliers + c] = load(x, in.dtype, out.columns[c]);
    }
}

// Into q (M, stride) and scale (M); the rest lies in the calling thread's memory. Loops run on `threads` threads.
Quantised quantise(const Int8Input& in, const Int8Kernels& kernels, int threads, int8_t* q, int64_t stride,
                   float* scale) {
    Quantised out{};
    out.q = q;
    out.stride = stride;
    out.scale = scale;
    threads = static_cast<int>(std::min<int64_t>(threads, in.M));
    uint8_t* flags = memory.flags.get<uint8_t>(threads * in.K);  // one set a thread
    std::memset(flags, 0, threads * in.K);
    parallel(threads, [&](int thread, int count) {
        const Range rows = share(in.M, 1, thread, count);
        for (int64_t m = rows.begin; m < rows.end; ++m)
            out.scale[m] =
                kernels.absmax(offset(in.x, in.dtype, m * in.K), in.dtype, in.K, in.threshold, flags + thread * in.K);
    });
    out.columns = memory.columns.get<int64_t>(in.K);
    for (int64_t k = 0; k < in.K; ++k) {
        uint8_t any = 0;
        for (int thread = 0; thread < threads; ++thread) any |= flags[thread * in.K + k];
        out.columns[out.outliers] = k;
        out.outliers += any;
    }
    out.values = memory.values.get<float>(in.M * out.outliers);
    parallel(threads, [&](int thread, int count) {
        const Range rows = share(in.M, 1, thread, count);
        for (int64_t m = rows.begin; m < rows.end; ++m) quantise_row(in, kernels, out, m);
    });
    return out;
}

// Into the calling thread's memory, as the kernels want it.
Quantised quantise(const Int8Input& in, const Int8Kernels& kernels, int threads) {
    const int64_t stride = padded(in.K);
    return quantise(in, kernels, threads, memory.q.get<int8_t>(in.M * stride), stride, memory.scale.get<float>(in.M));
}

// w[n0 + j, columns[c]] as fp32 (outliers, max_panel), read while those rows of w are in the cache.
const float* gather(const Int8Weight& weight, const Quantised& x, int64_t K, int64_t n0, int64_t n) {
    if (x.outliers == 0) return nullptr;
    float* gathered = memory.outlier_columns.get<float>(x.outliers * max_panel);
    for (int64_t j = 0; j < n; ++j) {
        const int8_t* row = weight.w + (n0 + j) * K;
        for (int64_t c = 0; c < x.outliers; ++c) gathered[c * max_panel + j] = row[x.columns[c]];
    }
    return gathered;
}

Int8Block block_of(const Int8Input& in, const Int8Weight& weight, const Quantised& x, const float* columns, int64_t n0,
                   int64_t n) {
    Int8Block block{};
    block.n = n;
    block.columns = columns;
    block.outliers = x.outliers;
    block.scale_w = weight.scale + n0;
    block.bias = weight.bias ? offset(weight.bias, in.dtype, n0) : nullptr;
    block.N = weight.N;
    block.dtype = in.dtype;
    return block;
}

// Rows m .. m + count - 1 of a block, from `sums`.
void finish_rows(Int8Block& block, const Int8Input& in, const Int8Weight& weight, const Quantised& x,
                 const Int8Kernels& kernels, const int32_t* sums, int64_t n0, int64_t m, int64_t count) {
    block.sums = sums;
    block.M = count;
    block.scale_x = x.scale + m;
    block.values = x.values + m * x.outliers;
    block.y = offset(weight.y, in.dtype, m * weight.N + n0);
    kernels.finish(block);
}

constexpr int64_t grain = 16;  // rows of w between two looks at the outlier columns, which are then still in the cache

void few_rows(const Int8Input& in, const Int8Weight& weight, const Quantised& x, const Int8Kernels& kernels,
              Range range) {
    alignas(64) int32_t sums[max_rows * max_panel];
    for (int64_t n0 = range.begin; n0 < range.end; n0 += grain) {
        const int64_t n = std::min(grain, range.end - n0);
        const int8_t* w = weight.w + n0 * in.K;
        kernels.dot(x.q, x.stride, std::min(max_rows, in.M), w, n, in.K, sums);
        Int8Block block = block_of(in, weight, x, gather(weight, x, in.K, n0, n), n0, n);
        finish_rows(block, in, weight, x, kernels, sums, n0, 0, std::min(max_rows, in.M));
        for (int64_t m = max_rows; m < in.M; m += max_rows) {  // variants without tiles: the block of w is in the cache
            const int64_t count = std::min(max_rows, in.M - m);
            kernels.dot(x.q + m * x.stride, x.stride, count, w, n, in.K, sums);
            finish_rows(block, in, weight, x, kernels, sums, n0, m, count);
        }
    }
}

void one_panel(const Int8Input& in, const Int8Weight& weight, const Quantised& x, const Int8Kernels& kernels,
               int64_t n0, Range rows) {
    const int64_t n = std::min(max_panel, weight.N - n0);
    uint8_t* packed = memory.packed.get<uint8_t>(max_panel * padded(in.K));
    kernels.pack(weight.w + n0 * in.K, n, in.K, packed);
    Int8Block block = block_of(in, weight, x, gather(weight, x, in.K, n0, n), n0, n);
    alignas(64) int32_t sums[max_rows * max_panel];
    for (int64_t m = rows.begin; m < rows.end; m += kernels.tile_rows) {
        const int64_t count = std::min(kernels.tile_rows, rows.end - m);
        kernels.tile(x.q + m * x.stride, x.stride, count, packed, in.K, sums);
        finish_rows(block, in, weight, x, kernels, sums, n0, m, count);
    }
}

// Panels of all weights, taken by whichever thread is free; few panels are split by rows of x too.
void many_rows(const Int8Input& in, const Int8Weight* weights, int count, const Quantised& x,
               const Int8Kernels& kernels, int threads) {
    struct Task {
        const Int8Weight* weight;
        int64_t n0;
        int part;
    };
    int64_t panels = 0;
    for (int i = 0; i < count; ++i) panels += (weights[i].N + max_panel - 1) / max_panel;
    const int parts = static_cast<int>(panels < 4 * threads ? std::min<int64_t>(threads, (in.M + 31) / 32) : 1);
    std::vector<Task> tasks;
    for (int i = 0; i < count; ++i)
        for (int64_t n0 = 0; n0 < weights[i].N; n0 += max_panel)
            for (int part = 0; part < parts; ++part) tasks.push_back({&weights[i], n0, part});
    const int64_t total = static_cast<int64_t>(tasks.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t i = 0; i < total; ++i) {
        const Task& task = tasks[i];
        one_panel(in, *task.weight, x, kernels, task.n0, share(in.M, kernels.tile_rows, task.part, parts));
    }
}

}  // namespace

void int8_linear(const Int8Input& in, const Int8Weight* weights, int count, Isa isa, int threads) {
    const Int8Kernels& kernels = kernels_of(isa);
    if (in.M > max_rows && kernels.tile) {
        many_rows(in, weights, count, quantise(in, kernels, threads), kernels, threads);
        return;
    }
    // One row is quantised by every thread for itself: cheaper than waiting for each other.
    const bool alone = in.M == 1;
    const Quantised shared = alone ? Quantised{} : quantise(in, kernels, threads);
    parallel(threads, [&](int thread, int threads) {
        const Quantised x = alone ? quantise(in, kernels, 1) : shared;
        for (int i = 0; i < count; ++i)
            few_rows(in, weights[i], x, kernels, share(weights[i].N, grain, thread, threads));
    });
}

void int8_product(const int8_t* x, const int8_t* w, int32_t* y, int64_t M, int64_t N, int64_t K, Isa isa, int threads) {
    const Int8Kernels& kernels = kernels_of(isa);
    const int64_t stride = padded(K), rows = kernels.tile ? kernels.tile_rows : max_rows;
    int8_t* q = memory.q.get<int8_t>(M * stride);
    for (int64_t m = 0; m < M; ++m) {
        std::memcpy(q + m * stride, x + m * K, K);
        std::memset(q + m * stride + K, 0, stride - K);
    }
    parallel(threads, [&](int thread, int threads) {
        const Range range = share(N, max_panel, thread, threads);
        alignas(64) int32_t sums[max_rows * max_panel];
        uint8_t* packed = memory.packed.get<uint8_t>(max_panel * stride);
        for (int64_t n0 = range.begin; n0 < range.end; n0 += max_panel) {
            const int64_t n = std::min(max_panel, range.end - n0);
            const bool tiled = kernels.tile && M > max_rows;
            if (tiled) kernels.pack(w + n0 * K, n, K, packed);
            for (int64_t m = 0; m < M; m += rows) {
                const int64_t count = std::min(rows, M - m);
                if (tiled)
                    kernels.tile(q + m * stride, stride, count, packed, K, sums);
                else
                    kernels.dot(q + m * stride, stride, count, w + n0 * K, n, K, sums);
                for (int64_t i = 0; i < count; ++i)
                    std::memcpy(y + (m + i) * N + n0, sums + i * max_panel, n * sizeof(int32_t));
            }
        }
    });
}

void int8_quantise(const Int8Input& in, int8_t* q, float* scale, uint8_t* is_outlier, Isa isa, int threads) {
    const Quantised x = quantise(in, kernels_of(isa), threads, q, in.K, scale);
    std::memset(is_outlier, 0, in.K);
    for (int64_t c = 0; c < x.outliers; ++c) is_outlier[x.columns[c]] = 1;
}

void int8_dequantise(const int8_t* w, const float* scale, void* out, Dtype dtype, int64_t N, int64_t K, Isa isa,
                     int threads) {
    const Int8Kernels& kernels = kernels_of(isa);
    parallel(threads, [&](int thread, int threads) {
        const Range rows = share(N, 1, thread, threads);
        for (int64_t n = rows.begin; n < rows.end; ++n)
            kernels.dequantise(w + n * K, scale[n], K, offset(out, dtype, n * K), dtype);
    });
}

}  // namespace minillm
