// Who does what: the rows of each (batch row, key/value head) are cut into tasks, which threads take as they get free.

#include "attention.h"

#include <algorithm>

namespace minillm {
namespace {

AttentionKernel kernel_of(Isa isa, Dtype dtype) {
#if defined(__x86_64__)
    if (isa == Isa::avx512bf16 && dtype == Dtype::bf16) return attention_avx512bf16;
    if (isa >= Isa::avx512vnni) return attention_avx512;
#endif
    (void)isa, (void)dtype;
    return attention_ref;  // avx2 too: there torch's kernel is the fast one, and ops/attention.py leaves it the work
}

constexpr int64_t most_tiles = 4;           // a task brings a block of keys into shape once for so many tiles
constexpr int64_t tasks_a_thread = 4;       // late rows see more keys: several tasks each even that out
constexpr int64_t vector_rows = 16;         // rows that cost as much as one
constexpr int64_t small_work = 300 * 1000;  // multiply-adds that take about as long as waking the other threads

// Rows of a group that make one task. No row's result depends on it.
int64_t rows_of_task(const Attention& a, int threads) {
    const int64_t rows = a.T * (a.H / a.G), groups = a.B * a.G;
    const auto tasks = [&](int64_t size) { return groups * ((rows + size - 1) / size); };
    int64_t size = most_tiles * rows_per_tile;
    while (size > rows_per_tile && tasks(size) < tasks_a_thread * threads) size /= 2;
    while (size > vector_rows && tasks(size) < threads) size -= vector_rows;
    return size;
}

}  // namespace

void attention(const Attention& a, Isa isa, int threads) {
    const AttentionKernel kernel = kernel_of(isa, a.dtype);
    if (a.B * a.H * a.T * a.S * a.E < small_work) threads = 1;
    const int64_t rows = a.T * (a.H / a.G), groups = a.B * a.G, size = rows_of_task(a, threads);
    const int64_t cuts = (rows + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < groups * cuts; ++task) {
        const int64_t group = task % groups, first = (cuts - 1 - task / groups) * size;  // the longest ones first
        kernel(a, {group / a.G, group % a.G, first, std::min(size, rows - first)});
    }
}

}  // namespace minillm
