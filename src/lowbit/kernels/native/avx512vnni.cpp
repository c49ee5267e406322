// Products of codes for AVX-512 VNNI.

#include "all_products.h"
#include "avx512_kernels.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct Vnni {
    using Accumulator = int32_t;
    using Vector = __m512i;
    static void add(Vector& sum, __m512i lhs, __m512i rhs) { sum = _mm512_dpbusd_epi32(sum, lhs, rhs); }
    static void load(Vector& sum, const int32_t* c) { sum = _mm512_loadu_si512(c); }
    static void save(int32_t* c, Vector sum) { _mm512_storeu_si512(c, sum); }
};

}  // namespace

constexpr Products avx512vnni_products = Products().with_codes(multiply<Avx512Kernels<Vnni>, U8S8>);

}  // namespace lowbit
