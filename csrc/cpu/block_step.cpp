#include "block_step.h"

#include <cstring>
#include <initializer_list>
#include <vector>

#include "attention.h"
#include "block_ops.h"
#include "float_linear.h"
#include "parallel.h"

namespace minillm {
namespace {

struct Memory {
    Scratch normed, q, k, v, turned, attended, gate, up, branch, sum;
};

thread_local Memory memory;

// The numbers and kernels of one step, so that what follows reads as the model does.
struct Step {
    const BlockWeights& w;
    const BlockStep& in;
    Isa isa;
    int threads;

    void* room(Scratch& scratch, int64_t width) const { return scratch.get<char>(in.B * width * size_of(w.dtype)); }

    void norm(const void* x, const void* weight, void* y) const {
        rms_norm(x, weight, y, w.dtype, in.B, w.D, w.eps, isa, threads);
    }

    void linear(const AnyLinear& l, const void* x, void* y) const {
        if (const auto* nf4 = std::get_if<Nf4Weight>(&l.matrix))
            nf4_linear(x, w.dtype, in.B, *nf4, l.bias, y, isa, threads);
        else if (const auto* floats = std::get_if<FloatMatrix>(&l.matrix))
            float_linear({x, floats->w, l.bias, y, w.dtype, in.B, l.N, l.K}, isa, threads);
        else
            linears(x, {{&l, y}});
    }

    struct Output {
        const AnyLinear* linear;
        void* y;
    };

    // Several linears of one x; int8 ones of one threshold quantise it once.
    void linears(const void* x, std::initializer_list<Output> outputs) const {
        const auto* first = std::get_if<Int8Matrix>(&outputs.begin()->linear->matrix);
        std::vector<Int8Weight> together;
        for (const auto& [l, y] : outputs) {
            const auto* int8 = std::get_if<Int8Matrix>(&l->matrix);
            if (first && int8 && int8->threshold == first->threshold)
                together.push_back({int8->w, int8->scale, l->bias, y, l->N});
            else if (int8)
                linears(x, {{l, y}});
            else
                linear(*l, x, y);
        }
        if (!together.empty())
            int8_linear({x, w.dtype, in.B, outputs.begin()->linear->K, first->threshold}, together.data(),
                        static_cast<int>(together.size()), isa, threads);
    }

    void* turned(const void* x, int64_t heads) const {
        void* y = room(memory.turned, heads * w.E);
        rotate({x, in.cos, in.sin, y, w.dtype, in.B, heads, w.E, in.d, in.tables, heads * w.E, w.E}, isa, threads);
        return y;
    }

    // x (B, G, E) to its slot of a cache (B, G, capacity, E)
    void remember(const void* x, void* cache) const {
        const int64_t bytes = w.E * size_of(w.dtype);
        for (int64_t row = 0; row < in.B * w.G; ++row)
            std::memcpy(static_cast<char*>(cache) + (row * in.capacity + in.past) * bytes,
                        static_cast<const char*>(x) + row * bytes, bytes);
    }

    void attend(const void* q, void* y) const {
        const HeadStrides query = {w.H * w.E, w.E, w.H * w.E};
        const HeadStrides cached = {w.G * in.capacity * w.E, in.capacity * w.E, w.E};
        const Attention a = {q,           in.keys, in.values, y,      w.dtype, in.B,    w.H,     w.G, 1,
                             in.past + 1, w.E,     query,     cached, cached,  in.keep, nullptr, 0,   nullptr};
        attention(a, isa, threads);
    }
};

}  // namespace

void block_step(const BlockWeights& w, const BlockStep& in, Isa isa, int threads) {
    const Step step{w, in, isa, threads};
    void* normed = step.room(memory.normed, w.D);
    void* q = step.room(memory.q, w.H * w.E);
    void* k = step.room(memory.k, w.G * w.E);
    void* v = step.room(memory.v, w.G * w.E);
    step.norm(in.x, w.attention_norm, normed);
    step.linears(normed, {{&w.q, q}, {&w.k, k}, {&w.v, v}});
    step.remember(step.turned(k, w.G), in.keys);
    step.remember(v, in.values);
    void* attended = step.room(memory.attended, w.H * w.E);
    step.attend(step.turned(q, w.H), attended);
    void* branch = step.room(memory.branch, w.D);
    step.linear(w.o, attended, branch);

    void* sum = step.room(memory.sum, w.D);
    add(in.x, branch, sum, w.dtype, in.B * w.D, isa);
    step.norm(sum, w.mlp_norm, normed);
    void* gate = step.room(memory.gate, w.gate.N);
    void* up = step.room(memory.up, w.up.N);
    step.linears(normed, {{&w.gate, gate}, {&w.up, up}});
    swiglu(gate, up, gate, w.dtype, in.B * w.gate.N, isa, threads);
    step.linear(w.down, gate, branch);
    add(sum, branch, in.y, w.dtype, in.B * w.D, isa);
}

}  // namespace minillm
