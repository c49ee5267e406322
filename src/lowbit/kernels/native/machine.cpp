// What the processor of this process offers.

#include "machine.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace lowbit {

namespace {

// How far ONEDNN_MAX_CPU_ISA lets torch's kernels go: 0 nothing beyond SSE, 1 AVX2, 2 AVX-512, 3 VNNI, 4 bf16, 5 all.
int allowed() {
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (!limit || !*limit) return 5;
    const struct {
        const char* name;
        int level;
    } levels[] = {{"SSE41", 0},
                  {"AVX", 0},
                  {"AVX2", 1},
                  {"AVX2_VNNI", 1},
                  {"AVX2_VNNI_2", 1},
                  {"AVX512_CORE", 2},
                  {"AVX512_CORE_VNNI", 3},
                  {"AVX512_CORE_BF16", 4},
                  {"AVX512_CORE_FP16", 4}};
    for (const auto& entry : levels)
        if (!strcasecmp(limit, entry.name)) return entry.level;
    return 5;
}

#ifdef LOWBIT_X86
// The system gives a process the tile registers only when it asks.
bool ask_for_tiles() {
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

Machine detect() {
    Machine m{};
#ifdef LOWBIT_X86
    const int level = allowed();
    __builtin_cpu_init();
    m.avx2 = level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    m.avx512 = m.avx2 && level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    m.vnni = m.avx512 && level >= 3 && __builtin_cpu_supports("avx512vnni");
    m.bf16 = m.vnni && level >= 4 && __builtin_cpu_supports("avx512bf16");
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool tiles = (edx >> 24 & 1) && (edx >> 25 & 1) && (edx >> 22 & 1);  // amx-tile, amx-int8, amx-bf16
    m.amx = m.bf16 && level >= 5 && tiles && ask_for_tiles();
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
    if (m.avx512) names.emplace_back("avx512");
    if (m.vnni) names.emplace_back("avx512vnni");
    if (m.bf16) names.emplace_back("avx512bf16");
    if (m.amx) names.emplace_back("amx");
    return names;
}

}  // namespace lowbit
