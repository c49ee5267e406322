// Products of codes for AVX-512 VNNI.

#include "all_products.h"
#include "avx512_kernels.h"
#include "block_kernels.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct Vnni : Avx512Unit {
    using Accumulator = int32_t;
    using Vector = __m512i;
    static void add(Vector& sum, Groups lhs, Groups rhs) { sum = _mm512_dpbusd_epi32(sum, lhs, rhs); }
    static void load(Vector& sum, const int32_t* c) { sum = _mm512_loadu_si512(c); }
    static void save(int32_t* c, Vector sum) { _mm512_storeu_si512(c, sum); }

    static constexpr uint32_t kBias = 0x80808080;
    using Floats = __m512;
    static Floats scaled(Vector sum, float scale) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
    }
    static Floats add_scaled(Floats total, Floats x, const float* scales) {
        return _mm512_fmadd_ps(x, _mm512_loadu_ps(scales), total);
    }
    static void save(float* c, Floats total) { _mm512_storeu_ps(c, total); }
};

}  // namespace

constexpr Products avx512vnni_products =
    Products()
        .with_codes(multiply<Avx512Kernels<Vnni>, U8S8>)
        .with_blocks(multiply_blocks<Avx512Kernels<Vnni>, U8S8, BlockKernel<Vnni, 2>>);

}  // namespace lowbit
