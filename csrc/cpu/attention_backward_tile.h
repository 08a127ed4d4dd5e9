// The gradients of a task, 64 queries against 64 keys at a time: five matrix products on blocks that stay in the
// caches.
//
//     s = q k^T    dp = dy v^T    dq += ds k    dk += ds^T q    dv += p^T dy
//
// Each is c[m][n] += sum_t a[m][t] b[t][n], where a is broadcast a dword at a time and b and c are rows of vectors: so
// keys and values are kept transposed as well (for s and dp), and p and ds are stored as they leave the registers.
//
// A dword holds Numbers::packed numbers: one fp32, or two bf16, neighbours in t. This file is included by each variant,
// after MINILLM_TILE (its target) and Numbers, which says what is done with a dword.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_backward.h"
#include "parallel.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

constexpr int64_t lanes = 16;
constexpr int64_t side = 64;  // queries, and keys, of a block
constexpr int64_t packed = Numbers::packed;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Both factors of a product: a[m][t] at a + m * row + t * step, b[t][n] at b + t * b_row; c[m][n] at c + m * c_row.
struct Product {
    const int32_t* a;
    int64_t row, step;
    const int32_t* b;
    int64_t b_row;
    float* c;
    int64_t c_row;
};

// M rows of V vectors each, summed in registers.
template <int M, int V>
MINILLM_TILE inline void multiply_tile(const Product& x, int64_t steps, bool add) {
    __m512 sum[M][V];
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) MINILLM_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = add ? _mm512_loadu_ps(x.c + m * x.c_row + v * lanes) : _mm512_setzero_ps();
    const int32_t *a = x.a, *b = x.b;
    for (int64_t t = 0; t < steps; ++t, a += x.step, b += x.b_row) {
        __m512i row[V];
        MINILLM_UNROLL
        for (int v = 0; v < V; ++v) row[v] = _mm512_loadu_si512(b + v * lanes);
        MINILLM_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i one = _mm512_set1_epi32(a[m * x.row]);
            MINILLM_UNROLL
            for (int v = 0; v < V; ++v) sum[m][v] = Numbers::multiply_add(sum[m][v], one, row[v]);
        }
    }
    MINILLM_UNROLL
    for (int m = 0; m < M; ++m) MINILLM_UNROLL
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(x.c + m * x.c_row + v * lanes, sum[m][v]);
}

template <int V>
MINILLM_TILE void multiply_columns(Product x, int64_t rows, int64_t steps, bool add) {
    for (; rows >= 6; rows -= 6, x.a += 6 * x.row, x.c += 6 * x.c_row) multiply_tile<6, V>(x, steps, add);
    for (; rows >= 2; rows -= 2, x.a += 2 * x.row, x.c += 2 * x.c_row) multiply_tile<2, V>(x, steps, add);
    if (rows) multiply_tile<1, V>(x, steps, add);
}

// c (rows, 16 vectors) = or += a b.
MINILLM_TILE void multiply(Product x, int64_t rows, int64_t vectors, int64_t steps, bool add) {
    for (; vectors >= 4; vectors -= 4, x.b += 4 * lanes, x.c += 4 * lanes) multiply_columns<4>(x, rows, steps, add);
    for (; vectors >= 1; vectors -= 1, x.b += lanes, x.c += lanes) multiply_columns<1>(x, rows, steps, add);
}

// The memory of a task; E is rounded up to whole vectors, with zeros.
struct Blocks {
    int64_t width, dwords;                        // of a row: numbers, and dwords of `packed` numbers
    int32_t *key_columns, *value_columns;         // [block of keys][dword of E][key]: transposed
    int32_t* key_pairs;                           // [dword of keys][E]
    int32_t *q, *dy;                              // [query][dword of E]
    int32_t *q_pairs, *dy_pairs;                  // [dword of queries][E]
    int32_t *p, *ds, *ds_rows;                    // [dword of queries][key] twice, [query][dword of keys]
    float *scores, *dp;                           // [query][key]
    float *dq, *dk, *dv;                          // [query][E], [key][E] twice
    float largest[side], inverse[side], D[side];  // of each query: m, 1 / s
};

thread_local Scratch memory;

struct Cutter {
    int32_t* at;
    int32_t* take(int64_t count) {
        int32_t* taken = at;
        at += round_up(count, lanes);
        return taken;
    }
};

Blocks blocks_of(const AttentionBackward& a) {
    Blocks x;
    const int64_t keys = round_up(a.T, side);
    x.width = round_up(a.E, lanes * packed);
    x.dwords = x.width / packed;
    const int64_t all = keys * x.width, some = side * x.width, square = side * side;
    Cutter cut{memory.get<int32_t>(5 * all + 5 * some + 5 * square)};
    x.key_columns = cut.take(all);
    x.value_columns = cut.take(all);
    x.key_pairs = cut.take(all);
    x.dk = reinterpret_cast<float*>(cut.take(all));
    x.dv = reinterpret_cast<float*>(cut.take(all));
    for (int32_t** part : {&x.q, &x.dy, &x.q_pairs, &x.dy_pairs}) *part = cut.take(some);
    x.dq = reinterpret_cast<float*>(cut.take(some));
    for (int32_t** part : {&x.p, &x.ds, &x.ds_rows}) *part = cut.take(square);
    x.scores = reinterpret_cast<float*>(cut.take(square));
    x.dp = reinterpret_cast<float*>(cut.take(square));
    return x;
}

const char* head_of(const void* x, const AttentionBackward& a, const HeadStrides& strides, int64_t batch,
                    int64_t head) {
    return static_cast<const char*>(offset(x, a.dtype, batch * strides.batch + head * strides.head));
}

// --- into blocks

// `count` rows as dwords, zeros for the rest of the block.
MINILLM_TILE void load_rows(const AttentionBackward& a, const Blocks& x, const char* from, int64_t bytes, int64_t count,
                            int32_t* out) {
    for (int64_t i = 0; i < side; ++i, from += bytes)
        for (int64_t d = 0; d < x.dwords; d += lanes, out += lanes) {
            const int64_t left = a.E - d * packed;
            const bool there = i < count && left > 0;
            _mm512_storeu_si512(out, there ? Numbers::row(from, a.dtype, d * packed, left) : _mm512_setzero_si512());
        }
}

// The same rows, `packed` neighbours together: [dword of rows][E].
MINILLM_TILE void load_pairs(const AttentionBackward& a, const Blocks& x, const char* from, int64_t bytes,
                             int64_t count, int32_t* out) {
    for (int64_t i = 0; i < side; i += packed, from += packed * bytes)
        for (int64_t e = 0; e < x.width; e += lanes, out += lanes) {
            const char* next = i + 1 < count ? from + bytes : nullptr;
            const bool there = i < count && e < a.E;
            _mm512_storeu_si512(out, there ? Numbers::values(from, next, a.dtype, e, a.E - e) : _mm512_setzero_si512());
        }
}

// The same rows as columns: [dword of E][row].
MINILLM_TILE void load_columns(const AttentionBackward& a, const Blocks& x, const char* from, int64_t bytes,
                               int64_t count, int32_t* out) {
    for (int64_t i = 0; i < side; i += lanes)
        for (int64_t d = 0; d < x.dwords; d += lanes) {
            __m512i r[lanes];
            const int64_t left = a.E - d * packed;
            for (int64_t n = 0; n < lanes; ++n) {
                const bool there = i + n < count && left > 0;
                r[n] = there ? Numbers::row(from + (i + n) * bytes, a.dtype, d * packed, left) : _mm512_setzero_si512();
            }
            transpose(r);
            MINILLM_UNROLL16
            for (int n = 0; n < lanes; ++n) _mm512_storeu_si512(out + (d + n) * side + i, r[n]);
        }
}

void load_keys(const AttentionBackward& a, const BackwardTask& task, const Blocks& x) {
    const int64_t key_bytes = a.k_strides.token * size_of(a.dtype), value_bytes = a.v_strides.token * size_of(a.dtype);
    const char* k = head_of(a.k, a, a.k_strides, task.batch, task.group);
    const char* v = head_of(a.v, a, a.v_strides, task.batch, task.group);
    for (int64_t j = 0; j < a.T; j += side) {
        const int64_t count = std::min(side, a.T - j);
        load_columns(a, x, k + j * key_bytes, key_bytes, count, x.key_columns + j * x.dwords);
        load_columns(a, x, v + j * value_bytes, value_bytes, count, x.value_columns + j * x.dwords);
        load_pairs(a, x, k + j * key_bytes, key_bytes, count, x.key_pairs + j / packed * x.width);
    }
}

MINILLM_TILE float dot(const char* x, const char* y, const AttentionBackward& a) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < a.E; e += lanes)
        sum = _mm512_fmadd_ps(load16(x, a.dtype, e, a.E - e), load16(y, a.dtype, e, a.E - e), sum);
    return _mm512_reduce_add_ps(sum);
}

void load_queries(const AttentionBackward& a, const BackwardTask& task, int64_t head, int64_t first, Blocks& x) {
    const int64_t count = std::min(side, a.T - first), size = size_of(a.dtype);
    const auto rows = [&](const void* from, const HeadStrides& strides) {
        return head_of(from, a, strides, task.batch, head) + first * strides.token * size;
    };
    const char *q = rows(a.q, a.q_strides), *y = rows(a.y, a.y_strides), *dy = rows(a.dy, a.dy_strides);
    const int64_t q_bytes = a.q_strides.token * size, dy_bytes = a.dy_strides.token * size;
    load_rows(a, x, q, q_bytes, count, x.q);
    load_pairs(a, x, q, q_bytes, count, x.q_pairs);
    load_rows(a, x, dy, dy_bytes, count, x.dy);
    load_pairs(a, x, dy, dy_bytes, count, x.dy_pairs);
    for (int64_t i = 0; i < count; ++i) {
        x.D[i] = dot(dy + i * dy_bytes, y + i * a.y_strides.token * size, a);
        const float* statistics = a.statistics + ((task.batch * a.H + head) * a.T + first + i) * 2;
        x.largest[i] = statistics[0];
        x.inverse[i] = 1.0f / statistics[1];
    }
}

// --- between the products

// Scores and dp -> p and ds. Query i of the block sees its first `seen` + i keys; rows from `count` on see none.
MINILLM_TILE void soften(const Blocks& x, float scale, int64_t seen, int64_t count) {
    constexpr float log2_e = 0x1.715476p+0f;
    const __m512 by = _mm512_set1_ps(scale * log2_e);
    for (int64_t i = 0; i < side; i += packed)
        for (int64_t j = 0; j < side; j += lanes) {
            __m512 p[packed], ds[packed];
            MINILLM_UNROLL
            for (int r = 0; r < packed; ++r) {
                const int64_t row = i + r, left = row < count ? seen + row - j : 0;
                const __mmask16 visible = left > 0 ? first(left) : __mmask16(0);
                const float* at = x.scores + row * side + j;
                const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(at), _mm512_set1_ps(x.largest[row]));
                const __m512 power = exp2(_mm512_mul_ps(away, by));
                p[r] = _mm512_maskz_mul_ps(visible, power, _mm512_set1_ps(x.inverse[row]));
                const __m512 dp = _mm512_loadu_ps(x.dp + row * side + j);
                ds[r] = _mm512_maskz_mul_ps(visible, p[r], _mm512_sub_ps(dp, _mm512_set1_ps(x.D[row])));
                Numbers::store_row(x.ds_rows + (row * side + j) / packed, ds[r]);
            }
            _mm512_storeu_si512(x.p + i / packed * side + j, Numbers::pack(p));
            _mm512_storeu_si512(x.ds + i / packed * side + j, Numbers::pack(ds));
        }
}

// --- a task

MINILLM_TILE void store_queries(const AttentionBackward& a, const BackwardTask& task, int64_t head, int64_t first,
                                const Blocks& x, float scale) {
    for (int64_t i = 0; i < std::min(side, a.T - first); ++i)
        for (int64_t e = 0; e < a.E; e += lanes) {
            const int64_t out = ((task.batch * a.T + first + i) * a.H + head) * a.E + e;
            const __m512 sum = _mm512_loadu_ps(x.dq + i * x.width + e);
            store16(a.dq, a.dtype, out, a.E - e, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
        }
}

// The queries from `first` on against the keys from j on.
void backward_block(const AttentionBackward& a, Blocks& x, int64_t first, int64_t j, float scale) {
    const int64_t count = std::min(side, a.T - first), keys = std::min(side, a.T - j), vectors = x.width / lanes;
    const int64_t pairs = round_up(count, packed) / packed;
    const int32_t *key_columns = x.key_columns + j * x.dwords, *value_columns = x.value_columns + j * x.dwords;
    multiply({x.q, x.dwords, 1, key_columns, side, x.scores, side}, count, side / lanes, x.dwords, false);
    multiply({x.dy, x.dwords, 1, value_columns, side, x.dp, side}, count, side / lanes, x.dwords, false);
    soften(x, scale, first - j + 1, count);
    const int32_t* key_pairs = x.key_pairs + j / packed * x.width;
    multiply({x.ds_rows, side / packed, 1, key_pairs, x.width, x.dq, x.width}, count, vectors,
             round_up(keys, packed) / packed, j > 0);
    multiply({x.ds, 1, side, x.q_pairs, x.width, x.dk + j * x.width, x.width}, keys, vectors, pairs, true);
    multiply({x.p, 1, side, x.dy_pairs, x.width, x.dv + j * x.width, x.width}, keys, vectors, pairs, true);
}

// A head is summed by itself first: shorter sums have smaller errors.
void add_head(const AttentionBackward& a, const BackwardTask& task, const Blocks& x, bool first) {
    for (int64_t j = 0; j < a.T; ++j)
        for (int64_t e = 0; e < a.E; ++e) {
            const int64_t at = j * a.E + e, from = j * x.width + e;
            task.dk[at] = first ? x.dk[from] : task.dk[at] + x.dk[from];
            task.dv[at] = first ? x.dv[from] : task.dv[at] + x.dv[from];
        }
}

void backward_task(const AttentionBackward& a, const BackwardTask& task) {
    Blocks x = blocks_of(a);
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.E));
    load_keys(a, task, x);
    for (int64_t head = task.first_head; head < task.first_head + task.heads; ++head) {
        std::fill_n(x.dk, a.T * x.width, 0.0f);
        std::fill_n(x.dv, a.T * x.width, 0.0f);
        for (int64_t first = 0; first < a.T; first += side) {
            load_queries(a, task, head, first, x);
            for (int64_t j = 0; j <= first; j += side) backward_block(a, x, first, j, scale);
            store_queries(a, task, head, first, x, scale);
        }
        add_head(a, task, x, head == task.first_head);
    }
}

}  // namespace
}  // namespace minillm
