// Matrix products for AVX-512, after Goto and van de Geijn (ACM TOMS 34:3, 2008): both factors are copied into panels
// that a kernel reads from end to end.
//
//     a   panels of 14 rows:      [block of k][panel][k][14]      copied by all threads, 16 MB at a time
//     b   panels of 32 columns:   [panel][k][32]                  a task's own, block of k by block of k
//
// The kernel holds 14 x 32 sums in 28 registers; a step of k takes two vectors of b and 14 numbers of a for 28
// multiply-adds. A task is `task_columns` columns of c and all of its rows: its b stays in the second-level cache, a
// panel of a in the first.

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "matmul.h"
#include "parallel.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

constexpr int64_t lanes = 16;
constexpr int64_t panel_rows = 14, panel_columns = 2 * lanes;
constexpr int64_t depth = 256;  // of a block of k
constexpr int64_t task_columns = 4 * panel_columns;
constexpr int64_t blocks_together = 8, rows_together = 146 * panel_rows;  // what is copied of a: 16 MB at the most

thread_local Scratch a_memory, b_memory;

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Sixteen numbers of one row or column, `step` apart; beyond `count` zero, and not read.
MINILLM_AVX512 inline __m512 gather(const float* x, int64_t step, int64_t count) {
    if (step == 1) return _mm512_maskz_loadu_ps(first(count), x);
    const __mmask16 there = first(count);
    const __m512i index = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(step));
    const __m256 zero = _mm256_setzero_ps();
    const __m256 low = _mm512_mask_i64gather_ps(zero, static_cast<__mmask8>(there), index, x, 4);
    const __m256 high = _mm512_mask_i64gather_ps(zero, static_cast<__mmask8>(there >> 8), index, x + 8 * step, 4);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// out[t][i] = x[i * across + t * along] for `width` places i, of which `count` are there, and `steps` t. Where
// neighbours in t lie together, sixteen rows are read at once and transposed.
template <int64_t width>
MINILLM_AVX512 void copy_panel(const float* x, int64_t across, int64_t along, int64_t count, int64_t steps,
                               float* out) {
    if (along != 1 || across == 1) {
        for (int64_t t = 0; t < steps; ++t, x += along, out += width)
            for (int64_t i = 0; i < width; i += lanes) {
                const int64_t there = std::clamp<int64_t>(count - i, 0, lanes);
                const __m512 row = there ? gather(x + i * across, across, there) : _mm512_setzero_ps();
                _mm512_mask_storeu_ps(out + i, first(width - i), row);
            }
        return;
    }
    for (int64_t i = 0; i < width; i += lanes)
        for (int64_t t = 0; t < steps; t += lanes) {
            __m512i r[lanes];
            for (int64_t n = 0; n < lanes; ++n)
                r[n] = i + n < count ? _mm512_maskz_loadu_epi32(first(steps - t), x + (i + n) * across + t)
                                     : _mm512_setzero_si512();
            transpose(r);
            for (int64_t n = 0; n < std::min(lanes, steps - t); ++n)
                _mm512_mask_storeu_epi32(out + (t + n) * width + i, first(width - i), r[n]);
        }
}

// 14 x 32 numbers of c, of which rows x columns are there. A block of k is summed by itself and then added: shorter
// sums have smaller errors.
MINILLM_AVX512 void multiply_panels(const float* a, const float* b, int64_t steps, float* c, int64_t c_row,
                                    int64_t rows, int64_t columns, bool add) {
    __m512 sum[panel_rows][2];
    MINILLM_UNROLL16
    for (int i = 0; i < panel_rows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t t = 0; t < steps; ++t, a += panel_rows, b += panel_columns) {
        const __m512 low = _mm512_loadu_ps(b), high = _mm512_loadu_ps(b + lanes);
        MINILLM_UNROLL16
        for (int i = 0; i < panel_rows; ++i) {
            const __m512 one = _mm512_set1_ps(a[i]);
            sum[i][0] = _mm512_fmadd_ps(one, low, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(one, high, sum[i][1]);
        }
    }
    const __mmask16 mask[2] = {first(columns), columns > lanes ? first(columns - lanes) : __mmask16(0)};
    MINILLM_UNROLL16
    for (int i = 0; i < panel_rows; ++i) {
        if (i >= rows) continue;
        MINILLM_UNROLL16
        for (int v = 0; v < 2; ++v) {
            float* at = c + i * c_row + v * lanes;
            if (add) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(mask[v], at));
            _mm512_mask_storeu_ps(at, mask[v], sum[i][v]);
        }
    }
}

// The columns from `begin` to `end` of c, one block of k; a: its panels.
void multiply_columns(const Matmul& x, const float* a, int64_t block, int64_t begin, int64_t end) {
    const int64_t k = block * depth, steps = std::min(depth, x.K - k), panels = pieces(x.M, panel_rows);
    float* b = b_memory.get<float>(task_columns * depth);
    for (int64_t n = begin; n < end; n += panel_columns)
        copy_panel<panel_columns>(x.b.at(k, n), x.b.column, x.b.row, end - n, steps, b + (n - begin) * depth);
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t m = panel * panel_rows;
        for (int64_t n = begin; n < end; n += panel_columns)
            multiply_panels(a + panel * panel_rows * depth, b + (n - begin) * depth, steps, x.c + m * x.c_row + n,
                            x.c_row, std::min(panel_rows, x.M - m), std::min(panel_columns, end - n),
                            x.add || block > 0);
    }
}

// All rows of x, of which there are not too many.
void multiply_rows(const Matmul& x, float* a, int threads) {
    const int64_t panels = pieces(x.M, panel_rows), blocks = pieces(x.K, depth), tasks = pieces(x.N, task_columns);
    const int64_t of_block = panels * panel_rows * depth;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < blocks; start += blocks_together) {
        const int64_t end = std::min(blocks, start + blocks_together);
#pragma omp for schedule(static)
        for (int64_t number = 0; number < (end - start) * panels; ++number) {
            const int64_t k = (start + number / panels) * depth, m = number % panels * panel_rows;
            copy_panel<panel_rows>(x.a.at(m, k), x.a.row, x.a.column, std::min(panel_rows, x.M - m),
                                   std::min(depth, x.K - k), a + number * panel_rows * depth);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t block = start; block < end; ++block)
                multiply_columns(x, a + (block - start) * of_block, block, task * task_columns,
                                 std::min(x.N, (task + 1) * task_columns));
    }
}

}  // namespace

void matmul_avx512(const Matmul& x, int threads) {
    const int64_t rows = std::min(pieces(x.M, panel_rows) * panel_rows, rows_together);
    float* a = a_memory.get<float>(rows * depth * std::min(pieces(x.K, depth), blocks_together));
    for (int64_t m = 0; m < x.M; m += rows_together) {
        Matmul part = x;
        part.a.x = x.a.at(m, 0);
        part.c = x.c + m * x.c_row;
        part.M = std::min(rows_together, x.M - m);
        multiply_rows(part, a, threads);
    }
}

}  // namespace minillm

#endif
