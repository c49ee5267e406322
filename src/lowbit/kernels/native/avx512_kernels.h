// Micro-kernels of AVX-512 with a unit for dot products in 32-bit lanes.
//
// `Dot` is that unit: `Number`, `Accumulator`, `Vector` of 16 accumulators, and `add(sum, lhs, rhs)`.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx512_vectors.h"
#include "layout.h"

namespace lowbit {
namespace {

// Multiply `groups` groups of `rows` rows that begin at `lhs` by `columns` vectors of columns, written out: addresses
// in the instructions are what brings it to the speed of the units.
template <class Dot, int rows, int columns, int groups>
__attribute__((always_inline)) inline void multiply_groups(typename Dot::Vector (&sum)[rows][columns],
                                                           const uint8_t* const (&lhs)[rows], int64_t at,
                                                           int64_t lhs_group, const uint8_t* rhs, int64_t rhs_row,
                                                           int64_t rhs_half) {
#pragma GCC unroll 16
    for (int g = 0; g < groups; g++) {
        __m512i right[columns];
        for (int j = 0; j < columns; j++) right[j] = _mm512_loadu_si512(rhs + j * rhs_half + g * rhs_row);
        for (int i = 0; i < rows; i++) {
            int32_t group;
            std::memcpy(&group, lhs[i] + at + g * lhs_group, 4);
            for (int j = 0; j < columns; j++) Dot::add(sum[i][j], _mm512_set1_epi32(group), right[j]);
        }
    }
}

// `rows` rows by `columns` vectors of accumulators at a time stay in registers.
template <class Dot, int rows, int columns, LhsLayout lhs_layout, bool rhs_packed>
void micro_kernel(const uint8_t* lhs, const Extent& extent, const uint8_t* rhs, typename Dot::Accumulator* c,
                  int64_t c_stride, bool add) {
    const Strides of_lhs = lhs_layout == LhsLayout::blocked       ? kBlocked
                           : lhs_layout == LhsLayout::depth_major ? kDepthMajor
                                                                  : extent.lhs;
    const Strides of_rhs = rhs_packed ? kBlocked : extent.rhs;
    const int64_t group = lhs_layout == LhsLayout::depth_major ? kDepthMajor.group : kBlocked.group;
    for (int64_t first = 0; first < extent.rows; first += rows) {
        typename Dot::Vector sum[rows][columns] = {};
        if (add)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j++) Dot::load(sum[i][j], c + (first + i) * c_stride + 16 * j);
        const uint8_t* block = rhs;
        for (int64_t l = 0; l < extent.lines; l++) {
            const uint8_t* row = lhs + l * extent.lhs.line + first / 16 * of_lhs.half + first % 16 * of_lhs.row;
            if (!rhs_packed) block = rhs + l * extent.rhs.line;
            const uint8_t* of[rows];
            for (int i = 0; i < rows; i++) of[i] = row + i * of_lhs.row;
            int64_t done = 0;
            for (int64_t s = 0; s < extent.steps; s++, done += of_lhs.step, block += of_rhs.step)
                multiply_groups<Dot, rows, columns, 16>(sum, of, done, group, block, of_rhs.row, of_rhs.half);
            for (int64_t q = 0; q < extent.quarters; q++)
                multiply_groups<Dot, rows, columns, 4>(sum, of, done + q * 4 * group, group, block + q * 4 * of_rhs.row,
                                                       of_rhs.row, of_rhs.half);
            if (extent.quarters) block += of_rhs.step;
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) Dot::save(c + (first + i) * c_stride + 16 * j, sum[i][j]);
    }
}

template <class Dot>
struct Avx512Kernels : Avx512 {
    static constexpr bool kTiles = false;
    static constexpr int64_t kLeastRows = 8;
    struct Session {};

    template <class Kind, LhsLayout lhs_layout, bool rhs_packed>
    static MicroKernel<typename Dot::Accumulator> kernel(int64_t columns, int64_t rows) {
        if (columns > 16) return micro_kernel<Dot, 8, 2, lhs_layout, rhs_packed>;
        return rows % 16 ? micro_kernel<Dot, 8, 1, lhs_layout, rhs_packed>
                         : micro_kernel<Dot, 16, 1, lhs_layout, rhs_packed>;
    }
};

}  // namespace
}  // namespace lowbit
