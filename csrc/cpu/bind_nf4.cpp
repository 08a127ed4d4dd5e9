// The NF4 kernels for Python, on raw addresses; minillm/ops/nf4.py checks and calls.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "nf4.h"

namespace py = pybind11;
using namespace minillm;

namespace {

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// packed, (absmax, absmax8, absmax2, map, offset; 0 where there is none), kind, N, K, block
using Weight =
    std::tuple<Address, std::tuple<Address, Address, Address, Address, Address>, int, int64_t, int64_t, int64_t>;

Nf4Weight weight_of(const Weight& weight) {
    const auto& [packed, scales, kind, N, K, block] = weight;
    const auto& [absmax, absmax8, absmax2, map, offset] = scales;
    return {at<const uint8_t>(packed),
            {at<const float>(absmax), at<const uint8_t>(absmax8), at<const float>(absmax2), at<const float>(map),
             at<const float>(offset)},
            static_cast<Nf4Kind>(kind),
            N,
            K,
            block};
}

}  // namespace

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
        [](const Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, Address out, int dtype,
           int isa, int threads) {
            nf4_dequantise(weight_of(weight), {row, rows, column, columns}, at<void>(out), static_cast<Dtype>(dtype),
                           static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "nf4_linear",
        [](Address x, int dtype, int64_t M, const Weight& weight, Address bias, Address y, int isa, int threads) {
            nf4_linear(at<const void>(x), static_cast<Dtype>(dtype), M, weight_of(weight), at<const void>(bias),
                       at<void>(y), static_cast<Isa>(isa), threads);
        },
        NoGil());
}
