// Which instruction sets this processor has, and which variant of a kernel runs.
//
// Every kernel exists once for each Isa that serves it: `ref` is plain C++ and always right, the others are in files of
// their own whose functions carry a `target` attribute. No file is compiled with -m flags: the module loads on any
// x86-64 (or any other) processor and chooses at run time. Tests name a variant; everybody else takes `best()`.
#pragma once

namespace minillm {

enum class Isa : int {
    ref = 0,         // C++17, any processor
    avx2 = 1,        // AVX2, FMA, F16C
    avx512vnni = 2,  // AVX-512 F, BW, VL, DQ, VNNI
    avx512bf16 = 3,  // those and AVX512-BF16
};

constexpr int isa_count = 4;
const char* name(Isa isa);
bool supported(Isa isa);
Isa best();  // the last one that is supported

}  // namespace minillm
