// The passes for AVX2 and FMA.

#include "all_passes.h"
#include "dispatch.h"

namespace lowbit {

constexpr Passes avx2_passes = all_passes<PortableEncoder>();

}  // namespace lowbit
