// Products of matrices: drivers that pack both sides and run micro-kernels over panels.
//
// Notation as in BLAS libraries: a micro-kernel takes kc of the depth at a time, so that an rhs panel of it stays in
// the first-level cache; a task of one thread is mc rows by nc columns, whose lhs panels stay in the second-level
// cache. All are counted in steps and panels here.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "epilogue.h"
#include "layout.h"
#include "operand.h"
#include "pack.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

namespace lowbit {
namespace {

constexpr double kFewProducts = 1 << 21;  // multiplications for which waking other threads costs more than it gains
constexpr int64_t kCache = 512 << 10;     // bytes of packed rows that stay in a core's own cache
constexpr int64_t kKc = 8;                // steps; up to half as many more, so that parts are of like length

inline bool worth_threads(const Product& p) {
    return static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) > kFewProducts;
}

// The layout of a packed lhs.
template <class Isa>
const Strides& lhs_strides(const Product& p) {
    return p.lhs.order == Order::width_major || Isa::kTiles ? kBlocked : kDepthMajor;
}

// Add the codes of all rows of the packed lhs, or of all columns of the packed rhs, by all threads of the enclosing
// team, which wait for each other at the end.
template <class Isa>
void sum_lhs_panels(const Product& p, const uint8_t* lhs, int64_t panels, int64_t panel_bytes, int64_t steps,
                    int32_t* sums) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < panels; m++)
        Isa::add_lhs_sums(lhs + m * panel_bytes, steps * 4, lhs_strides<Isa>(p), sums + m * kMr);
}
template <class Isa>
void sum_rhs_panels(const uint8_t* rhs, int64_t panels, int64_t panel_bytes, int64_t steps, int32_t* sums) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < panels; n++)
        Isa::add_rhs_sums(rhs + n * panel_bytes, steps * 4, kNr, kBlocked, sums + n * kNr);
}

// The micro-kernel for packed panels.
template <class Isa, class Kind>
MicroKernel<typename Kind::Accumulator> packed_kernel(const Product& p, int64_t columns) {
    return p.lhs.order == Order::width_major ? Isa::template kernel<Kind, LhsLayout::blocked, true>(columns, kMr)
                                             : Isa::template kernel<Kind, LhsLayout::depth_major, true>(columns, kMr);
}

// `panels` lhs panels by an rhs panel of so many columns, into `c`: a panel of sums each.
template <class Isa, class Kind>
void multiply_panels(const Product& p, const uint8_t* lhs, const uint8_t* rhs, int64_t steps, int64_t panels,
                     int64_t panel_bytes, int64_t columns, typename Kind::Accumulator* c) {
    const auto kernel = packed_kernel<Isa, Kind>(p, columns);
    const int64_t parts = ceil_div(steps, kKc + kKc / 2);
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * steps / parts, kc = (part + 1) * steps / parts - first;
        for (int64_t m = 0; m < panels; m++)
            kernel(lhs + m * panel_bytes + first * kPanelStep, {kc}, rhs + first * kPanelStep, c + m * kMr * kNr, kNr,
                   part > 0);
    }
}

// How C is cut into tasks: a block of `mc` lhs panels by a run of rhs panels.
struct Tasks {
    int64_t lhs_panels, rhs_panels, mc, row_blocks, column_blocks;

    // At least so many tasks, where there are panels for them.
    Tasks(const Product& p, int64_t block, int64_t least)
        : lhs_panels(ceil_div(p.m, kMr)),
          rhs_panels(ceil_div(p.n, kNr)),
          mc(block),
          row_blocks(ceil_div(lhs_panels, mc)),
          column_blocks(std::min(rhs_panels, std::max<int64_t>(1, ceil_div(least, row_blocks)))) {}
    int64_t count() const { return row_blocks * column_blocks; }

    // Panels [top, bottom) of the lhs, [left, right) of the rhs.
    struct Block {
        int64_t top, bottom, left, right;
    };
    Block operator[](int64_t task) const {
        const int64_t row = task / column_blocks, column = task % column_blocks;
        return {row * mc, std::min((row + 1) * mc, lhs_panels), column * rhs_panels / column_blocks,
                (column + 1) * rhs_panels / column_blocks};
    }
};

// A block of C whose sides are packed over the whole depth: `lhs` and `lhs_sums` are those of its first lhs panel, `c`
// has room for its panels of sums by one rhs panel.
template <class Isa, class Kind>
void multiply_block(const Product& p, const Tasks::Block& block, const uint8_t* lhs, const uint8_t* rhs, int64_t steps,
                    ZeroPoints zero, const int32_t* lhs_sums, const int32_t* rhs_sums, typename Kind::Accumulator* c) {
    const int64_t panel_bytes = steps * kPanelStep, panels = block.bottom - block.top;
    for (int64_t n = block.left; n < block.right; n++) {
        multiply_panels<Isa, Kind>(p, lhs, rhs + n * panel_bytes, steps, panels, panel_bytes, p.n - n * kNr, c);
        for (int64_t m = 0; m < panels; m++)
            finish_panel<Isa>(p, c + m * kMr * kNr, kNr, zero, block.top + m, n, lhs_sums + m * kMr,
                              rhs_sums + n * kNr);
    }
}

// Many rows: the rhs is packed whole, and each thread packs the rows it works on.
template <class Isa, class Kind>
void multiply_tall(const Product& p) {
    using Accumulator = typename Kind::Accumulator;
    const Kind lhs_kind(p.lhs, true), rhs_kind(p.rhs, false);
    const int64_t steps = steps_of<Kind>(p.k), panel_bytes = steps * kPanelStep, threads = omp_get_max_threads();
    const int64_t fitting = std::max<int64_t>(1, kCache / panel_bytes);
    const int64_t mc = std::max<int64_t>(1, std::min({fitting, int64_t{16}, ceil_div(ceil_div(p.m, kMr), threads)}));
    const Tasks tasks(p, mc, 4 * threads);
    const ZeroPoints zero = zero_points(p, lhs_kind, rhs_kind);
    auto* rhs = workspace<uint8_t>(Slot::packed_rhs, tasks.rhs_panels * panel_bytes);
    auto* rhs_sums = workspace<int32_t>(Slot::rhs_sums, tasks.rhs_panels * kNr);
    std::fill_n(rhs_sums, tasks.rhs_panels * kNr, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        pack_rhs<Isa>(guard, rhs_kind, p, 0, steps, rhs, panel_bytes);
        if (zero.lhs) sum_rhs_panels<Isa>(rhs, tasks.rhs_panels, panel_bytes, steps, rhs_sums);
        [[maybe_unused]] const typename Isa::Session session{};
        uint8_t* lhs = nullptr;
        int32_t* lhs_sums = nullptr;
        Accumulator* c = nullptr;
        guard([&] {
            lhs = workspace<uint8_t>(Slot::packed_lhs, mc * panel_bytes);
            lhs_sums = workspace<int32_t>(Slot::lhs_sums, mc * kMr);
            c = workspace<Accumulator>(Slot::panel, mc * kMr * kNr);
        });
        const auto work = [&](int64_t task) {
            const Tasks::Block block = tasks[task];
            std::fill_n(lhs_sums, mc * kMr, 0);
            for (int64_t m = block.top; m < block.bottom; m++) {
                uint8_t* panel = lhs + (m - block.top) * panel_bytes;
                pack_lhs_panel(lhs_kind, p, m, 0, steps, panel);
                if (zero.rhs) Isa::add_lhs_sums(panel, steps * 4, kBlocked, lhs_sums + (m - block.top) * kMr);
            }
            multiply_block<Isa, Kind>(p, block, lhs, rhs, steps, zero, lhs_sums, rhs_sums, c);
        };
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < tasks.count(); task++) guard([&] { work(task); });
    }
    guard.rethrow();
}

// A long sum: kc steps of the depth at a time are packed by all threads together, and added to sums kept in memory.
template <class Isa, class Kind>
void multiply_deep(const Product& p) {
    using Accumulator = typename Kind::Accumulator;
    const Kind lhs_kind(p.lhs, true), rhs_kind(p.rhs, false);
    const int64_t steps = steps_of<Kind>(p.k), threads = omp_get_max_threads();
    const int64_t packed_rows = round_up(p.m, kMr) + round_up(p.n, kNr);
    const int64_t kc = std::min(steps, std::max<int64_t>(16, 32 * kCache / (packed_rows * kStep)));
    const bool once = kc == steps;  // sums need not be kept in memory
    const int64_t panel_bytes = kc * kPanelStep, mc = std::max<int64_t>(1, kCache / panel_bytes);
    const Tasks tasks(p, mc, 8 * threads);
    const int64_t lhs_panels = tasks.lhs_panels, rhs_panels = tasks.rhs_panels, width = rhs_panels * kNr;
    const ZeroPoints zero = zero_points(p, lhs_kind, rhs_kind);
    auto* lhs = workspace<uint8_t>(Slot::packed_lhs, lhs_panels * panel_bytes);
    auto* rhs = workspace<uint8_t>(Slot::packed_rhs, rhs_panels * panel_bytes);
    auto* c = workspace<Accumulator>(Slot::accumulators, once ? 1 : lhs_panels * kMr * width);
    auto* lhs_sums = workspace<int32_t>(Slot::lhs_sums, lhs_panels * kMr);
    auto* rhs_sums = workspace<int32_t>(Slot::rhs_sums, width);
    std::fill_n(lhs_sums, lhs_panels * kMr, 0);
    std::fill_n(rhs_sums, width, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        [[maybe_unused]] const typename Isa::Session session{};
        Accumulator* local = nullptr;
        guard([&] { local = workspace<Accumulator>(Slot::panel, mc * kMr * kNr); });
        for (int64_t first = 0; first < steps; first += kc) {
            const int64_t last = std::min(first + kc, steps);
            pack_lhs<Isa>(guard, lhs_kind, p, first, last, lhs, panel_bytes);
            pack_rhs<Isa>(guard, rhs_kind, p, first, last, rhs, panel_bytes);
            if (zero.rhs) sum_lhs_panels<Isa>(p, lhs, lhs_panels, panel_bytes, last - first, lhs_sums);
            if (zero.lhs) sum_rhs_panels<Isa>(rhs, rhs_panels, panel_bytes, last - first, rhs_sums);
            const auto work = [&](int64_t task) {
                const Tasks::Block block = tasks[task];
                if (once) {
                    multiply_block<Isa, Kind>(p, block, lhs + block.top * panel_bytes, rhs, steps, zero,
                                              lhs_sums + block.top * kMr, rhs_sums, local);
                    return;
                }
                for (int64_t n = block.left; n < block.right; n++) {
                    const auto kernel = packed_kernel<Isa, Kind>(p, p.n - n * kNr);
                    for (int64_t m = block.top; m < block.bottom; m++)
                        kernel(lhs + m * panel_bytes, {last - first}, rhs + n * panel_bytes,
                               c + m * kMr * width + n * kNr, width, first > 0);
                }
            };
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks.count(); task++) guard([&] { work(task); });
        }
        if (!once) {
#pragma omp for schedule(static) nowait
            for (int64_t m = 0; m < lhs_panels; m++)
                for (int64_t n = 0; n < rhs_panels; n++)
                    finish_panel<Isa>(p, c + m * kMr * width + n * kNr, width, zero, m, n, lhs_sums + m * kMr,
                                      rhs_sums + n * kNr);
        }
    }
    guard.rethrow();
}

template <class Isa, class Kind>
void gemm(const Product& p) {
    if (p.m == 0 || p.n == 0) return;
    if (p.k > 4 * std::max(p.m, p.n) || p.lhs.order == Order::depth_major)
        multiply_deep<Isa, Kind>(p);
    else
        multiply_tall<Isa, Kind>(p);
}

}  // namespace
}  // namespace lowbit
