// Micro-kernels of a unit for dot products in 32-bit lanes, whatever the width of its vectors.
//
// `Dot` is that unit:
//
//   kLanes             lanes of a vector
//   Accumulator, Vector                    the type of a sum, and a vector of them, all 0 where it is made of {}
//   Groups             a vector of groups: `groups(from)` those in memory, `repeat(from)` one in every lane
//   add(sum, lhs, rhs)                     add the products of the groups of each lane
//   load(sum, c), save(c, sum)             sums from and to memory
#pragma once

#include <cstdint>

#include "layout.h"

namespace lowbit {
namespace {

// Multiply `groups` groups of `rows` rows that begin at `lhs` by `vectors` vectors of columns, written out: addresses
// in the instructions are what brings it to the speed of the units.
template <class Dot, int rows, int vectors, int groups>
__attribute__((always_inline)) inline void multiply_groups(typename Dot::Vector (&sum)[rows][vectors],
                                                           const uint8_t* const (&lhs)[rows], int64_t at,
                                                           int64_t lhs_group, const uint8_t* rhs, int64_t rhs_row,
                                                           int64_t rhs_half) {
    constexpr int in_half = 16 / Dot::kLanes;
#pragma GCC unroll 16
    for (int g = 0; g < groups; g++) {
        typename Dot::Groups right[vectors];
        for (int j = 0; j < vectors; j++)
            right[j] = Dot::groups(rhs + j / in_half * rhs_half + j % in_half * Dot::kLanes * 4 + g * rhs_row);
        for (int i = 0; i < rows; i++) {
            const auto left = Dot::repeat(lhs[i] + at + g * lhs_group);
            for (int j = 0; j < vectors; j++) Dot::add(sum[i][j], left, right[j]);
        }
    }
}

// `rows` rows by `vectors` vectors of accumulators at a time stay in registers: 16 or 32 of the `columns`.
template <class Dot, int rows, int vectors, int columns, LhsLayout lhs_layout, bool rhs_packed>
void micro_kernel(const uint8_t* lhs, const Extent& extent, const uint8_t* rhs, typename Dot::Accumulator* c,
                  int64_t c_stride, bool add) {
    constexpr int lanes = Dot::kLanes, halves = vectors * lanes / 16;
    static_assert(halves * 16 == vectors * lanes && columns % (vectors * lanes) == 0);
    const Strides of_lhs = lhs_layout == LhsLayout::blocked       ? kBlocked
                           : lhs_layout == LhsLayout::depth_major ? kDepthMajor
                                                                  : extent.lhs;
    const Strides of_rhs = rhs_packed ? kBlocked : extent.rhs;
    const int64_t group = lhs_layout == LhsLayout::depth_major ? kDepthMajor.group : kBlocked.group;
    for (int64_t first = 0; first < extent.rows; first += rows)
        for (int64_t half = 0; half < columns / 16; half += halves) {
            auto* to = c + first * c_stride + 16 * half;
            typename Dot::Vector sum[rows][vectors] = {};
            if (add)
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < vectors; j++) Dot::load(sum[i][j], to + i * c_stride + lanes * j);
            const uint8_t* block = rhs + half * of_rhs.half;
            for (int64_t l = 0; l < extent.lines; l++) {
                const uint8_t* row = lhs + l * extent.lhs.line + first / 16 * of_lhs.half + first % 16 * of_lhs.row;
                if (!rhs_packed) block = rhs + l * extent.rhs.line + half * of_rhs.half;
                const uint8_t* of[rows];
                for (int i = 0; i < rows; i++) of[i] = row + i * of_lhs.row;
                int64_t done = 0;
                for (int64_t s = 0; s < extent.steps; s++, done += of_lhs.step, block += of_rhs.step)
                    multiply_groups<Dot, rows, vectors, 16>(sum, of, done, group, block, of_rhs.row, of_rhs.half);
                for (int64_t q = 0; q < extent.quarters; q++)
                    multiply_groups<Dot, rows, vectors, 4>(sum, of, done + q * 4 * group, group,
                                                           block + q * 4 * of_rhs.row, of_rhs.row, of_rhs.half);
                if (extent.quarters) block += of_rhs.step;
            }
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < vectors; j++) Dot::save(to + i * c_stride + lanes * j, sum[i][j]);
        }
}

}  // namespace
}  // namespace lowbit
