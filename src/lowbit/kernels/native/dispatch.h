// What the file of each instruction set brings to the tables of `dispatch.cpp`.
#pragma once

#include "passes.h"

namespace lowbit {

// Constants, so that no code of an instruction set runs before it is chosen.
extern const Passes plain_passes, avx2_passes, avx512_passes;

}  // namespace lowbit
