// The gradients of causal attention (attention.h, without padding and bias, all tokens new: T = S), a block of keys and
// one of queries at a time (arXiv 2205.14135, algorithm 4).
//
//     p_(h,i,j)  = e^((q_(h,i) . k_(g,j) - m_(h,i)) / sqrt(E)) / s_(h,i)         m, s: what the forward pass leaves
//     D_(h,i)    = dy_(h,i) . y_(h,i)                   = sum_j p_j dy . v_j
//     ds_(h,i,j) = p_(h,i,j) (dy_(h,i) . v_(g,j) - D_(h,i))
//     dq_(h,i)   = sum_j ds_(h,i,j) k_(g,j) / sqrt(E)
//     dk_(g,j)   = sum over the heads h of group g, over i  ds_(h,i,j) q_(h,i) / sqrt(E)
//     dv_(g,j)   = sum over the same                        p_(h,i,j) dy_(h,i)
//
//     q, y, dy (B, H, T, E)    k, v (B, G, T, E)    the E numbers of a head lie together, everything else at any stride
//     dq (B, T, H, E)          dk, dv (B, T, G, E)  contiguous, in the format of q
//
// Sums are fp32; results are rounded once. avx512bf16 rounds p and ds to bf16 for their products, as torch's kernel
// does.
//
// Reading order: this file, attention_backward.cpp (the formula, and who does what), attention_backward_tile.h.
#pragma once

#include "attention.h"

namespace minillm {

struct AttentionBackward {
    const void *q, *k, *v, *y, *dy;
    const float* statistics;  // (B, H, T, 2): m, s
    void *dq, *dk, *dv;
    Dtype dtype;
    int64_t B, H, G, T, E;
    HeadStrides q_strides, k_strides, v_strides, y_strides, dy_strides;
};

void attention_backward(const AttentionBackward& a, Isa isa, int threads);

// --- what a variant implements: some heads of one group

struct BackwardTask {
    int64_t batch, group, first_head, heads;
    float *dk, *dv;  // (T, E) each: the sums over these heads, dk without its 1 / sqrt(E)
};

using BackwardKernel = void (*)(const AttentionBackward& a, const BackwardTask& task);

void attention_backward_ref(const AttentionBackward& a, const BackwardTask& task);
#if defined(__x86_64__)
void attention_backward_avx512(const AttentionBackward& a, const BackwardTask& task);
void attention_backward_avx512bf16(const AttentionBackward& a, const BackwardTask& task);  // bf16 only
#endif

}  // namespace minillm
