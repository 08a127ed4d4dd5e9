// The attention kernel for Python, on raw addresses; minillm/ops/attention.py checks and calls.

#include "attention.h"
#include "attention_backward.h"
#include "bindings.h"

using namespace minillm;

namespace {

// address, strides of batch, head and token in numbers
using Heads = std::tuple<Address, int64_t, int64_t, int64_t>;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

const void* numbers(const Heads& x) { return at(std::get<0>(x)); }

HeadStrides strides_of(const Heads& x) { return {std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

void attend(const Heads& q, const Heads& k, const Heads& v, Address y, int dtype, const Sizes& sizes, Address keep,
            Address bias, int64_t bias_batch, Address statistics, int isa, int threads) {
    Attention a{};
    a.q = numbers(q);
    a.k = numbers(k);
    a.v = numbers(v);
    a.y = at(y);
    a.dtype = static_cast<Dtype>(dtype);
    std::tie(a.B, a.H, a.G, a.T, a.S, a.E) = sizes;
    a.q_strides = strides_of(q);
    a.k_strides = strides_of(k);
    a.v_strides = strides_of(v);
    a.keep = at<const uint8_t>(keep);
    a.bias = at(bias);
    a.bias_batch = bias_batch;
    a.statistics = at<float>(statistics);
    attention(a, static_cast<Isa>(isa), threads);
}

void backward(const std::vector<Heads>& inputs, Address statistics,
              const std::tuple<Address, Address, Address>& outputs, int dtype,
              const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, int isa, int threads) {
    AttentionBackward a{};
    const void** const numbers_of[] = {&a.q, &a.k, &a.v, &a.y, &a.dy};
    HeadStrides* const strides[] = {&a.q_strides, &a.k_strides, &a.v_strides, &a.y_strides, &a.dy_strides};
    for (size_t i = 0; i < inputs.size(); ++i) {
        *numbers_of[i] = numbers(inputs[i]);
        *strides[i] = strides_of(inputs[i]);
    }
    a.statistics = at<float>(statistics);
    a.dq = at(std::get<0>(outputs));
    a.dk = at(std::get<1>(outputs));
    a.dv = at(std::get<2>(outputs));
    a.dtype = static_cast<Dtype>(dtype);
    std::tie(a.B, a.H, a.G, a.T, a.E) = sizes;
    attention_backward(a, static_cast<Isa>(isa), threads);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention", &attend, NoGil());
    m.def("attention_backward", &backward, NoGil());
}
