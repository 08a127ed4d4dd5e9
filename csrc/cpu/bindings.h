// What the binding files share: tensors arrive as addresses, already checked by minillm/ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "nf4.h"

namespace minillm {

namespace py = pybind11;
using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// packed, (absmax, absmax8, absmax2, map, offset; 0 where there is none), kind, N, K, block
using Nf4Addresses =
    std::tuple<Address, std::tuple<Address, Address, Address, Address, Address>, int, int64_t, int64_t, int64_t>;

inline Nf4Weight nf4_weight(const Nf4Addresses& weight) {
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

}  // namespace minillm
