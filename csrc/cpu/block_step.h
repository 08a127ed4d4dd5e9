// One new token a row through a whole block of the Llama kind, in one call. x, y (B, D):
//
//     n = rms_norm(x);    q, k, v = linears(n);    q, k turned;    k, v into the cache;    a = attention(q, cache)
//     h = x + linear(a);  n = rms_norm(h);         g, u = linears(n);                     y = h + linear(swiglu(g, u))
//
// Nothing is computed here: these are the kernels that the modules of minillm/model call one by one, in the same order,
// hence with the same bits. What is saved is the way through Python between them: 200 us a block, 15% of a token's time
// at 1.1 B parameters in int8, 25% in NF4, during which the memory would stand idle.
#pragma once

#include <variant>

#include "int8_linear.h"
#include "isa.h"
#include "nf4.h"
#include "numbers.h"

namespace minillm {

struct FloatMatrix {
    const void* w;  // (N, K)
};

struct Int8Matrix {
    const int8_t* w;     // (N, K)
    const float* scale;  // (N)
    float threshold;
};

struct AnyLinear {
    std::variant<FloatMatrix, Int8Matrix, Nf4Weight> matrix;
    const void* bias;  // (N) or null
    int64_t N, K;
};

struct BlockWeights {
    Dtype dtype;  // of norms, biases, float matrices, and of all that is computed
    float eps;
    int64_t D, H, G, E;
    const void *attention_norm, *mlp_norm;  // (D)
    AnyLinear q, k, v, o, gate, up, down;
};

struct BlockStep {
    const void* x;
    void* y;
    int64_t B;
    const void *cos, *sin;  // (tables, d): row b reads table b % tables
    int64_t tables, d;
    void *keys, *values;  // (B, G, capacity, E), of which `past` tokens are there; one is added
    int64_t past, capacity;
    const uint8_t* keep;  // (B, past + 1), 0 for padding; or null
};

void block_step(const BlockWeights& weights, const BlockStep& step, Isa isa, int threads);

}  // namespace minillm
