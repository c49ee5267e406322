// The native side of lowbit's kernels, compiled without torch: what this processor offers.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace {

// Names of the vector and matrix instruction sets that decide which kernel is fast here.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
    if (__builtin_cpu_supports("avx512vnni")) names.emplace_back("avx512vnni");
    if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512bf16");
#endif
    return names;
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets of this processor that matter for low-precision kernels, by their usual names.");
}
