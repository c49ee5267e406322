// What units for dot products in vectors of 256 bits share.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "all_products.h"
#include "block_kernels.h"
#include "layout.h"
#include "plain_vectors.h"
#include "vector_kernels.h"

namespace lowbit {
namespace {

struct SseSquare {
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
        __m128 r[4];
        for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(reinterpret_cast<const float*>(in + i * in_stride));
        _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
        for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float*>(out + i * out_stride), r[i]);
    }
};

struct Avx2Unit {
    static constexpr int kLanes = 8;
    using Accumulator = int32_t;
    using Vector = __m256i;
    using Groups = __m256i;
    static Groups groups(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Groups repeat(const uint8_t* from) {
        int32_t group;
        std::memcpy(&group, from, 4);
        return _mm256_set1_epi32(group);
    }
    static void load(Vector& sum, const int32_t* c) { sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)); }
    static void save(int32_t* c, Vector sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), sum); }

    using Floats = __m256;
    static Floats scaled(Vector sum, float scale) {
        return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale));
    }
    static Floats add_scaled(Floats total, Floats x, const float* scales) {
        return _mm256_fmadd_ps(x, _mm256_loadu_ps(scales), total);
    }
    static void save(float* c, Floats total) { _mm256_storeu_ps(c, total); }
};

template <class Dot>
struct Avx2Kernels : PlainVectors<SseSquare, uint8_t> {
    template <class Kind, LhsLayout lhs_layout, bool rhs_packed>
    static MicroKernel<int32_t> kernel(int64_t columns, int64_t) {
        return columns > 16 ? micro_kernel<Dot, 4, 2, 32, lhs_layout, rhs_packed>
                            : micro_kernel<Dot, 4, 2, 16, lhs_layout, rhs_packed>;
    }
};

// All products of codes.
template <class Dot, class Kind>
constexpr Products avx2_family() {
    return Products()
        .with_codes(multiply<Avx2Kernels<Dot>, Kind>)
        .with_blocks(multiply_blocks<Avx2Kernels<Dot>, Kind, BlockKernel<Dot, 2>>);
}

}  // namespace
}  // namespace lowbit
