// adamw8.h for Python.

#include <array>

#include "adamw8.h"
#include "bindings.h"

using namespace minillm;

namespace {

// codes, absmax, what codes mean, those of the 65536 steps
using MomentAddresses = std::tuple<Address, Address, Address, Address>;

Adamw8Moment moment_of(const MomentAddresses& moment) {
    const auto& [codes, absmax, map, code_of_step] = moment;
    return {at<uint8_t>(codes), at<float>(absmax), {at<const float>(map), at<const uint8_t>(code_of_step)}};
}

}  // namespace

void bind_adamw8(py::module_& m) {
    m.def(
        "adamw8_step",
        [](Address p, Address g, int dtype, int64_t count, const std::tuple<MomentAddresses, MomentAddresses>& moments,
           const std::array<float, 8>& r, int isa, int threads) {
            const Adamw8 step = {at(p),
                                 at(g),
                                 static_cast<Dtype>(dtype),
                                 count,
                                 moment_of(std::get<0>(moments)),
                                 moment_of(std::get<1>(moments))};
            adamw8(step, {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]}, static_cast<Isa>(isa), threads);
        },
        NoGil());
}
