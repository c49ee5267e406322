// Products of codes for AArch64 with products of small matrices (FEAT_I8MM).
//
// The unit multiplies two rows by two columns, of 8 bytes of depth each, so a pair of groups of two rows, or of two
// columns, is one vector, and a vector of sums is (row, column) = (0, 0), (0, 1), (1, 0), (1, 1). Products in blocks
// are those of dotprod.cpp.

#include "dispatch.h"
#include "neon_kernels.h"

namespace lowbit {
namespace {

constexpr int kPairs = 4;  // pairs of rows, and of columns, whose sums stay in registers

// A pair of groups of two rows.
template <LhsLayout layout>
inline int8x16_t lhs_pair(const uint8_t* row, const uint8_t* next, int64_t group) {
    if (layout != LhsLayout::depth_major) return vreinterpretq_s8_u8(vcombine_u8(vld1_u8(row), vld1_u8(next)));
    // The groups of two rows lie side by side.
    const uint32x2_t first = vreinterpret_u32_u8(vld1_u8(row)), second = vreinterpret_u32_u8(vld1_u8(row + group));
    return vreinterpretq_s8_u32(vcombine_u32(vzip1_u32(first, second), vzip2_u32(first, second)));
}

// `groups` groups of rows that begin at `lhs` by those of columns that begin at `rhs`.
template <LhsLayout layout, int groups>
__attribute__((always_inline)) inline void multiply_pairs(int32x4_t (&sum)[kPairs][kPairs],
                                                          const uint8_t* const (&lhs)[2 * kPairs], int64_t at,
                                                          int64_t lhs_group, const uint8_t* rhs, int64_t rhs_row) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; g += 2) {
        int8x16_t right[kPairs];
        for (int j = 0; j < kPairs; j += 2) {
            const uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(rhs + g * rhs_row + 8 * j));
            const uint32x4_t second = vreinterpretq_u32_u8(vld1q_u8(rhs + (g + 1) * rhs_row + 8 * j));
            right[j] = vreinterpretq_s8_u32(vzip1q_u32(first, second));
            right[j + 1] = vreinterpretq_s8_u32(vzip2q_u32(first, second));
        }
        for (int i = 0; i < kPairs; i++) {
            const int64_t from = at + g * lhs_group;
            const int8x16_t left = lhs_pair<layout>(lhs[2 * i] + from, lhs[2 * i + 1] + from, lhs_group);
            for (int j = 0; j < kPairs; j++) sum[i][j] = vmmlaq_s32(sum[i][j], left, right[j]);
        }
    }
}

// The lower, or the upper, halves of two vectors.
inline int32x4_t halves(int32x4_t a, int32x4_t b, bool upper) {
    return upper ? vcombine_s32(vget_high_s32(a), vget_high_s32(b)) : vcombine_s32(vget_low_s32(a), vget_low_s32(b));
}

template <int columns, LhsLayout lhs_layout, bool rhs_packed>
void matrix_kernel(const uint8_t* lhs, const Extent& extent, const uint8_t* rhs, int32_t* c, int64_t c_stride,
                   bool add) {
    const Strides of_lhs = lhs_layout == LhsLayout::blocked       ? kBlocked
                           : lhs_layout == LhsLayout::depth_major ? kDepthMajor
                                                                  : extent.lhs;
    const Strides of_rhs = rhs_packed ? kBlocked : extent.rhs;
    const int64_t group = lhs_layout == LhsLayout::depth_major ? kDepthMajor.group : kBlocked.group;
    for (int64_t first = 0; first < extent.rows; first += 2 * kPairs)
        for (int64_t column = 0; column < columns; column += 2 * kPairs) {
            int32x4_t sum[kPairs][kPairs] = {};
            const auto place = [&](int i, int j) { return c + (first + i) * c_stride + column + 2 * j; };
            for (int i = 0; i < (add ? kPairs : 0); i++)
                for (int j = 0; j < kPairs; j += 2) {
                    const int32x4_t row = vld1q_s32(place(2 * i, j)), next = vld1q_s32(place(2 * i + 1, j));
                    sum[i][j] = halves(row, next, false), sum[i][j + 1] = halves(row, next, true);
                }
            const int64_t begin = column / 16 * of_rhs.half + column % 16 * 4;
            const uint8_t* block = rhs + begin;
            for (int64_t l = 0; l < extent.lines; l++) {
                const uint8_t* row = lhs + l * extent.lhs.line + first / 16 * of_lhs.half + first % 16 * of_lhs.row;
                if (!rhs_packed) block = rhs + l * extent.rhs.line + begin;
                const uint8_t* of[2 * kPairs];
                for (int i = 0; i < 2 * kPairs; i++) of[i] = row + i * of_lhs.row;
                int64_t done = 0;
                for (int64_t s = 0; s < extent.steps; s++, done += of_lhs.step, block += of_rhs.step)
                    multiply_pairs<lhs_layout, 16>(sum, of, done, group, block, of_rhs.row);
                for (int64_t q = 0; q < extent.quarters; q++)
                    multiply_pairs<lhs_layout, 4>(sum, of, done + q * 4 * group, group, block + q * 4 * of_rhs.row,
                                                  of_rhs.row);
                if (extent.quarters) block += of_rhs.step;
            }
            for (int i = 0; i < kPairs; i++)
                for (int j = 0; j < kPairs; j += 2) {
                    vst1q_s32(place(2 * i, j), halves(sum[i][j], sum[i][j + 1], false));
                    vst1q_s32(place(2 * i + 1, j), halves(sum[i][j], sum[i][j + 1], true));
                }
        }
}

struct I8mm : Neon {
    static constexpr int64_t kLeastRows = 2 * kPairs;

    template <class Kind, LhsLayout lhs_layout, bool rhs_packed>
    static MicroKernel<int32_t> kernel(int64_t columns, int64_t) {
        return columns > 16 ? matrix_kernel<32, lhs_layout, rhs_packed> : matrix_kernel<16, lhs_layout, rhs_packed>;
    }
};

}  // namespace

constexpr Products i8mm_products = Products().with_codes(multiply<I8mm, S8S8>);

}  // namespace lowbit
