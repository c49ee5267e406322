// Products of codes for AVX-VNNI: the instructions of AVX-512 VNNI on 256 bits, of processors without AVX-512.

#include "avx2_kernels.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct NarrowVnni : Avx2Unit {
    static constexpr uint32_t kBias = 0x80808080;
    static void add(Vector& sum, Groups lhs, Groups rhs) {
#ifdef __AVXVNNI__
        sum = _mm256_dpbusd_avx_epi32(sum, lhs, rhs);
#else  // `make test-avxvnni`: the other encoding of the same instruction
        sum = _mm256_dpbusd_epi32(sum, lhs, rhs);
#endif
    }
};

}  // namespace

constexpr Products avxvnni_products = avx2_family<NarrowVnni, U8S8>();

}  // namespace lowbit
