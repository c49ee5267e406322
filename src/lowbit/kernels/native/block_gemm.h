// Products of codes in blocks of the depth, each with scales of its own.
//
//   C = sum over blocks b of  S_lhs(m, b) S_rhs(n, b) sum over k in b of q_lhs(m, k) q_rhs(k, n)
//
// Both sides are packed over the whole depth, as layout.h draws them. Where the lhs is biased (see operand.h), the sums
// of a block begin at minus what the bias adds. They are exact in int32. Numbers of C stay in registers
// over the whole depth, so blocks are added in their order, whatever the number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace lowbit {
namespace {

// What a micro-kernel gets of a panel by a panel: scales and beginnings of sums are one row for each block.
struct BlockPanel {
    const uint8_t *lhs, *rhs;
    int64_t groups, in_block;            // of the depth, and of a block of it
    const float *lhs_scale, *rhs_scale;  // rows of kMr and of kNr
    const int32_t* begin;                // rows of kNr
    int64_t rows;                        // that count
    float* c;                            // kMr x kNr
};

// `Kernel` multiplies a BlockPanel, its lhs blocked or depth-major.
template <class Isa, class Kind, class Kernel>
void multiply_blocks(const Product& p, int64_t block) {
    if (p.m == 0 || p.n == 0) return;
    const Kind lhs_kind(p.lhs, true), rhs_kind(p.rhs, false);
    const int64_t steps = steps_of<Kind>(p.k), panel_bytes = steps * kPanelStep, blocks = ceil_div(p.k, block);
    const int64_t lhs_panels = ceil_div(p.m, kMr), rhs_panels = ceil_div(p.n, kNr), in_block = block / Kind::in_group;
    const int64_t groups = ceil_div(p.k, Kind::in_group);
    auto* lhs = workspace<uint8_t>(Slot::packed_lhs, lhs_panels * panel_bytes);
    auto* rhs = workspace<uint8_t>(Slot::packed_rhs, rhs_panels * panel_bytes);
    auto* lhs_scale = workspace<float>(Slot::lhs_sums, lhs_panels * blocks * kMr);
    auto* rhs_scale = workspace<float>(Slot::accumulators, rhs_panels * blocks * kNr);
    auto* begin = workspace<int32_t>(Slot::rhs_sums, rhs_panels * blocks * kNr);
    const Result& r = p.result;
    // Scales of a panel side by side; zeros beyond the last row.
    const auto gather = [blocks](const float* from, int64_t width, int64_t panel, float* to) {
        const int64_t first = panel * kMr, count = std::min(kMr, width - first);
        for (int64_t b = 0; b < blocks; b++) {
            std::fill(std::copy_n(from + b * width + first, count, to + b * kMr), to + (b + 1) * kMr, 0.0f);
        }
    };
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        pack_rhs<Isa>(guard, rhs_kind, p, 0, steps, rhs, panel_bytes);
        pack_lhs<Isa>(guard, lhs_kind, p, 0, steps, lhs, panel_bytes);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < lhs_panels; m++) gather(r.row_scale, p.m, m, lhs_scale + m * blocks * kMr);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rhs_panels; n++) {
            gather(r.column_scale, p.n, n, rhs_scale + n * blocks * kNr);
            Kernel::begin(rhs + n * panel_bytes, groups, in_block, begin + n * blocks * kNr);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < rhs_panels; n++)
            guard([&] {
                alignas(64) float c[kMr * kNr];
                const int64_t columns = std::min(kNr, p.n - n * kNr);
                for (int64_t m = 0; m < lhs_panels; m++) {
                    const int64_t rows = std::min(kMr, p.m - m * kMr);
                    const BlockPanel panel{lhs + m * panel_bytes,
                                           rhs + n * panel_bytes,
                                           groups,
                                           in_block,
                                           lhs_scale + m * blocks * kMr,
                                           rhs_scale + n * blocks * kNr,
                                           begin + n * blocks * kNr,
                                           rows,
                                           c};
                    if (p.lhs.order == Order::width_major)
                        Kernel::template multiply<LhsLayout::blocked>(panel);
                    else
                        Kernel::template multiply<LhsLayout::depth_major>(panel);
                    for (int64_t i = 0; i < rows; i++) {
                        if (r.bias)
                            for (int64_t j = 0; j < columns; j++) c[i * kNr + j] += r.bias[n * kNr + j];
                        store(c + i * kNr, columns, r.type, r.data, (m * kMr + i) * r.stride + n * kNr);
                    }
                }
            });
    }
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
