// The matrix product for Python, on raw addresses; minillm/ops/matmul.py checks and calls.

#include "bindings.h"
#include "matmul.h"

using namespace minillm;

namespace {

// address, numbers from a row to the next, and from a column to the next
using Factor = std::tuple<Address, int64_t, int64_t>;

Matrix matrix(const Factor& x) { return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

void product(const Factor& a, const Factor& b, const std::tuple<Address, int64_t>& c,
             const std::tuple<int64_t, int64_t, int64_t>& sizes, bool add, int isa, int threads) {
    Matmul x{};
    x.a = matrix(a);
    x.b = matrix(b);
    x.c = at<float>(std::get<0>(c));
    x.c_row = std::get<1>(c);
    std::tie(x.M, x.N, x.K) = sizes;
    x.add = add;
    matmul(x, static_cast<Isa>(isa), threads);
}

}  // namespace

void bind_matmul(py::module_& m) {
    m.def("matmul", &product, NoGil());
#if defined(__x86_64__)
    m.def("is_intel", [] { return __builtin_cpu_is("intel") != 0; });
#else
    m.def("is_intel", [] { return false; });
#endif
}
