// What the processor of this process offers.
#pragma once

#include <string>
#include <vector>

namespace lowbit {

// Instruction sets that may be used: those of the processor, on x86-64 lowered by ONEDNN_MAX_CPU_ISA as torch's
// own kernels are.
struct Machine {
    bool avx2, avxvnni, avx512, vnni, bf16, amx;  // x86-64
    bool dotprod, i8mm;                           // AArch64
};

// Detected at the first call.
const Machine& machine();

// Their usual names, lowest first.
std::vector<std::string> instruction_sets();

}  // namespace lowbit
