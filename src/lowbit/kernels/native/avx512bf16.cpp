// Products of bfloat16 numbers, and attention, for AVX-512 BF16.

#include "all_products.h"
#include "avx512_attention_backward.h"
#include "avx512_attention_forward.h"
#include "avx512_kernels.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct DotBf16 : Avx512Unit {
    using Accumulator = float;
    using Vector = __m512;
    static void add(Vector& sum, Groups lhs, Groups rhs) { sum = _mm512_dpbf16_ps(sum, (__m512bh)lhs, (__m512bh)rhs); }
    static void load(Vector& sum, const float* c) { sum = _mm512_loadu_ps(c); }
    static void save(float* c, Vector sum) { _mm512_storeu_ps(c, sum); }
};

}  // namespace

constexpr Products avx512bf16_products =
    Products().with_bf16(multiply<Avx512Kernels<DotBf16>, Bf16>).with_attention(attention_forward, attention_backward);

}  // namespace lowbit
