// The definition of every int8 kernel: what the other variants must equal, integers exactly.

#include <cmath>
#include <limits>

#include "int8_linear.h"

namespace minillm {
namespace {

float absmax(const void* x, Dtype dtype, int64_t K, float threshold, uint8_t* is_outlier) {
    float largest = 0;
    bool has_nan = false;
    for (int64_t k = 0; k < K; ++k) {
        const float size = std::fabs(load(x, dtype, k));
        has_nan |= std::isnan(size);
        if (size >= threshold)
            is_outlier[k] = 1;
        else if (size > largest)
            largest = size;
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}

void quantise(const void* x, Dtype dtype, int64_t K, float scale, int8_t* q) {
    const float inverse = scale > 0 ? 1.0f / scale * 127.0f : 0.0f;
    for (int64_t k = 0; k < K; ++k) {
        const float rounded = std::nearbyint(load(x, dtype, k) * inverse);                     // ties to even
        q[k] = !(rounded < 127) ? 127 : rounded > -127 ? static_cast<int8_t>(rounded) : -127;  // NaN: 127
    }
}

void dequantise(const int8_t* w, float scale, int64_t K, void* out, Dtype dtype) {
    for (int64_t k = 0; k < K; ++k) store(out, dtype, k, w[k] * (scale * (1.0f / 127)));
}

void dot(const int8_t* q, int64_t stride, int64_t M, const int8_t* w, int64_t n, int64_t K, int32_t* sums) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t j = 0; j < n; ++j) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += q[m * stride + k] * w[j * K + k];
            sums[m * max_panel + j] = sum;
        }
}

void finish(const Int8Block& b) {
    for (int64_t m = 0; m < b.M; ++m)
        for (int64_t j = 0; j < b.n; ++j) {
            const float integers = b.sums[m * max_panel + j] * (b.scale_x[m] * (b.scale_w[j] * (1.0f / (127 * 127))));
            float outliers = 0;
            for (int64_t c = 0; c < b.outliers; ++c)
                outliers += b.values[m * b.outliers + c] * b.columns[c * max_panel + j];
            const float bias = b.bias ? load(b.bias, b.dtype, j) : 0.0f;
            store(b.y, b.dtype, m * b.N + j, integers + outliers * (b.scale_w[j] * (1.0f / 127)) + bias);
        }
}

}  // namespace

const Int8Kernels& int8_ref() {
    static const Int8Kernels kernels = {absmax, quantise, dequantise, dot, finish, nullptr, nullptr, 0};
    return kernels;
}

}  // namespace minillm
