// Work shared among OpenMP threads, and memory that they keep.
//
// torch loads libgomp first and this module finds it loaded: one set of threads, which wait for work in one place. Two
// OpenMP runtimes would spin against each other.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace minillm {

struct Range {
    int64_t begin, end;
};

// The part of `count` items that falls to one thread, in whole multiples of `grain`.
inline Range share(int64_t count, int64_t grain, int thread, int threads) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t begin = grains * thread / threads, end = grains * (thread + 1) / threads;
    return {std::min(begin * grain, count), std::min(end * grain, count)};
}

// work(thread, threads) on each of `threads` threads; one thread runs it here and now.
template <class Work>
void parallel(int threads, const Work& work) {
    if (threads <= 1) {
        work(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
}

// Memory of a thread that grows and is used again: fresh pages cost more than filling them. Aligned to cache lines.
class Scratch {
  public:
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
        if (bytes > size_) {
            memory_.reset(new char[bytes]);
            size_ = bytes;
        }
        const auto address = (reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63};
        return reinterpret_cast<T*>(address);
    }

  private:
    std::unique_ptr<char[]> memory_;
    size_t size_ = 0;
};

}  // namespace minillm
