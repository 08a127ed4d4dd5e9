// The NF4 kernels for Python, on raw addresses; minillm/ops/nf4.py checks and calls.

#include "bindings.h"

using namespace minillm;

void bind_nf4(py::module_& m) {
    m.def(
        "nf4_quantise",
        [](Address x, int dtype, int64_t count, int64_t block, int kind, Address packed, Address absmax, int isa,
           int threads) {
            nf4_quantise(at<const void>(x), static_cast<Dtype>(dtype), count, block, static_cast<Nf4Kind>(kind),
                         at<uint8_t>(packed), at<float>(absmax), static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "nf4_dequantise",
        [](const Nf4Addresses& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, Address out,
           int dtype, int isa, int threads) {
            nf4_dequantise(nf4_weight(weight), {row, rows, column, columns}, at<void>(out), static_cast<Dtype>(dtype),
                           static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "nf4_linear",
        [](Address x, int dtype, int64_t M, const Nf4Addresses& weight, Address bias, Address y, int isa, int threads) {
            nf4_linear(at<const void>(x), static_cast<Dtype>(dtype), M, nf4_weight(weight), at<const void>(bias),
                       at<void>(y), static_cast<Isa>(isa), threads);
        },
        NoGil());
}
