// The choice among instruction sets: a row each, in a file each.
//
// To add one, say NEON:
//   1. its name in `Machine`, and how the processor is asked for it, in machine.cpp;
//   2. neon.cpp, which includes all_passes.h and defines `neon_passes`, compiled with the flags of that instruction set
//      by a line of CMakeLists.txt; an encoder of its own is optional;
//   3. a row here.
// Results are those of `plain` bit for bit: `tests/test_native.py` compares every row that a machine can run.

#include "dispatch.h"

#include "machine.h"

namespace lowbit {
namespace {

// Best first. A row is taken where the machine has what it needs; null needs nothing.
struct PassesRow {
    bool Machine::* needs;
    const Passes* passes;
};
constexpr PassesRow kPasses[] = {
#ifdef LOWBIT_X86
    {&Machine::avx512, &avx512_passes},
    {&Machine::avx2, &avx2_passes},
#endif
    {nullptr, &plain_passes},
};

}  // namespace

const Passes& passes() {
    static const Passes& chosen = [&]() -> const Passes& {
        const PassesRow* row = kPasses;
        while (row->needs && !(machine().*row->needs)) row++;
        return *row->passes;
    }();
    return chosen;
}

}  // namespace lowbit
