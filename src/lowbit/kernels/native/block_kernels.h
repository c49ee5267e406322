// The micro-kernel of products in blocks, of a unit for dot products of codes (see vector_kernels.h).
//
// Beside what it is there, `Dot` has
//
//   kBias              the group that the lhs is biased by
//   Floats             a vector of float32, all 0 where it is made of {}
//   scaled(sum, scale)                     sums as float32, times a scale
//   add_scaled(total, x, scales)           total + x times scales in memory, rounded once
//   save(c, total)                         to memory
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_gemm.h"
#include "layout.h"
#include "vector_kernels.h"

namespace lowbit {
namespace {

// Sums of a block in int32, and of all blocks in float32, of `kRows` rows by `vectors` vectors of columns at a time.
template <class Dot, int vectors>
struct BlockKernel {
    static constexpr int kRows = 4, kHalves = vectors * Dot::kLanes / 16;

    // Where group g of 16 columns of an rhs panel begins.
    static const uint8_t* group_of(const uint8_t* rhs, int64_t half, int64_t g) {
        return rhs + half * kBlock + g / 16 * kPanelStep + g % 16 * 64;
    }

    // What sums of a block begin at: minus what the bias of the lhs adds to those of each column.
    static void begin(const uint8_t* rhs, int64_t groups, int64_t in_block, int32_t* to) {
        const auto bias = Dot::repeat(reinterpret_cast<const uint8_t*>(&Dot::kBias));
        for (int64_t first = 0; first < groups; first += in_block, to += kNr) {
            for (int64_t j = 0; j < kNr; j += Dot::kLanes) {
                typename Dot::Vector sum{};
                for (int64_t g = first; g < std::min(first + in_block, groups); g++)
                    Dot::add(sum, bias, Dot::groups(group_of(rhs, j / 16, g) + j % 16 * 4));
                Dot::save(to + j, sum);
            }
            for (int64_t j = 0; j < kNr; j++) to[j] = -to[j];
        }
    }

    template <LhsLayout layout>
    static void multiply(const BlockPanel& p) {
        for (int64_t first = 0; first < p.rows; first += kRows)
            for (int64_t half = 0; half < 2; half += kHalves) multiply_rows<layout>(p, first, half);
    }

  private:
    template <LhsLayout layout>
    static void multiply_rows(const BlockPanel& p, int64_t first, int64_t half) {
        constexpr Strides at = layout == LhsLayout::blocked ? kBlocked : kDepthMajor;
        const uint8_t* lhs = p.lhs + first / 16 * at.half + first % 16 * at.row;
        const uint8_t* of[kRows];
        for (int i = 0; i < kRows; i++) of[i] = lhs + i * at.row;
        const float *lhs_scale = p.lhs_scale + first, *rhs_scale = p.rhs_scale + half * 16;
        const int32_t* begin = p.begin + half * 16;
        typename Dot::Floats total[kRows][vectors] = {};
        for (int64_t from = 0; from < p.groups; from += p.in_block) {
            const int64_t until = std::min(from + p.in_block, p.groups);
            typename Dot::Vector sum[kRows][vectors];
            for (int i = 0; i < kRows; i++)
                for (int j = 0; j < vectors; j++) Dot::load(sum[i][j], begin + Dot::kLanes * j);
            for (int64_t g = from; g < until;) {
                // Groups of one step lie one after the other.
                const int64_t end = std::min(until, (g / 16 + 1) * 16);
                const uint8_t* right = group_of(p.rhs, half, g);
                int64_t left = g / 16 * at.step + g % 16 * at.group;
                for (; g < end; g++, right += 64, left += at.group)
                    multiply_groups<Dot, kRows, vectors, 1>(sum, of, left, at.group, right, 64, kBlock);
            }
            for (int i = 0; i < kRows; i++)
                for (int j = 0; j < vectors; j++)
                    total[i][j] =
                        Dot::add_scaled(total[i][j], Dot::scaled(sum[i][j], lhs_scale[i]), rhs_scale + Dot::kLanes * j);
            lhs_scale += kMr, rhs_scale += kNr, begin += kNr;
        }
        for (int i = 0; i < kRows; i++)
            for (int j = 0; j < vectors; j++)
                Dot::save(p.c + (first + i) * kNr + half * 16 + Dot::kLanes * j, total[i][j]);
    }
};

}  // namespace
}  // namespace lowbit
