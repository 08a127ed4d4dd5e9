// Attention of a tile: up to 64 rows of a group, as the lanes of one to four vectors, against a block of keys.
//
// A lane is a row (arXiv 2205.14135, turned on its side). A key meets all rows as one number broadcast to sixteen
// lanes,
//     score_j[lane] += q_e[lane] * k_(j,e)          y_e[lane] += p_j[lane] * v_(j,e)
// so that scores, their maximum, their exponentials and sums never leave their lane: no sum runs across a register, and
// keys and values stay as they lie. Only q and y are transposed, once a tile.
//
// Fewer than nine rows, a decoded token, would leave lanes idle. Then each row takes `parts` = 2, 4, 8 or 16 lanes:
// lane (row, part) holds every parts-th dword of q and of y; a broadcast brings `parts` dwords at once; the partial
// scores of a row's lanes are added up, and all of them go on with the same p.
//
// A dword holds Numbers::packed numbers: one fp32, or two bf16, neighbours in e for q and k, in j for p and v. This
// file is included by each variant, after MINILLM_TILE (its target) and Numbers, which says what is done with a dword.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "parallel.h"
#include "vectors_avx512.h"

namespace minillm {
namespace {

constexpr int64_t lanes = 16;
constexpr int64_t keys_per_block =
    96;  // block of keys, values, scores: all in the second-level cache; q and k in the first
constexpr int64_t packed = Numbers::packed;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Sums in registers: C keys (or numbers of v) by V vectors of rows. At least 12, to hide the latency of multiply_add.
template <int V, int P>
constexpr int columns = V == 4 || V == 3 ? 24 / V
                        : V == 2         ? 8
                        : P == 16        ? 4
                        : P == 8         ? 8
                                         : 16;

struct Tile;
struct Block;

// What is done with a tile, for its number of vectors and of parts.
struct Steps {
    void (*start)(const Attention&, const AttentionRows&, Tile&);
    void (*attend)(const Attention&, Tile&, const Block&, int64_t keys);
    void (*finish)(const Attention&, const AttentionRows&, const Tile&);
};

struct Tile {
    Steps steps;
    int64_t first, rows;
    int64_t end;                               // keys that its last row sees, pads included
    int64_t whole;                             // keys that each of its rows sees
    int32_t* q;                                // [dword of the row / parts][vector][lane]
    float* y;                                  // [number of the row / parts][vector][lane]
    alignas(64) float largest[rows_per_tile];  // score so far, of each lane
    alignas(64) float sum[rows_per_tile];      // of p
    alignas(64) float factor[rows_per_tile];   // what the block makes of sums before it
    alignas(64) int32_t seen[rows_per_tile];   // keys
    alignas(64) int32_t bias[rows_per_tile];   // where the bias of its head stands
    AttentionRow row[rows_per_tile];           // of each row, not lane
};

struct Block {
    int64_t first;           // key
    int32_t *keys, *values;  // [key][stride], [key / packed][stride]
    int64_t key_stride, value_stride;
    float* bias;          // [head of the group][key] or null
    const uint8_t* keep;  // [key] or null
    float* scores;        // [key][vector][lane]
    int32_t* weights;     // [key / packed][vector][lane]
    float scale;          // 1 / sqrt(E)
    bool one_head;
};

struct TileMemory {
    Scratch tiles, numbers, block;
};

thread_local TileMemory memory;

// --- lanes

// The P dwords at x for the lanes of every row.
template <int P>
MINILLM_TILE inline __m512i broadcast(const int32_t* x) {
    if constexpr (P == 1) return _mm512_set1_epi32(*x);
    if constexpr (P == 2) return _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    if constexpr (P == 4) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    if constexpr (P == 8) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_loadu_si512(x);
}

// Each lane gets the sum of its row's P lanes.
template <int P>
MINILLM_TILE inline __m512 add_parts(__m512 x) {
    if constexpr (P >= 2) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
    if constexpr (P >= 4) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    if constexpr (P >= 8) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    if constexpr (P >= 16) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return x;
}

// --- the two products

// scores[j] = q . k_j for `count` keys, rounded up to whole columns.
template <int V, int P>
MINILLM_TILE void multiply_keys(const int32_t* q, int64_t steps, const Block& block, int64_t count) {
    constexpr int C = columns<V, P>;
    for (int64_t j = 0; j < count; j += C) {
        const int32_t* keys = block.keys + j * block.key_stride;
        __m512 sum[C][V];
        MINILLM_UNROLL16
        for (int c = 0; c < C; ++c) MINILLM_UNROLL16
        for (int v = 0; v < V; ++v) sum[c][v] = _mm512_setzero_ps();
        for (int64_t t = 0; t < steps; ++t) {
            __m512i rows[V];
            MINILLM_UNROLL16
            for (int v = 0; v < V; ++v) rows[v] = _mm512_load_si512(q + (t * V + v) * lanes);
            MINILLM_UNROLL16
            for (int c = 0; c < C; ++c) {
                const __m512i key = broadcast<P>(keys + c * block.key_stride + t * P);
                MINILLM_UNROLL16
                for (int v = 0; v < V; ++v) sum[c][v] = Numbers::multiply_add(sum[c][v], rows[v], key);
            }
        }
        MINILLM_UNROLL16
        for (int c = 0; c < C; ++c) MINILLM_UNROLL16
        for (int v = 0; v < V; ++v) _mm512_store_ps(block.scores + ((j + c) * V + v) * lanes, add_parts<P>(sum[c][v]));
    }
}

// y_e = y_e factor + sum_j p_j v_(j, e), `steps` rounded up to whole columns.
template <int V, int P>
MINILLM_TILE void add_values(const Tile& tile, int64_t steps, const Block& block, int64_t count) {
    constexpr int C = columns<V, P>;
    for (int64_t e = 0; e < steps; e += C) {
        float* y = tile.y + e * V * lanes;
        __m512 sum[C][V];
        MINILLM_UNROLL16
        for (int c = 0; c < C; ++c) MINILLM_UNROLL16
        for (int v = 0; v < V; ++v)
            sum[c][v] = _mm512_mul_ps(_mm512_load_ps(y + (c * V + v) * lanes), _mm512_load_ps(tile.factor + v * lanes));
        const int32_t* values = block.values + e * P;
        for (int64_t j = 0; j < count; j += packed, values += block.value_stride) {
            __m512i weights[V];
            MINILLM_UNROLL16
            for (int v = 0; v < V; ++v) weights[v] = _mm512_load_si512(block.weights + (j / packed * V + v) * lanes);
            MINILLM_UNROLL16
            for (int c = 0; c < C; ++c) {
                const __m512i value = broadcast<P>(values + c * P);
                MINILLM_UNROLL16
                for (int v = 0; v < V; ++v) sum[c][v] = Numbers::multiply_add(sum[c][v], weights[v], value);
            }
        }
        MINILLM_UNROLL16
        for (int c = 0; c < C; ++c) MINILLM_UNROLL16
        for (int v = 0; v < V; ++v) _mm512_store_ps(y + (c * V + v) * lanes, sum[c][v]);
    }
}

// --- between them

// Adds the bias, hides what a row does not see. `shown` is false where the key is padding: then only itself sees it.
MINILLM_TILE inline __m512 adjusted(__m512 score, const Tile& tile, const Block& block, int64_t j, int64_t lane,
                                    bool shown) {
    if (block.bias) {
        const __m512i index = _mm512_load_si512(tile.bias + lane);
        const __m512 bias =
            block.one_head ? _mm512_set1_ps(block.bias[j]) : _mm512_i32gather_ps(index, block.bias + j, 4);
        score = _mm512_fmadd_ps(score, _mm512_set1_ps(block.scale), bias);
        score =
            _mm512_max_ps(_mm512_set1_ps(-0x1p126f), score);  // finite over ln 2, where the bias is the least number
    }
    const __m512i seen = _mm512_load_si512(tile.seen + lane);
    const int key = static_cast<int>(block.first + j);
    const __mmask16 visible = shown ? _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(key))
                                    : _mm512_cmpeq_epi32_mask(seen, _mm512_set1_epi32(key + 1));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), visible, score);
}

// scores -> weights, the largest score and the sum so far, and what `y` is to be multiplied by.
template <int V>
MINILLM_TILE void soften(Tile& tile, const Block& block, int64_t count) {
    __m512 largest[V];
    MINILLM_UNROLL16
    for (int v = 0; v < V; ++v) largest[v] = _mm512_load_ps(tile.largest + v * lanes);
    for (int64_t j = 0; j < count; ++j) {
        const bool shown = !block.keep || (block.first + j < tile.end && block.keep[j]);
        const bool as_it_is = shown && !block.bias && block.first + j < tile.whole;
        MINILLM_UNROLL16
        for (int v = 0; v < V; ++v) {
            float* at = block.scores + (j * V + v) * lanes;
            __m512 score = _mm512_load_ps(at);
            if (!as_it_is) _mm512_store_ps(at, score = adjusted(score, tile, block, j, v * lanes, shown));
            largest[v] = _mm512_max_ps(largest[v], score);
        }
    }
    constexpr float log2_e = 0x1.715476p+0f;
    const __m512 scale = _mm512_set1_ps(block.bias ? log2_e : block.scale * log2_e);
    // The difference first, then the scale: the largest score has p = 1 however large it is. A row that has seen
    // nothing yet: -infinity - least, not -infinity - -infinity.
    const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::max());
    __m512 sum[V];
    MINILLM_UNROLL16
    for (int v = 0; v < V; ++v) {
        const __m512 before = _mm512_load_ps(tile.largest + v * lanes);
        _mm512_store_ps(tile.largest + v * lanes, largest[v]);
        largest[v] = _mm512_max_ps(largest[v], least);
        const __m512 factor = exp2(_mm512_mul_ps(_mm512_sub_ps(before, largest[v]), scale));
        _mm512_store_ps(tile.factor + v * lanes, factor);
        sum[v] = _mm512_mul_ps(_mm512_load_ps(tile.sum + v * lanes), factor);
    }
    for (int64_t j = 0; j < count; j += packed) MINILLM_UNROLL16
    for (int v = 0; v < V; ++v) {
        __m512 weight[packed];
        MINILLM_UNROLL16
        for (int i = 0; i < packed; ++i) {
            const __m512 score = _mm512_load_ps(block.scores + ((j + i) * V + v) * lanes);
            weight[i] = exp2(_mm512_mul_ps(_mm512_sub_ps(score, largest[v]), scale));
            sum[v] = _mm512_add_ps(sum[v], weight[i]);
        }
        _mm512_store_si512(block.weights + (j / packed * V + v) * lanes, Numbers::pack(weight));
    }
    MINILLM_UNROLL16
    for (int v = 0; v < V; ++v) _mm512_store_ps(tile.sum + v * lanes, sum[v]);
}

// The first `count` keys of the block, for one tile.
template <int V, int P>
void attend_block(const Attention& a, Tile& tile, const Block& block, int64_t count) {
    count = round_up(count, packed);
    multiply_keys<V, P>(tile.q, (a.E + packed * P - 1) / (packed * P), block, count);
    soften<V>(tile, block, count);
    add_values<V, P>(tile, (a.E + P - 1) / P, block, count);
}

// --- into lanes and out of them

// One row of x as dwords of numbers, zeros from E on.
MINILLM_TILE inline void copy_row(const void* x, const Attention& a, int32_t* out) {
    for (int64_t e = 0; e < a.E; e += lanes * packed, out += lanes)
        _mm512_storeu_si512(out, Numbers::row(x, a.dtype, e, a.E - e));
}

// Rows of q, a row a lane.
template <int V>
MINILLM_TILE void load_queries(const Attention& a, const Tile& tile) {
    for (int64_t v = 0; v < V; ++v) {
        const void* q[lanes];
        for (int64_t i = 0; i < lanes; ++i)
            q[i] = offset(a.q, a.dtype, tile.row[std::min(v * lanes + i, tile.rows - 1)].q);
        for (int64_t e = 0; e < a.E; e += lanes * packed) {
            __m512i r[lanes];
            MINILLM_UNROLL16
            for (int i = 0; i < lanes; ++i) r[i] = Numbers::row(q[i], a.dtype, e, a.E - e);
            transpose(r);
            MINILLM_UNROLL16
            for (int i = 0; i < lanes; ++i) _mm512_store_si512(tile.q + ((e / packed + i) * V + v) * lanes, r[i]);
        }
    }
}

template <int V>
MINILLM_TILE void store_rows(const Attention& a, const Tile& tile) {
    for (int64_t v = 0; v < V; ++v) {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(tile.sum + v * lanes));
        const int64_t count = std::min(lanes, tile.rows - v * lanes);
        for (int64_t e = 0; e < a.E; e += lanes) {
            __m512i r[lanes];
            MINILLM_UNROLL16
            for (int i = 0; i < lanes; ++i)
                r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(tile.y + ((e + i) * V + v) * lanes), inverse));
            transpose(r);
            for (int64_t i = 0; i < count; ++i)
                store16(a.y, a.dtype, tile.row[v * lanes + i].y + e, a.E - e, _mm512_castsi512_ps(r[i]));
        }
    }
}

// Rows of q, P lanes each.
template <int P>
MINILLM_TILE void load_few_queries(const Attention& a, const Tile& tile) {
    const int64_t steps = round_up(a.E, lanes * packed) / packed / P;
    alignas(64) int32_t row[longest_head];
    std::memset(tile.q, 0, sizeof(int32_t) * steps * lanes);
    for (int64_t m = 0; m < tile.rows; ++m) {
        copy_row(offset(a.q, a.dtype, tile.row[m].q), a, row);
        for (int64_t t = 0; t < steps; ++t) std::memcpy(tile.q + t * lanes + m * P, row + t * P, sizeof(int32_t) * P);
    }
}

template <int P>
MINILLM_TILE void store_few_rows(const Attention& a, const Tile& tile) {
    alignas(64) float row[longest_head];
    for (int64_t m = 0; m < tile.rows; ++m) {
        for (int64_t e = 0; e < a.E; e += P) std::memcpy(row + e, tile.y + e / P * lanes + m * P, sizeof(float) * P);
        const __m512 inverse = _mm512_set1_ps(1.0f / tile.sum[m * P]);
        for (int64_t e = 0; e < a.E; e += lanes)
            store16(a.y, a.dtype, tile.row[m].y + e, a.E - e, _mm512_mul_ps(_mm512_load_ps(row + e), inverse));
    }
}

// Lanes beyond the last row repeat it.
template <int V, int P>
void start(const Attention& a, const AttentionRows& rows, Tile& tile) {
    const int64_t share = a.H / a.G, steps = (a.E + P - 1) / P + lanes;  // and what whole columns add
    std::memset(tile.y, 0, sizeof(float) * steps * V * lanes);
    for (int64_t m = 0; m < tile.rows; ++m) tile.row[m] = row_of(a, rows.batch, rows.group, tile.first + m);
    for (int64_t lane = 0; lane < V * lanes; ++lane) {
        const AttentionRow& row = tile.row[std::min(lane / P, tile.rows - 1)];
        tile.largest[lane] = -std::numeric_limits<float>::infinity();
        tile.sum[lane] = 0;
        tile.seen[lane] = static_cast<int32_t>(a.S - a.T + row.token + 1);
        tile.bias[lane] = static_cast<int32_t>((row.head - rows.group * share) * keys_per_block);
    }
    if constexpr (P == 1)
        load_queries<V>(a, tile);
    else
        load_few_queries<P>(a, tile);
}

// What the backward pass starts from.
template <int P>
void store_statistics(const Attention& a, const AttentionRows& rows, const Tile& tile) {
    for (int64_t m = 0; m < tile.rows; ++m) {
        float* out = a.statistics + ((rows.batch * a.H + tile.row[m].head) * a.T + tile.row[m].token) * 2;
        out[0] = tile.largest[m * P];
        out[1] = tile.sum[m * P];
    }
}

template <int V, int P>
void finish(const Attention& a, const AttentionRows& rows, const Tile& tile) {
    if (a.statistics) store_statistics<P>(a, rows, tile);
    if constexpr (P == 1)
        store_rows<V>(a, tile);
    else
        store_few_rows<P>(a, tile);
}

// `count` keys from block.first on, as dwords; a last odd value stands beside zeros.
MINILLM_TILE void load_block(const Attention& a, const AttentionRows& rows, const Block& block, int64_t count) {
    const auto first = [&](const void* x, const HeadStrides& strides) {
        return offset(x, a.dtype, rows.batch * strides.batch + rows.group * strides.head + block.first * strides.token);
    };
    const char* key = static_cast<const char*>(first(a.k, a.k_strides));
    const int64_t key_bytes = a.k_strides.token * size_of(a.dtype), value_bytes = a.v_strides.token * size_of(a.dtype);
    for (int64_t j = 0; j < count; ++j) copy_row(key + j * key_bytes, a, block.keys + j * block.key_stride);
    const char* value = static_cast<const char*>(first(a.v, a.v_strides));
    for (int64_t j = 0; j < count; j += packed, value += packed * value_bytes) {
        int32_t* out = block.values + j / packed * block.value_stride;
        const char* next = j + 1 < count ? value + value_bytes : nullptr;
        for (int64_t e = 0; e < a.E; e += lanes)
            _mm512_store_si512(out + e, Numbers::values(value, next, a.dtype, e, a.E - e));
    }
    const int64_t share = a.H / a.G;
    for (int64_t r = 0; block.bias && r < share; ++r) {
        const int64_t from = rows.batch * a.bias_batch + (rows.group * share + r) * a.S + block.first;
        for (int64_t j = 0; j < count; j += lanes)
            _mm512_store_ps(block.bias + r * keys_per_block + j, load16(a.bias, a.dtype, from + j, count - j));
    }
}

// --- a tile's shape, V vectors of rows with P lanes each, is known to the compiler

template <int V, int P>
constexpr Steps steps_of = {start<V, P>, attend_block<V, P>, finish<V, P>};

Steps steps_for(int64_t vectors, int64_t parts) {
    switch (vectors == 1 ? -parts : vectors) {
        case 4:
            return steps_of<4, 1>;
        case 3:
            return steps_of<3, 1>;
        case 2:
            return steps_of<2, 1>;
        case -1:
            return steps_of<1, 1>;
        case -2:
            return steps_of<1, 2>;
        case -4:
            return steps_of<1, 4>;
        case -8:
            return steps_of<1, 8>;
        default:
            return steps_of<1, 16>;
    }
}

// --- memory

// Lanes that each row of a group takes: where one vector holds all of them, as many as there are.
int64_t parts_of(const Attention& a) {
    int64_t parts = 1;
    while (parts < lanes && 2 * parts * a.T * (a.H / a.G) <= lanes) parts *= 2;
    return parts;
}

Block block_of(const Attention& a, const AttentionRows& rows) {
    Block block{};
    block.key_stride = round_up(a.E, lanes * packed) / packed;
    block.value_stride = round_up(a.E, lanes);
    const int64_t keys = keys_per_block * block.key_stride;
    const int64_t values = keys_per_block / packed * block.value_stride + lanes * lanes;  // whole columns are read
    const int64_t scores = keys_per_block * rows_per_tile, bias = a.bias ? a.H / a.G * keys_per_block : 0;
    block.keys = memory.block.get<int32_t>(keys + values + scores + scores + bias);
    block.values = block.keys + keys;
    block.weights = block.values + values;
    block.scores = reinterpret_cast<float*>(block.weights + scores);
    block.bias = a.bias ? block.scores + scores : nullptr;
    block.keep = a.keep ? a.keep + rows.batch * a.S : nullptr;
    block.scale = 1.0f / std::sqrt(static_cast<float>(a.E));
    block.one_head = a.H == a.G;
    return block;
}

// The rows in tiles of up to 64.
Tile* tiles_of(const Attention& a, const AttentionRows& rows, int64_t count) {
    const int64_t parts = parts_of(a), share = a.H / a.G;
    Tile* tiles = memory.tiles.get<Tile>(count);
    const int64_t q = round_up(a.E, lanes * packed) / packed * rows_per_tile;
    const int64_t y = (round_up(a.E, lanes) + lanes) * rows_per_tile;  // whole columns are written
    int32_t* numbers = memory.numbers.get<int32_t>(count * (q + y));
    for (int64_t i = 0; i < count; ++i, numbers += q + y) {
        Tile& tile = tiles[i];
        tile.first = rows.first + i * rows_per_tile;
        tile.rows = std::min(rows_per_tile, rows.first + rows.count - tile.first);
        tile.whole = a.S - a.T + tile.first / share + 1;
        tile.end = a.S - a.T + (tile.first + tile.rows - 1) / share + 1;
        tile.steps = steps_for((tile.rows * parts + lanes - 1) / lanes, parts);
        tile.q = numbers;
        tile.y = reinterpret_cast<float*>(numbers + q);
    }
    return tiles;
}

void attend_rows(const Attention& a, const AttentionRows& rows) {
    const int64_t count = (rows.count + rows_per_tile - 1) / rows_per_tile;
    Tile* tiles = tiles_of(a, rows, count);
    for (int64_t i = 0; i < count; ++i) tiles[i].steps.start(a, rows, tiles[i]);
    Block block = block_of(a, rows);
    for (const int64_t end = tiles[count - 1].end; block.first < end; block.first += keys_per_block) {
        load_block(a, rows, block, std::min(keys_per_block, end - block.first));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t keys = std::min(keys_per_block, tiles[i].end - block.first);
            if (keys > 0) tiles[i].steps.attend(a, tiles[i], block, keys);
        }
        if (block.keep) block.keep += keys_per_block;
    }
    for (int64_t i = 0; i < count; ++i) tiles[i].steps.finish(a, rows, tiles[i]);
}

}  // namespace
}  // namespace minillm
