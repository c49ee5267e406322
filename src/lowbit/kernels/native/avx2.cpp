// The passes for AVX2 and FMA, and products of codes in 16 bits.

#include "all_passes.h"
#include "avx2_kernels.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct Madd : Avx2Unit {
    static constexpr uint32_t kBias = 0;
    static void add(Vector& sum, Groups lhs, Groups rhs) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(lhs, rhs));
        // A sum is one chain: as a tree of additions, which the compiler prefers, it would leave the registers.
        asm("" : "+x"(sum));
    }
};

}  // namespace

constexpr Passes avx2_passes = all_passes<PortableEncoder>();
constexpr Products avx2_products = avx2_family<Madd, S16S16>();

}  // namespace lowbit
