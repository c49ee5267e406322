// What the processor of this process offers.

#include "machine.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace lowbit {

namespace {

#ifdef LOWBIT_X86
// Instruction sets, as bits.
constexpr int kAvx2 = 1, kAvxVnni = 2, kAvx512 = 4, kVnni = 8, kBf16 = 16, kAmx = 32, kAll = 63;

// Those that ONEDNN_MAX_CPU_ISA leaves to torch's kernels.
int allowed() {
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (!limit || !*limit) return kAll;
    constexpr int wide = kAvx2 | kAvx512;
    const struct {
        const char* name;
        int sets;
    } limits[] = {{"SSE41", 0},
                  {"AVX", 0},
                  {"AVX2", kAvx2},
                  {"AVX2_VNNI", kAvx2 | kAvxVnni},
                  {"AVX2_VNNI_2", kAvx2 | kAvxVnni},
                  {"AVX512_CORE", wide},
                  {"AVX512_CORE_VNNI", wide | kVnni},
                  {"AVX512_CORE_BF16", wide | kVnni | kBf16},
                  {"AVX512_CORE_FP16", kAll & ~kAmx}};
    for (const auto& entry : limits)
        if (!strcasecmp(limit, entry.name)) return entry.sets;
    return kAll;
}

// The registers of an instruction of cpuid.
struct Cpuid {
    unsigned eax, ebx = 0, ecx, edx = 0;
    Cpuid(unsigned leaf, unsigned part) : eax(leaf), ecx(part) {
        __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    }
};

// The system gives a process the tile registers only when it asks.
bool ask_for_tiles() {
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

Machine detect() {
    Machine m{};
#ifdef LOWBIT_X86
    const int sets = allowed();
    const auto may = [sets](int set) { return (sets & set) != 0; };
    __builtin_cpu_init();
    m.avx2 = may(kAvx2) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    m.avx512 = m.avx2 && may(kAvx512) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    m.vnni = m.avx512 && may(kVnni) && __builtin_cpu_supports("avx512vnni");
    m.bf16 = m.vnni && may(kBf16) && __builtin_cpu_supports("avx512bf16");
    const Cpuid features(7, 0), more(7, 1);
    m.avxvnni = m.avx2 && may(kAvxVnni) && features.eax >= 1 && (more.eax >> 4 & 1);
    const unsigned bits = features.edx;
    const bool tiles = (bits >> 24 & 1) && (bits >> 25 & 1) && (bits >> 22 & 1);  // amx-tile, amx-int8, amx-bf16
    m.amx = m.bf16 && may(kAmx) && tiles && ask_for_tiles();
#endif
    return m;
}

}  // namespace

const Machine& machine() {
    static const Machine m = detect();
    return m;
}

std::vector<std::string> instruction_sets() {
    const Machine& m = machine();
    std::vector<std::string> names;
    if (m.avx2) names.emplace_back("avx2");
    if (m.avxvnni) names.emplace_back("avxvnni");
    if (m.avx512) names.emplace_back("avx512");
    if (m.vnni) names.emplace_back("avx512vnni");
    if (m.bf16) names.emplace_back("avx512bf16");
    if (m.amx) names.emplace_back("amx");
    return names;
}

}  // namespace lowbit
