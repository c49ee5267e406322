// What the processor of this process offers.

#include "machine.h"

#if defined(LOWBIT_X86)
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

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
#elif defined(LOWBIT_ARM) && defined(__APPLE__)
    const auto has = [](const char* feature) {
        int value = 0;
        size_t size = sizeof(value);
        return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value == 1;
    };
    m.dotprod = has("hw.optional.arm.FEAT_DotProd");
    m.i8mm = m.dotprod && has("hw.optional.arm.FEAT_I8MM");
#elif defined(LOWBIT_ARM)
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // of AT_HWCAP and AT_HWCAP2
    m.dotprod = (getauxval(AT_HWCAP) & kDotprod) != 0;
    m.i8mm = m.dotprod && (getauxval(AT_HWCAP2) & kI8mm) != 0;
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
    if (m.dotprod) names.emplace_back("dotprod");
    if (m.i8mm) names.emplace_back("i8mm");
    return names;
}

}  // namespace lowbit
