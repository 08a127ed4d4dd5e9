// Who does what: blocks shared among threads to quantise, rows to dequantise and multiply.
//
// nf4_linear is for few rows of x, where the weights' way from memory is what takes time: they are read once, as they
// lie. For more rows torch multiplies by tiles that nf4_dequantise makes (see minillm/ops/nf4.py).

#include "nf4.h"

#include <algorithm>

#include "parallel.h"

namespace minillm {
namespace {

const Nf4Kernels& kernels_of(Isa isa, Dtype dtype) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512bf16 && dtype == Dtype::bf16) return nf4_avx512bf16();
    if (isa >= Isa::avx512vnni) return nf4_avx512();
    if (isa == Isa::avx2) return nf4_avx2();
#endif
    (void)isa;
    (void)dtype;
    return nf4_ref();
}

struct Memory {
    Scratch q, absmax, row, x, sums;
};

thread_local Memory memory;

void pack(const uint8_t* q, int64_t count, uint8_t* packed) {
    for (int64_t i = 0; i < count / 2; ++i) packed[i] = static_cast<uint8_t>(q[2 * i] << 4 | q[2 * i + 1]);
}

// absmax of `count` blocks from `begin` on.
const float* absmax_of(const Nf4Scales& scales, int64_t begin, int64_t count, const Nf4Kernels& kernels) {
    if (scales.absmax) return scales.absmax + begin;
    float* absmax = memory.absmax.get<float>(count);
    for (int64_t i = 0; i < count;) {
        const int64_t group = (begin + i) / absmax_block, end = std::min(count, (group + 1) * absmax_block - begin);
        kernels.widen(scales.absmax8 + begin + i, scales.map, scales.absmax2[group], *scales.offset, end - i,
                      absmax + i);
        i = end;
    }
    return absmax;
}

// Numbers begin .. end - 1 of w, which is read as one long row. Blocks are even; so only `begin` may be odd.
void dequantise_run(const Nf4Weight& w, int64_t begin, int64_t end, const Nf4Kernels& kernels, void* out, Dtype dtype) {
    const float* code = nf4_code(w.kind).code;
    const int64_t first_block = begin / w.block;
    const float* absmax = absmax_of(w.scales, first_block, (end - 1) / w.block - first_block + 1, kernels);
    int64_t i = begin;
    if (i % 2 && i < end) {
        store(out, dtype, 0, code[w.packed[i / 2] & 15] * absmax[0]);
        ++i;
    }
    while (i < end) {
        const int64_t block = i / w.block, whole = i % w.block ? 0 : (end - i) / w.block;
        if (whole && kernels.dequantise_blocks) {
            kernels.dequantise_blocks(w.packed + i / 2, code, absmax + block - first_block, whole, w.block,
                                      offset(out, dtype, i - begin), dtype);
            i += whole * w.block;
            continue;
        }
        const int64_t count = std::min(end, (block + 1) * w.block) - i;
        kernels.dequantise(w.packed + i / 2, code, absmax[block - first_block], count, offset(out, dtype, i - begin),
                           dtype);
        i += count;
    }
}

// Whether rows are as Nf4Row wants them, and the binary logarithm of their block.
bool is_regular(const Nf4Weight& w, int* shift) {
    *shift = 0;
    while ((int64_t{1} << *shift) < w.block) ++*shift;
    return w.block >= 32 && (int64_t{1} << *shift) == w.block && w.K % w.block == 0;
}

struct Linear {
    const Nf4Weight& w;
    const Nf4Kernels& kernels;
    const char* x;   // arranged, or (M, K) fp32
    int64_t stride;  // bytes of a row of x
    int64_t M;
    bool is_regular;
    int shift;
};

constexpr int64_t rows_together = 16;  // whose absmax are widened at once: the table is then loaded once for all

// sums[m] for all rows of x: the row of w comes from memory once and then from the nearest cache.
void one_row(const Linear& job, int64_t n, const float* absmax, float* sums) {
    const Nf4Weight& w = job.w;
    Nf4Row packed{};
    float* row = nullptr;
    if (job.is_regular) {
        packed = {w.packed + n * w.K / 2, absmax, w.K, job.shift};
    } else {
        row = memory.row.get<float>(w.K);
        dequantise_run(w, n * w.K, (n + 1) * w.K, job.kernels, row, Dtype::f32);
    }
    for (int64_t m = 0; m < job.M; m += most_nf4_rows) {
        const int64_t count = std::min(most_nf4_rows, job.M - m);
        const char* x = job.x + m * job.stride;
        if (job.is_regular)
            job.kernels.dot(x, count, packed, nf4_code(w.kind), sums + m);
        else
            job.kernels.multiply(reinterpret_cast<const float*>(x), count, row, w.K, sums + m);
    }
}

// x as the kernels want it, on the calling thread's memory.
Linear prepared(const void* x, Dtype dtype, int64_t M, const Nf4Weight& w, const Nf4Kernels& kernels) {
    Linear job{w, kernels, static_cast<const char*>(x), static_cast<int64_t>(w.K * sizeof(float)), M, false, 0};
    job.is_regular = is_regular(w, &job.shift) && kernels.dot;
    if (!job.is_regular && dtype == Dtype::f32) return job;
    if (job.is_regular) job.stride = (w.K + nf4_chunk - 1) / nf4_chunk * kernels.arranged_bytes;
    char* out = memory.x.get<char>(M * job.stride);
    job.x = out;
    for (int64_t m = 0; m < M; ++m, out += job.stride) {
        if (job.is_regular)
            kernels.arrange(offset(x, dtype, m * w.K), dtype, w.K, out);
        else
            for (int64_t k = 0; k < w.K; ++k) reinterpret_cast<float*>(out)[k] = load(x, dtype, m * w.K + k);
    }
    return job;
}

}  // namespace

void nf4_quantise(const void* x, Dtype dtype, int64_t count, int64_t block, Nf4Kind kind, uint8_t* packed,
                  float* absmax, Isa isa, int threads) {
    const Nf4Kernels& kernels = kernels_of(isa, dtype);
    const Nf4Code& code = nf4_code(kind);
    parallel(threads, [&](int thread, int threads) {
        const Range blocks = share((count + block - 1) / block, 1, thread, threads);
        uint8_t* q = memory.q.get<uint8_t>(block + 1);
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
            const int64_t here = std::min(block, count - b * block);
            absmax[b] = kernels.quantise(offset(x, dtype, b * block), dtype, here, here < block, code, q);
            if (here % 2) q[here] = static_cast<uint8_t>(code.order[7]);  // the last half byte is the code of 0
            pack(q, here + here % 2, packed + b * block / 2);
        }
    });
}

void nf4_dequantise(const Nf4Weight& weight, const Nf4Tile& tile, void* out, Dtype dtype, Isa isa, int threads) {
    if (tile.columns == 0) return;
    const Nf4Kernels& kernels = kernels_of(isa, dtype);
    parallel(threads, [&](int thread, int threads) {
        const Range rows = share(tile.rows, 1, thread, threads);
        const int64_t together = tile.columns == weight.K ? rows_together : 1;  // whole rows follow each other
        for (int64_t n = rows.begin; n < rows.end; n += together) {
            const int64_t count = std::min(together, rows.end - n) * tile.columns;
            const int64_t begin = (tile.row + n) * weight.K + tile.column;
            dequantise_run(weight, begin, begin + count, kernels, offset(out, dtype, n * tile.columns), dtype);
        }
    });
}

void nf4_linear(const void* x, Dtype dtype, int64_t M, const Nf4Weight& weight, const void* bias, void* y, Isa isa,
                int threads) {
    const Linear job = prepared(x, dtype, M, weight, kernels_of(isa, dtype));
    parallel(threads, [&](int thread, int threads) {
        const Range rows = share(weight.N, 16, thread, threads);
        float* sums = memory.sums.get<float>(M);
        const int64_t blocks = job.is_regular ? weight.K / weight.block : 0;  // of a row
        for (int64_t n0 = rows.begin; n0 < rows.end; n0 += rows_together) {
            const int64_t end = std::min(rows.end, n0 + rows_together);
            const float* absmax = absmax_of(weight.scales, n0 * blocks, (end - n0) * blocks, job.kernels);
            for (int64_t n = n0; n < end; ++n) {
                one_row(job, n, absmax + (n - n0) * blocks, sums);
                const float b = bias ? load(bias, dtype, n) : 0.0f;
                for (int64_t m = 0; m < M; ++m) store(y, dtype, m * weight.N + n, sums[m] + b);
            }
        }
    });
}

}  // namespace minillm
