// The definition of attention, one row at a time.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"

namespace minillm {
namespace {

void attend_row(const Attention& a, const AttentionRows& rows, int64_t m) {
    const AttentionRow row = row_of(a, rows.batch, rows.group, m);
    const int64_t self = a.S - a.T + row.token;
    const void* q = offset(a.q, a.dtype, row.q);
    const void* k = offset(a.k, a.dtype, rows.batch * a.k_strides.batch + rows.group * a.k_strides.head);
    const void* v = offset(a.v, a.dtype, rows.batch * a.v_strides.batch + rows.group * a.v_strides.head);
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.E));

    std::vector<float> weights(self + 1), sums(a.E);
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t j = 0; j <= self; ++j) {
        float score = 0;
        for (int64_t e = 0; e < a.E; ++e) score += load(q, a.dtype, e) * load(k, a.dtype, j * a.k_strides.token + e);
        score *= scale;
        if (a.bias) score += load(a.bias, a.dtype, rows.batch * a.bias_batch + row.head * a.S + j);
        const bool visible = j == self || !a.keep || a.keep[rows.batch * a.S + j];
        weights[j] = visible ? score : -std::numeric_limits<float>::infinity();
        largest = std::max(largest, weights[j]);
    }
    for (int64_t j = 0; j <= self; ++j) {
        const float weight = std::exp(weights[j] - largest);
        sum += weight;
        for (int64_t e = 0; e < a.E; ++e) sums[e] += weight * load(v, a.dtype, j * a.v_strides.token + e);
    }
    if (a.statistics) {
        float* out = a.statistics + ((rows.batch * a.H + row.head) * a.T + row.token) * 2;
        out[0] = largest / scale;
        out[1] = sum;
    }
    for (int64_t e = 0; e < a.E; ++e) store(a.y, a.dtype, row.y + e, sums[e] / sum);
}

}  // namespace

void attention_ref(const Attention& a, const AttentionRows& rows) {
    for (int64_t m = rows.first; m < rows.first + rows.count; ++m) attend_row(a, rows, m);
}

}  // namespace minillm
