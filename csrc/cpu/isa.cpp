#include "isa.h"

namespace minillm {

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx2:
            return "avx2";
        case Isa::avx512vnni:
            return "avx512vnni";
        case Isa::avx512bf16:
            return "avx512bf16";
        default:
            return "ref";
    }
}

bool supported(Isa isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
    switch (isa) {
        case Isa::avx2:
            return avx2;
        case Isa::avx512vnni:
            return avx512vnni;
        case Isa::avx512bf16:
            return avx512vnni && __builtin_cpu_supports("avx512bf16");
        default:
            return true;
    }
#else
    return isa == Isa::ref;
#endif
}

Isa best() {
    for (int isa = isa_count - 1; isa > 0; --isa)
        if (supported(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
    return Isa::ref;
}

}  // namespace minillm
