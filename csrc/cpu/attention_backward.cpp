// The definition of attention's gradients, one row at a time; and who does what: the heads of each (batch row, group)
// are cut into tasks, which threads take as they get free. Each task sums dk and dv over its own heads; the sums of a
// group's tasks are then added in one order, so that the number of threads changes nothing.

#include "attention_backward.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace minillm {
namespace {

int64_t start_of(const HeadStrides& strides, int64_t batch, int64_t head) {
    return batch * strides.batch + head * strides.head;
}

void backward_row(const AttentionBackward& a, const BackwardTask& task, int64_t head, int64_t i) {
    const auto at = [&](const void* x, const HeadStrides& strides, int64_t of, int64_t token, int64_t e) {
        return load(x, a.dtype, start_of(strides, task.batch, of) + token * strides.token + e);
    };
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.E));
    const float* statistics = a.statistics + ((task.batch * a.H + head) * a.T + i) * 2;
    std::vector<float> dq(a.E);
    float D = 0;
    for (int64_t e = 0; e < a.E; ++e) D += at(a.dy, a.dy_strides, head, i, e) * at(a.y, a.y_strides, head, i, e);
    for (int64_t j = 0; j <= i; ++j) {
        float score = 0, dp = 0;
        for (int64_t e = 0; e < a.E; ++e) {
            score += at(a.q, a.q_strides, head, i, e) * at(a.k, a.k_strides, task.group, j, e);
            dp += at(a.dy, a.dy_strides, head, i, e) * at(a.v, a.v_strides, task.group, j, e);
        }
        const float p = std::exp((score - statistics[0]) * scale) / statistics[1], ds = p * (dp - D);
        for (int64_t e = 0; e < a.E; ++e) {
            dq[e] += ds * at(a.k, a.k_strides, task.group, j, e);
            task.dk[j * a.E + e] += ds * at(a.q, a.q_strides, head, i, e);
            task.dv[j * a.E + e] += p * at(a.dy, a.dy_strides, head, i, e);
        }
    }
    for (int64_t e = 0; e < a.E; ++e)
        store(a.dq, a.dtype, ((task.batch * a.T + i) * a.H + head) * a.E + e, dq[e] * scale);
}

BackwardKernel kernel_of(Isa isa, Dtype dtype) {
#if defined(__x86_64__)
    if (isa == Isa::avx512bf16 && dtype == Dtype::bf16) return attention_backward_avx512bf16;
    if (isa >= Isa::avx512vnni) return attention_backward_avx512;
#endif
    (void)isa, (void)dtype;
    return attention_backward_ref;
}

constexpr int64_t wanted_tasks = 16;  // what many threads share evenly; more take more memory for their sums

// The sums of a group's tasks, rounded.
void add_up(const AttentionBackward& a, const std::vector<BackwardTask>& tasks, int64_t first, int64_t count) {
    const BackwardTask& task = tasks[first];
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.E));
    for (int64_t j = 0; j < a.T; ++j) {
        const int64_t out = ((task.batch * a.T + j) * a.G + task.group) * a.E;
        for (int64_t e = 0; e < a.E; ++e) {
            float dk = 0, dv = 0;
            for (int64_t part = first; part < first + count; ++part) {
                dk += tasks[part].dk[j * a.E + e];
                dv += tasks[part].dv[j * a.E + e];
            }
            store(a.dk, a.dtype, out + e, dk * scale);
            store(a.dv, a.dtype, out + e, dv);
        }
    }
}

}  // namespace

void attention_backward_ref(const AttentionBackward& a, const BackwardTask& task) {
    std::fill_n(task.dk, a.T * a.E, 0.0f);
    std::fill_n(task.dv, a.T * a.E, 0.0f);
    for (int64_t head = task.first_head; head < task.first_head + task.heads; ++head)
        for (int64_t i = 0; i < a.T; ++i) backward_row(a, task, head, i);
}

void attention_backward(const AttentionBackward& a, Isa isa, int threads) {
    const BackwardKernel kernel = kernel_of(isa, a.dtype);
    const int64_t share = a.H / a.G, groups = a.B * a.G;
    const int64_t parts = std::clamp((wanted_tasks + groups - 1) / groups, int64_t{1}, share);
    const std::unique_ptr<float[]> sums(new float[groups * parts * 2 * a.T * a.E]);
    std::vector<BackwardTask> tasks;
    for (int64_t number = 0; number < groups * parts; ++number) {
        const int64_t group = number / parts, part = number % parts, begin = share * part / parts;
        float* dk = sums.get() + number * 2 * a.T * a.E;
        tasks.push_back({group / a.G, group % a.G, group % a.G * share + begin, share * (part + 1) / parts - begin, dk,
                         dk + a.T * a.E});
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < groups * parts; ++number) kernel(a, tasks[number]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; ++group) add_up(a, tasks, group * parts, parts);
    }
}

}  // namespace minillm
