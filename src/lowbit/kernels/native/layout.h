// How packed operands lie in memory, and what a micro-kernel is.
//
// The scheme is that of BLAS libraries (Goto and van de Geijn 2008): both sides are packed into panels, of mr rows of
// the lhs and of nr columns of the rhs, and a micro-kernel multiplies one panel by one panel, in registers. A driver
// walks through the panels in blocks that stay in the caches: kc of the depth, mc rows of the lhs, nc columns of the
// rhs.
//
// Units multiply 32 bits of depth at a time, a *group*: 4 codes or 2 bfloat16 numbers. A *step* is 16 groups, 64 bytes
// of depth, and a *block* is 16 x 16 groups, 1 KiB, what a tile register of AMX holds. A panel is its steps one after
// the other, and a step is two blocks:
//
//      blocked lhs, one step                      blocked rhs, one step
//
//            depth, 64 bytes                            columns, 64 bytes
//          +----+----+-- --+-----+                   +----+----+-- --+-----+
//   row 0  | g0 | g1 | ... | g15 |            g 0    | c0 | c1 | ... | c15 |
//   row 1  | g0 | g1 | ... | g15 |            g 1    | c0 | c1 | ... | c15 |
//     :    |         block 0     |              :    |         block 0     |
//   row 15 | g0 | g1 | ... | g15 |            g 15   | c0 | c1 | ... | c15 |
//          +----+----+-- --+-----+                   +----+----+-- --+-----+
//   row 16 | g0 | g1 | ... | g15 |            g 0    | c16| c17| ... | c31 |
//     :    |         block 1     |              :    |         block 1     |
//   row 31 | g0 | g1 | ... | g15 |            g 15   | c16| c17| ... | c31 |
//          +----+----+-- --+-----+                   +----+----+-- --+-----+
//
//      depth-major lhs, one step: what a depth-major side gives without a transposition, for units without tiles
//
//               rows, 128 bytes
//          +----+----+-- --+-----+
//   g 0    | r0 | r1 | ... | r31 |
//     :    |                     |
//   g 15   | r0 | r1 | ... | r31 |
//          +----+----+-- --+-----+
//
// A group of a blocked rhs holds the same depths of one column, as one of the lhs holds those of one row, so a unit
// adds the products of two groups to one number of C. What lies beyond m, n or k is zeros of both sides.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int64_t kMr = 32;             // rows of an lhs panel
constexpr int64_t kNr = 32;             // columns of an rhs panel
constexpr int64_t kStep = 64;           // bytes of depth in a step
constexpr int64_t kBlock = 16 * kStep;  // bytes of a block
constexpr int64_t kPanelStep = 2 * kBlock;

// Distances in bytes between what a micro-kernel reads of one side: rows (of the rhs: groups), rows 0 and 16 (of the
// rhs: columns), groups of a row, steps, and kernel rows of a convolution.
struct Strides {
    int64_t row = kStep, half = kBlock, group = 4, step = kPanelStep, line = 0;
};
constexpr Strides kBlocked{};
constexpr Strides kDepthMajor{4, 64, kMr * 4};

// What a micro-kernel knows of its lhs when it is compiled; in place it is an image that rows of im2col overlap in.
enum class LhsLayout { blocked, depth_major, in_place };

// The depth that one call of a micro-kernel goes through: `lines` times `steps` steps and a last step of which
// `quarters` count. The lines of a packed rhs follow each other. Vectors leave out what does not count, and rows from
// `rows` on; tiles are always whole.
struct Extent {
    int64_t steps, lines = 1;
    Strides lhs = kBlocked, rhs = kBlocked;
    int64_t quarters = 0, rows = kMr;
};

// C (mr x nr or mr x 16, rows `c_stride` numbers apart) = or += lhs rhs.
template <class Accumulator>
using MicroKernel = void (*)(const uint8_t* lhs, const Extent& extent, const uint8_t* rhs, Accumulator* c,
                             int64_t c_stride, bool add);

}  // namespace lowbit
