// The choice among instruction sets: a row each, in a file each.
//
// To add one, for example SVE:
//   1. machine.h and machine.cpp: its name, and how the processor is asked for it;
//   2. sve.cpp, compiled with its flags by a line of CMakeLists.txt: `sve_passes`, made by all_passes.h, and
//      `sve_products`, made by all_products.h of a struct of micro-kernels and vector operations;
//   3. dispatch.h: both names; and a row here in each table.
// AMX is such a file beside AVX-512's. Passes and products of codes give the same bits on every instruction set;
// `tests/kernels/test_native.py` compares all that a machine can run.

#include "dispatch.h"

#include "machine.h"

namespace lowbit {
namespace {

// Taken where the machine has what it needs; null needs nothing.
template <class Table>
struct Row {
    bool Machine::* needs;
    const Table* table;

    bool runs() const { return !needs || machine().*needs; }
};

// Best first.
constexpr Row<Passes> kPasses[] = {
#ifdef LOWBIT_X86
    {&Machine::avx512, &avx512_passes},
    {&Machine::avx2, &avx2_passes},
#endif
    {nullptr, &plain_passes},
};

constexpr Products kNone{};
constexpr Row<Products> kProducts[] = {
#ifdef LOWBIT_X86
    {&Machine::amx, &amx_products},
    {&Machine::bf16, &avx512bf16_products},
    {&Machine::vnni, &avx512vnni_products},
    {&Machine::avxvnni, &avxvnni_products},
    {&Machine::avx2, &avx2_products},
#endif
#ifdef LOWBIT_ARM
    {&Machine::i8mm, &i8mm_products},
    {&Machine::dotprod, &dotprod_products},
#endif
    {nullptr, &kNone},
};

const Passes* choose_passes() {
    for (const auto& row : kPasses)
        if (row.runs()) return row.table;
    return &plain_passes;
}

Products choose_products() {
    Products chosen{};
    for (const auto& row : kProducts) {
        if (!row.runs()) continue;
        if (!chosen.codes) chosen.codes = row.table->codes;
        if (!chosen.bf16) chosen.bf16 = row.table->bf16;
        if (!chosen.blocks) chosen.blocks = row.table->blocks;
        if (!chosen.attend) chosen = chosen.with_attention(row.table->attend, row.table->differentiate);
    }
    return chosen;
}

}  // namespace

const Passes& passes() {
    static const Passes* const chosen = choose_passes();
    return *chosen;
}

const Products& products() {
    static const Products chosen = choose_products();
    return chosen;
}

}  // namespace lowbit
