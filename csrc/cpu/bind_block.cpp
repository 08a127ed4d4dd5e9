// block_ops.h and float_linear.h for Python.

#include "bindings.h"
#include "block_ops.h"
#include "float_linear.h"

using namespace minillm;

void bind_block(py::module_& m) {
    m.def(
        "rms_norm",
        [](Address x, Address weight, Address y, int dtype, int64_t M, int64_t D, float eps, int isa, int threads) {
            rms_norm(at(x), at(weight), at(y), static_cast<Dtype>(dtype), M, D, eps, static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "rotate",
        [](Address x, Address cos, Address sin, Address y, int dtype, int64_t rows, int64_t heads, int64_t E, int64_t d,
           int64_t tables, int64_t row_stride, int64_t head_stride, int isa, int threads) {
            const Rotation rotation = {at(x),      at(cos),    at(sin), at(y), static_cast<Dtype>(dtype),
                                       rows,       heads,      E,       d,     tables,
                                       row_stride, head_stride};
            rotate(rotation, static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "swiglu",
        [](Address gate, Address up, Address y, int dtype, int64_t count, int isa, int threads) {
            swiglu(at(gate), at(up), at(y), static_cast<Dtype>(dtype), count, static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "float_linear",
        [](Address x, Address w, Address bias, Address y, int dtype, int64_t M, int64_t N, int64_t K, int isa,
           int threads) {
            const FloatLinear linear = {at(x), at(w), at(bias), at(y), static_cast<Dtype>(dtype), M, N, K};
            float_linear(linear, static_cast<Isa>(isa), threads);
        },
        NoGil());
}
