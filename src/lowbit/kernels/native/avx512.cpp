// The passes for AVX-512 (x86-64-v4), with an encoder of its own.

#include <immintrin.h>

#include "all_passes.h"
#include "dispatch.h"

namespace lowbit {
namespace {

// `uniform` minus 1/2, of 16 elements.
inline __m512 centred_noise(__m512i h, __m512i key1) {
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_xor_si512(_mm512_mullo_epi32(h, _mm512_set1_epi32(0x7FEB352D)), key1);
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x846CA68Bu)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    const __m512 u = _mm512_cvtepi32_ps(_mm512_srli_epi32(h, 8));
    return _mm512_fmsub_ps(u, _mm512_set1_ps(0x1p-24f), _mm512_set1_ps(0.5f));
}

// As `PortableEncoder`, 16 numbers at a time. Stochastic rounding of t with noise u is rounding of t - u + 1/2 to
// nearest, but where that lies half way. So x times 1 / S rounds as x / S does unless it lies next to half way, by less
// than a margin wider than the two can differ (codes are bytes): then the 16 are divided, and rounded as they are
// defined to be.
template <bool half, bool per_number, bool stochastic>
void encode_16(const void* x, int64_t from, int64_t count, const Run& r, uint8_t* bytes) {
    const auto table = [](const float* t, int64_t i, __mmask16 here) {
        return per_number ? _mm512_maskz_loadu_ps(here, t + i) : _mm512_set1_ps(*t);
    };
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2**23: sums with it are whole, their last byte the code
    const __m512 unsure = _mm512_set1_ps(0.5f - 0x1p-14f), middle = _mm512_set1_ps(0.5f);
    const __m512 low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    const __m512i first = _mm512_set1_epi32(static_cast<int>(r.first));
    const __m512i key = _mm512_set1_epi32(static_cast<int>(r.key1));
    __m512 zero = table(r.zero, 0, 0), reciprocal = table(r.reciprocal, 0, 0), shift = zero;
    __m512 bottom = _mm512_sub_ps(low, zero), top = _mm512_sub_ps(high, zero), whole = _mm512_add_ps(magic, zero);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 here = static_cast<__mmask16>(count - i < 16 ? (1 << (count - i)) - 1 : 0xFFFF);
        __m512 v;
        if (half) {
            const __m256i bits = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(x) + from + i);
            v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else {
            v = _mm512_maskz_loadu_ps(here, static_cast<const float*>(x) + from + i);
        }
        if (per_number) {
            zero = table(r.zero, i, here), reciprocal = table(r.reciprocal, i, here);
            bottom = _mm512_sub_ps(low, zero), top = _mm512_sub_ps(high, zero), whole = _mm512_add_ps(magic, zero);
        }
        // Within the bounds; nan stays nan.
        __m512 t = _mm512_min_ps(top, _mm512_max_ps(bottom, _mm512_mul_ps(v, reciprocal)));
        if (stochastic) {
            shift = centred_noise(_mm512_add_epi32(first, _mm512_maskz_loadu_epi32(here, r.numbers + i)), key);
            t = _mm512_sub_ps(t, shift);
        }
        __m512 code = _mm512_add_ps(t, whole);
        const __m512 part = _mm512_sub_ps(t, _mm512_sub_ps(code, whole));
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(part), unsure, _CMP_GT_OQ)) {
            t = _mm512_div_ps(v, table(r.scale, i, here));
            t = _mm512_min_ps(top, _mm512_max_ps(bottom, t));
            __m512 q = _mm512_roundscale_ps(t, stochastic ? _MM_FROUND_TO_NEG_INF : _MM_FROUND_TO_NEAREST_INT);
            if (stochastic) {
                const __mmask16 up = _mm512_cmp_ps_mask(_mm512_sub_ps(t, q), _mm512_add_ps(shift, middle), _CMP_GT_OQ);
                q = _mm512_mask_add_ps(q, up, q, _mm512_set1_ps(1.0f));
            }
            code = _mm512_add_ps(q, whole);
        }
        const __m128i last = _mm512_cvtepi32_epi8(_mm512_castps_si512(code));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), last);
    }
}

struct Avx512Encoder {
    template <bool half>
    static void encode_half(const void* x, int64_t from, int64_t count, const Run& r, bool per_number, bool stochastic,
                            uint8_t* bytes) {
        if (per_number)
            return stochastic ? encode_16<half, true, true>(x, from, count, r, bytes)
                              : encode_16<half, true, false>(x, from, count, r, bytes);
        return stochastic ? encode_16<half, false, true>(x, from, count, r, bytes)
                          : encode_16<half, false, false>(x, from, count, r, bytes);
    }
    static void encode_run(const void* x, Type type, int64_t from, int64_t count, const Run& run, bool per_number,
                           bool by_reciprocal, bool stochastic, uint8_t* bytes) {
        if (by_reciprocal && type == Type::f32)
            return encode_half<false>(x, from, count, run, per_number, stochastic, bytes);
        if (by_reciprocal) return encode_half<true>(x, from, count, run, per_number, stochastic, bytes);
        PortableEncoder::encode_run(x, type, from, count, run, per_number, by_reciprocal, stochastic, bytes);
    }
};

}  // namespace

constexpr Passes avx512_passes = all_passes<Avx512Encoder>();

}  // namespace lowbit
