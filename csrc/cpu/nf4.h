// NF4 and FP4 (QLoRA, arXiv 2305.14314 §3; bitsandbytes 0.50): weights of 4 bits, one scale a block.
//
//     absmax[b] = max |w[i]| over the `block` numbers of block b; w (N, K) is read row by row, blocks may cross rows
//     q[i]      = the code nearest to w[i] / absmax[b]; in the middle between two, the lower
//     packed[i / 2] = q[i] << 4 | q[i + 1]                        for even i: the high four bits come first
//     w[i]     ~= code[q[i]] * absmax[b]                          fp32, then rounded to the format wanted
//     y[m, n]   = sum_k x[m, k] w[n, k] + bias[n]                 fp32, rounded once
//
// Double quantisation (§3 there) keeps absmax itself in 8 bits, 256 of them sharing one scale:
//     absmax[b] = map[absmax8[b]] * absmax2[b / 256] + offset     two roundings; decoded while the weights stream by
//
// Facts that the variants rest on:
//   - vpermps and vpermw look up with the low 4 and 5 bits of an index and ignore the others: no masks, and for vpermw
//     the table of 16 stands twice
//   - a word of packed holds elements 4w + {1, 0, 3, 2} at shifts 0, 4, 8, 12; a dword 8i + (t ^ 1) at shift 4t. So x,
//     not the weights, is brought into that order, once a call
//   - codes in bf16 are rounded a second time. `bf16_factor` makes them fall close to bf16 numbers, see nf4_ref.cpp
//
// Reading order: this file, nf4_ref.cpp (the definitions), nf4.cpp (who does what), nf4_avx512bf16.cpp (the fast one).
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace minillm {

enum class Nf4Kind : int { nf4 = 0, fp4 = 1 };

constexpr int64_t absmax_block = 256;  // absmax of so many blocks share one scale, in double quantisation

struct Nf4Scales {
    const float* absmax;     // (blocks), or null and then:
    const uint8_t* absmax8;  // (blocks)
    const float* absmax2;    // (ceil(blocks / 256))
    const float* map;        // (256)
    const float* offset;     // (1)
};

struct Nf4Weight {
    const uint8_t* packed;  // (ceil(N K / 2))
    Nf4Scales scales;
    Nf4Kind kind;
    int64_t N, K, block;
};

struct Nf4Tile {
    int64_t row, rows, column, columns;
};

// x (count numbers) -> packed (ceil(count / 2)), absmax (ceil(count / block)). block is even.
void nf4_quantise(const void* x, Dtype dtype, int64_t count, int64_t block, Nf4Kind kind, uint8_t* packed,
                  float* absmax, Isa isa, int threads);

// The tile of w -> out (tile.rows, tile.columns).
void nf4_dequantise(const Nf4Weight& weight, const Nf4Tile& tile, void* out, Dtype dtype, Isa isa, int threads);

// x (M, K), bias (N) or null -> y (M, N), all of one dtype. For few rows of x: the weights are read once, as they lie.
void nf4_linear(const void* x, Dtype dtype, int64_t M, const Nf4Weight& weight, const void* bias, void* y, Isa isa,
                int threads);

// --- what a variant implements

struct Nf4Code {
    float code[16];
    float bounds[16];        // between the codes in rising order; 15 of them
    int32_t order[16];       // rank -> code
    uint16_t bf16_code[16];  // code * bf16_factor
    float bf16_factor;
};

const Nf4Code& nf4_code(Nf4Kind kind);

// One row of weights whose blocks do not cross rows: K % block == 0 and block = 1 << shift >= 32.
struct Nf4Row {
    const uint8_t* packed;
    const float* absmax;
    int64_t K;
    int shift;
};

struct Nf4Kernels {
    // One block -> its absmax, and a code in each byte of q. A short block at the end is scaled differently (see ref).
    float (*quantise)(const void* x, Dtype dtype, int64_t count, bool is_short, const Nf4Code& code, uint8_t* q);
    // Numbers of one block, from an even one on.
    void (*dequantise)(const uint8_t* packed, const float* code, float absmax, int64_t count, void* out, Dtype dtype);
    // Whole blocks of an even length; null where `dequantise` one by one is as fast.
    void (*dequantise_blocks)(const uint8_t* packed, const float* code, const float* absmax, int64_t blocks,
                              int64_t block, void* out, Dtype dtype);
    // out[b] = map[codes[b]] * scale + offset, two roundings: absmax of blocks that share a scale.
    void (*widen)(const uint8_t* codes, const float* map, float scale, float offset, int64_t count, float* out);
    // y[m] = sum_k x[m, k] w[k]
    void (*multiply)(const float* x, int64_t M, const float* w, int64_t K, float* y);
    // For rows as above; null where a variant has nothing better than dequantise and multiply. `arrange` brings a row
    // of x into the order of the packed weights: arranged_bytes for each 128 numbers, the last ones filled up with
    // zeros.
    void (*arrange)(const void* x, Dtype dtype, int64_t K, void* arranged);
    void (*dot)(const void* arranged, int64_t M, const Nf4Row& row, const Nf4Code& code, float* y);
    int64_t arranged_bytes;
};

constexpr int64_t nf4_chunk = 128;    // weights in 64 bytes
constexpr int64_t most_nf4_rows = 8;  // rows of x that multiply and dot take

const Nf4Kernels& nf4_ref();
#if defined(__x86_64__)
const Nf4Kernels& nf4_avx2();
const Nf4Kernels& nf4_avx512();
const Nf4Kernels& nf4_avx512bf16();  // x in bf16 only
#endif

}  // namespace minillm
