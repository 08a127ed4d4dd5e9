// A block's weights as an object that Python keeps, and a step through it; minillm/ops/step.py checks and calls.

#include "bindings.h"
#include "block_step.h"

using namespace minillm;

namespace {

// (weight), (weight, scale, threshold) or what nf4_weight takes; bias or 0; N; K
AnyLinear linear_of(const py::tuple& linear) {
    const auto matrix = linear[0].cast<py::tuple>();
    AnyLinear made{FloatMatrix{}, at<const void>(linear[1].cast<Address>()), linear[2].cast<int64_t>(),
                   linear[3].cast<int64_t>()};
    if (matrix.size() == 1)
        made.matrix = FloatMatrix{at<const void>(matrix[0].cast<Address>())};
    else if (matrix.size() == 3)
        made.matrix = Int8Matrix{at<const int8_t>(matrix[0].cast<Address>()),
                                 at<const float>(matrix[1].cast<Address>()), matrix[2].cast<float>()};
    else
        made.matrix = nf4_weight(matrix.cast<Nf4Addresses>());
    return made;
}

BlockWeights weights_of(int dtype, float eps, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes,
                        Address attention_norm, Address mlp_norm, const std::vector<py::tuple>& linears) {
    const auto [D, H, G, E] = sizes;
    return {static_cast<Dtype>(dtype),
            eps,
            D,
            H,
            G,
            E,
            at(attention_norm),
            at(mlp_norm),
            linear_of(linears.at(0)),
            linear_of(linears.at(1)),
            linear_of(linears.at(2)),
            linear_of(linears.at(3)),
            linear_of(linears.at(4)),
            linear_of(linears.at(5)),
            linear_of(linears.at(6))};
}

}  // namespace

void bind_step(py::module_& m) {
    py::class_<BlockWeights>(m, "BlockWeights")
        .def(py::init(&weights_of))
        .def(
            "step",
            [](const BlockWeights& weights, Address x, Address y, int64_t B, Address cos, Address sin, int64_t tables,
               int64_t d, Address keys, Address values, int64_t past, int64_t capacity, Address keep, int isa,
               int threads) {
                const BlockStep step = {at(x), at(y),    B,          at(cos), at(sin),  tables,
                                        d,     at(keys), at(values), past,    capacity, at<const uint8_t>(keep)};
                block_step(weights, step, static_cast<Isa>(isa), threads);
            },
            NoGil());
}
