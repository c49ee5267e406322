// Packing: one side of a product into panels, as layout.h draws them.
//
// `Isa` brings the transpositions. A driver packs a whole side with all threads (`pack_lhs`, `pack_rhs`), or a panel or
// a step at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "layout.h"
#include "operand.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

namespace lowbit {
namespace {

// Numbers of a step.
template <class Kind>
constexpr int64_t kPerStep = kStep / static_cast<int64_t>(sizeof(typename Kind::Number));

template <class Kind>
int64_t steps_of(int64_t depth) {
    return ceil_div(depth, kPerStep<Kind>);
}

// ---- width-major sides ----

// Steps [first, last) of a blocked lhs panel.
template <class Kind>
void pack_lhs_panel(const Kind& kind, const Product& p, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
    using Number = typename Kind::Number;
    constexpr int64_t per_step = kPerStep<Kind>;
    const int64_t row = panel * kMr, rows = std::min(kMr, p.m - row);
    const int64_t begin = first * per_step, count = std::min(last * per_step, p.k) - begin;
    auto* numbers = workspace<Number>(Slot::numbers, (last - first) * per_step);
    std::fill(numbers + count, numbers + (last - first) * per_step, Number{0});
    for (int64_t i = 0; i < kMr; i++) {
        uint8_t* at = to + i / 16 * kBlock + i % 16 * kStep;
        if (i < rows) load_row(kind, p.lhs, row + i, begin, count, numbers);
        for (int64_t s = 0; s < last - first; s++) {
            if (i < rows)
                std::memcpy(at + s * kPanelStep, numbers + s * per_step, kStep);
            else
                std::memset(at + s * kPanelStep, 0, kStep);
        }
    }
}

// One step of an rhs panel, whose depths are numbers [begin, begin + count).
template <class Isa, class Kind>
void pack_rhs_step(const Kind& kind, const Product& p, int64_t panel, int64_t begin, int64_t count, uint8_t* to) {
    constexpr int64_t per_step = kPerStep<Kind>;
    const int64_t column = panel * kNr, columns = std::min(kNr, p.n - column);
    alignas(64) uint32_t groups[kNr * 16];
    auto* numbers = reinterpret_cast<typename Kind::Number*>(groups);
    if (count < per_step || columns < kNr) std::memset(groups, 0, sizeof(groups));
    for (int64_t i = 0; i < columns; i++) load_row(kind, p.rhs, column + i, begin, count, numbers + i * per_step);
    for (int64_t half = 0; half < 2; half++)
        Isa::transpose(groups + half * 256, 16, reinterpret_cast<uint32_t*>(to + half * kBlock), 16);
}

// Steps [first, last) of an rhs panel.
template <class Isa, class Kind>
void pack_rhs_panel(const Kind& kind, const Product& p, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
    constexpr int64_t per_step = kPerStep<Kind>;
    for (int64_t s = first; s < last; s++, to += kPanelStep)
        pack_rhs_step<Isa>(kind, p, panel, s * per_step, std::min(per_step, p.k - s * per_step), to);
}

// ---- depth-major sides: a step of all panels at a time ----

// Memory of a thread for a side of that width.
template <class Kind>
struct DepthMajorBuffers {
    uint32_t* groups;
    typename Kind::Number* numbers;
    explicit DepthMajorBuffers(int64_t width)
        : groups(workspace<uint32_t>(Slot::groups, 16 * (width + kMr))),
          numbers(workspace<typename Kind::Number>(Slot::numbers, Kind::in_group * width)) {}
};

// The 16 groups of a step, of all of a side's width, `stride` numbers apart; zeros from `width` to `stride`. `row_of`
// says which row of memory is depth k; where it says less than 0, there is `none`.
template <class Isa, class Kind, class RowOf>
void load_groups(const Kind& kind, const Side& side, const RowOf& row_of, typename Kind::Number none, int64_t step,
                 int64_t width, int64_t stride, const DepthMajorBuffers<Kind>& buffers) {
    constexpr int64_t in_group = Kind::in_group;
    using Number = typename Kind::Number;
    const bool plain = !side.window && !side.fold;
    for (int64_t g = 0; g < 16; g++) {
        uint32_t* groups = buffers.groups + g * stride;
        const int64_t k = (step * 16 + g) * in_group, from = row_of(k);
        const bool together = plain && from >= 0 && row_of(k + in_group - 1) == from + in_group - 1;
        if (together && kind.converts_by_flip(side)) {
            Isa::interleave(static_cast<const Number*>(side.data) + from * side.stride, side.stride, width, groups);
            const uint32_t flip = kind.group_flip();
            for (int64_t i = 0; i < (flip ? width : 0); i++) groups[i] ^= flip;
            std::memset(groups + width, 0, (stride - width) * 4);
            continue;
        }
        const bool dense = together && side.stride == width;
        if (dense) load_row(kind, side, from, 0, in_group * width, buffers.numbers);
        for (int64_t i = 0; i < in_group && !dense; i++) {
            const int64_t r = row_of(k + i);
            if (r >= 0)
                load_row(kind, side, r, 0, width, buffers.numbers + i * width);
            else
                std::fill_n(buffers.numbers + i * width, width, none);
        }
        Isa::interleave(buffers.numbers, width, width, groups);
        std::memset(groups + width, 0, (stride - width) * 4);
    }
}

// A step of every lhs panel, panels `panel_bytes` apart, as `Isa` takes a depth-major lhs.
template <class Isa, class Kind, class RowOf>
void pack_lhs_step_of_all(const Kind& kind, const Product& p, const RowOf& row_of, typename Kind::Number none,
                          int64_t step, uint8_t* to, int64_t panel_bytes, const DepthMajorBuffers<Kind>& buffers) {
    const int64_t width = round_up(p.m, kMr);
    load_groups<Isa>(kind, p.lhs, row_of, none, step, p.m, width, buffers);
    to += step * kPanelStep;
    for (int64_t m = 0; m < width; m += kMr) {
        uint8_t* panel = to + m / kMr * panel_bytes;
        if constexpr (Isa::kTiles) {
            for (int64_t half = 0; half < 2; half++)
                Isa::transpose(buffers.groups + m + half * 16, width,
                               reinterpret_cast<uint32_t*>(panel + half * kBlock), 16);
        } else {
            for (int64_t g = 0; g < 16; g++)
                std::memcpy(panel + g * kDepthMajor.group, buffers.groups + g * width + m, kMr * 4);
        }
    }
}

// A step of every rhs panel, panels `panel_bytes` apart.
template <class Isa, class Kind, class RowOf>
void pack_rhs_step_of_all(const Kind& kind, const Product& p, const RowOf& row_of, int64_t step, uint8_t* to,
                          int64_t panel_bytes, const DepthMajorBuffers<Kind>& buffers) {
    const int64_t width = round_up(p.n, kNr);
    load_groups<Isa>(kind, p.rhs, row_of, 0, step, p.n, width, buffers);
    for (int64_t n = 0; n < width; n += 16)
        for (int64_t g = 0; g < 16; g++)
            std::memcpy(to + n / kNr * panel_bytes + n % kNr / 16 * kBlock + g * 64, buffers.groups + g * width + n,
                        64);
}

// ---- a whole side ----

// Steps [first, last) of the rhs, by all threads of the enclosing team, which wait for each other at the end.
template <class Isa, class Kind>
void pack_rhs(Guard& guard, const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* to,
              int64_t panel_bytes) {
    if (p.rhs.order == Order::width_major) {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < ceil_div(p.n, kNr); n++)
            pack_rhs_panel<Isa>(kind, p, n, first, last, to + n * panel_bytes);
    } else {
        std::optional<DepthMajorBuffers<Kind>> buffers;
        guard([&] { buffers.emplace(p.n); });
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic)
        for (int64_t s = first; s < last; s++)
            guard([&] {
                pack_rhs_step_of_all<Isa>(kind, p, row_of, s, to + (s - first) * kPanelStep, panel_bytes, *buffers);
            });
    }
}

// The same of the lhs, without the wait.
template <class Isa, class Kind>
void pack_lhs(Guard& guard, const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* to,
              int64_t panel_bytes) {
    if (p.lhs.order == Order::width_major) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t m = 0; m < ceil_div(p.m, kMr); m++)
            guard([&] { pack_lhs_panel(kind, p, m, first, last, to + m * panel_bytes); });
    } else {
        std::optional<DepthMajorBuffers<Kind>> buffers;
        guard([&] { buffers.emplace(p.m); });
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic) nowait
        for (int64_t s = first; s < last; s++)
            guard([&] {
                pack_lhs_step_of_all<Isa>(kind, p, row_of, 0, s, to - first * kPanelStep, panel_bytes, *buffers);
            });
    }
}

}  // namespace
}  // namespace lowbit
