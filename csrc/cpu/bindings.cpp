// minillm._cpu: the kernels, on raw addresses. Nothing is checked here: minillm/ops/native.py does, and is the only
// caller.

#include "bindings.h"

#include <string>
#include <vector>

#include "int8_linear.h"
#include "isa.h"

using namespace minillm;

namespace {

Int8Input input_of(Address x, int dtype, int64_t M, int64_t K, float threshold) {
    return {at<const void>(x), static_cast<Dtype>(dtype), M, K, threshold};
}

// (weight, scale, bias or 0, y, N) of each linear
using Part = std::tuple<Address, Address, Address, Address, int64_t>;

void linear(Address x, int dtype, int64_t M, int64_t K, float threshold, const std::vector<Part>& parts, int isa,
            int threads) {
    std::vector<Int8Weight> weights;
    for (const auto& [w, scale, bias, y, N] : parts)
        weights.push_back({at<const int8_t>(w), at<const float>(scale), at<const void>(bias), at<void>(y), N});
    int8_linear(input_of(x, dtype, M, K, threshold), weights.data(), static_cast<int>(weights.size()),
                static_cast<Isa>(isa), threads);
}

}  // namespace

void bind_adamw8(py::module_& m);     // bind_adamw8.cpp
void bind_attention(py::module_& m);  // bind_attention.cpp
void bind_block(py::module_& m);      // bind_block.cpp
void bind_matmul(py::module_& m);     // bind_matmul.cpp
void bind_nf4(py::module_& m);        // bind_nf4.cpp
void bind_step(py::module_& m);       // bind_step.cpp

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "minillm's CPU kernels; use them through minillm.ops";
    m.def("isas", [] {
        std::vector<std::pair<std::string, bool>> all;
        for (int isa = 0; isa < isa_count; ++isa)
            all.emplace_back(name(static_cast<Isa>(isa)), supported(static_cast<Isa>(isa)));
        return all;
    });
    m.def("best_isa", [] { return static_cast<int>(best()); });
    bind_block(m);
    bind_matmul(m);

    m.def("int8_linear", &linear, NoGil());
    m.def(
        "int8_product",
        [](Address x, Address w, Address y, int64_t M, int64_t N, int64_t K, int isa, int threads) {
            int8_product(at<const int8_t>(x), at<const int8_t>(w), at<int32_t>(y), M, N, K, static_cast<Isa>(isa),
                         threads);
        },
        NoGil());
    m.def(
        "int8_quantise",
        [](Address x, int dtype, int64_t M, int64_t K, float threshold, Address q, Address scale, Address is_outlier,
           int isa, int threads) {
            int8_quantise(input_of(x, dtype, M, K, threshold), at<int8_t>(q), at<float>(scale), at<uint8_t>(is_outlier),
                          static_cast<Isa>(isa), threads);
        },
        NoGil());
    m.def(
        "int8_dequantise",
        [](Address w, Address scale, Address out, int dtype, int64_t N, int64_t K, int isa, int threads) {
            int8_dequantise(at<const int8_t>(w), at<const float>(scale), at<void>(out), static_cast<Dtype>(dtype), N, K,
                            static_cast<Isa>(isa), threads);
        },
        NoGil());

    bind_adamw8(m);
    bind_attention(m);
    bind_nf4(m);
    bind_step(m);
}
