// The passes for any processor.

#include "all_passes.h"
#include "dispatch.h"

namespace lowbit {

constexpr Passes plain_passes = all_passes<PortableEncoder>();

}  // namespace lowbit
