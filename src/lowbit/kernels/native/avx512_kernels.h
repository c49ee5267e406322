// What units for dot products in vectors of AVX-512 share.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx512_vectors.h"
#include "layout.h"
#include "vector_kernels.h"

namespace lowbit {
namespace {

struct Avx512Unit {
    static constexpr int kLanes = 16;
    using Groups = __m512i;
    static Groups groups(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Groups repeat(const uint8_t* from) {
        int32_t group;
        std::memcpy(&group, from, 4);
        return _mm512_set1_epi32(group);
    }
};

template <class Dot>
struct Avx512Kernels : Avx512 {
    static constexpr bool kTiles = false;
    static constexpr int64_t kLeastRows = 8;
    struct Session {};

    template <class Kind, LhsLayout lhs_layout, bool rhs_packed>
    static MicroKernel<typename Dot::Accumulator> kernel(int64_t columns, int64_t rows) {
        if (columns > 16) return micro_kernel<Dot, 8, 2, 32, lhs_layout, rhs_packed>;
        return rows % 16 ? micro_kernel<Dot, 8, 1, 16, lhs_layout, rhs_packed>
                         : micro_kernel<Dot, 16, 1, 16, lhs_layout, rhs_packed>;
    }
};

}  // namespace
}  // namespace lowbit
