// Causal attention over grouped key/value heads (arXiv 1706.03762 §3.2, 2305.13245), a block of keys at a time
// (arXiv 2205.14135 §3.1).
//
//     score_(h,i,j) = q_(h,i) . k_(g,j) / sqrt(E) + bias_(h,j)              g = h / (H/G), i < T, j < S
//     y_(h,i)       = sum_j softmax_j(score_(h,i,j)) v_(g,j)                over the j that query i sees
//
// Query i is token S - T + i. It sees token j where j <= S - T + i and keep_j, and itself, kept or not: no row is
// empty.
//
//     q (B, H, T, E)    k, v (B, G, S, E)    the E numbers of a head lie together, everything else at any stride
//     y (B, T, H, E)    contiguous           keep (B, S) bytes or null        bias (B or 1, H, S) or null
//
// Scores, softmax and sums are fp32; y is rounded once. Of a block of keys, with m the largest score so far,
//     p_j = 2^((score_j - m) / ln 2)     sum = sum 2^((m' - m) / ln 2) + sum_j p_j     y = y 2^((m' - m) / ln 2) +
//     sum_j p_j v_j
// where m' was m before it. avx512bf16 rounds p (not its sum) to bf16 for the product with v, as torch's kernel does.
//
// The H/G heads that share keys and values are rows of one matrix: row m of a group is head m % (H/G) of token
// m / (H/G). So a cached key is read once for all of them, and neighbouring rows see nearly the same keys.
//
// Reading order: this file, attention_ref.cpp (the formula), attention.cpp (who does what), attention_tile.h (the
// algorithm), attention_avx512.cpp and attention_avx512bf16.cpp (its numbers).
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

struct HeadStrides {
    int64_t batch, head, token;  // in numbers
};

struct Attention {
    const void *q, *k, *v;
    void* y;
    Dtype dtype;  // of q, k, v, y and bias
    int64_t B, H, G, T, S, E;
    HeadStrides q_strides, k_strides, v_strides;
    const uint8_t* keep;  // (B, S) or null
    const void* bias;     // (B or 1, H, S) or null
    int64_t bias_batch;   // numbers from one row of the batch to the next; 0 where all share one
    float* statistics;    // (B, H, T, 2), becomes max_j q . k_j and sum_j e^(score_j - its largest); or null. No bias
};

void attention(const Attention& a, Isa isa, int threads);

// --- what a variant implements: some rows of one group

struct AttentionRows {
    int64_t batch, group, first, count;
};

using AttentionKernel = void (*)(const Attention& a, const AttentionRows& rows);

void attention_ref(const Attention& a, const AttentionRows& rows);
#if defined(__x86_64__)
void attention_avx512(const Attention& a, const AttentionRows& rows);
void attention_avx512bf16(const Attention& a, const AttentionRows& rows);  // bf16 only
#endif

constexpr int64_t longest_head = 256;
constexpr int64_t rows_per_tile = 64;  // rows of a group that meet a key together

// Where the E numbers of row m of a group stand in q and y.
struct AttentionRow {
    int64_t q, y, token, head;
};

inline AttentionRow row_of(const Attention& a, int64_t batch, int64_t group, int64_t m) {
    const int64_t share = a.H / a.G, token = m / share, head = group * share + m % share;
    return {batch * a.q_strides.batch + head * a.q_strides.head + token * a.q_strides.token,
            ((batch * a.T + token) * a.H + head) * a.E, token, head};
}

}  // namespace minillm
