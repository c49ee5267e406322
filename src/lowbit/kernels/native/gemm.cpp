// Products of matrices, and of convolutions through windows: drivers over panels.

#include <omp.h>

#include <algorithm>

#include "panels.h"

namespace lowbit {
namespace {

// Steps of k that are multiplied at a time, so that a panel of B stays in the first-level cache.
constexpr int64_t kDeep = 8;

// The multiplier of packed panels.
template <class Kind>
Multiply<typename Kind::Sum> packed_multiplier(const Kind& kind, const Product& p, int64_t columns) {
    return p.a_along ? multiplier<Lie::tiles, true>(kind, columns) : multiplier<Lie::groups, true>(kind, columns);
}

// So many panels of A by one of B, of so many columns, into `c`: a panel of sums each.
template <class Kind>
void multiply_panels(const Kind& kind, const Product& p, const uint8_t* a, const uint8_t* b, int64_t steps,
                     int64_t panels, int64_t panel_bytes, int64_t columns, typename Kind::Sum* c) {
    const auto multiply = packed_multiplier(kind, p, columns);
    const int64_t parts = ceil_div(steps, kDeep + kDeep / 2);
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * steps / parts, count = (part + 1) * steps / parts - first;
        for (int64_t m = 0; m < panels; m++)
            multiply(a + m * panel_bytes + first * 2 * kTile, {count}, b + first * 2 * kTile, c + m * kPanel * kPanel,
                     kPanel, part > 0);
    }
}

// Many rows: B is packed whole, and each thread packs the rows it works on.
template <class Kind>
void multiply_tall(const Product& p) {
    using Sum = typename Kind::Sum;
    const Kind a_kind(p.a, true), b_kind(p.b, false);
    const int64_t steps = ceil_div(p.k * static_cast<int64_t>(sizeof(typename Kind::Number)), kStep);
    const int64_t row_panels = ceil_div(p.m, kPanel), column_panels = ceil_div(p.n, kPanel);
    const int64_t panel_bytes = steps * 2 * kTile;
    const int64_t threads = omp_get_max_threads();
    const int64_t fitting = std::max<int64_t>(1, kCache / panel_bytes);
    const int64_t group = std::max<int64_t>(1, std::min({fitting, int64_t{16}, ceil_div(row_panels, threads)}));
    const int64_t groups = ceil_div(row_panels, group);
    const int64_t splits = std::min(column_panels, std::max<int64_t>(1, ceil_div(4 * threads, groups)));
    const Zero zero = zero_of(p, a_kind, b_kind);
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, column_panels * kPanel);
    std::fill_n(column_sums, column_panels * kPanel, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        pack_all_b(guard, b_kind, p, 0, steps, b, panel_bytes);
        if (zero.a) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < column_panels; n++)
                add_column_sums(b_kind, b + n * panel_bytes, steps * 4, kPanel, kTiles, column_sums + n * kPanel);
        }
        const Tiles tiles;
        uint8_t* a = nullptr;
        int32_t* row_sums = nullptr;
        Sum* c = nullptr;
        guard([&] {
            a = workspace<uint8_t>(kSlotA, group * panel_bytes);
            row_sums = workspace<int32_t>(kSlotRowSums, group * kPanel);
            c = workspace<Sum>(kSlotPanels, group * kPanel * kPanel);
        });
        const auto work = [&](int64_t task) {
            const int64_t first = task / splits * group, last = std::min(first + group, row_panels);
            const int64_t begin = task % splits * column_panels / splits;
            const int64_t end = (task % splits + 1) * column_panels / splits;
            std::fill_n(row_sums, group * kPanel, 0);
            for (int64_t m = first; m < last; m++) {
                uint8_t* panel = a + (m - first) * panel_bytes;
                pack_a_along(a_kind, p, m, 0, steps, panel);
                if (zero.b) add_row_sums(panel, steps * 4, kTiles, row_sums + (m - first) * kPanel);
            }
            for (int64_t n = begin; n < end; n++) {
                multiply_panels(a_kind, p, a, b + n * panel_bytes, steps, last - first, panel_bytes, p.n - n * kPanel,
                                c);
                for (int64_t m = first; m < last; m++)
                    finish_panel(p, c + (m - first) * kPanel * kPanel, kPanel, zero, m, n,
                                 row_sums + (m - first) * kPanel, column_sums + n * kPanel);
            }
        };
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < groups * splits; task++) guard([&] { work(task); });
    }
    guard.rethrow();
}

// A long sum: chunks of k are packed by all threads together, and added to sums kept in memory.
template <class Kind>
void multiply_long(const Product& p) {
    using Sum = typename Kind::Sum;
    const Kind a_kind(p.a, true), b_kind(p.b, false);
    const int64_t steps = ceil_div(p.k * static_cast<int64_t>(sizeof(typename Kind::Number)), kStep);
    const int64_t row_panels = ceil_div(p.m, kPanel), column_panels = ceil_div(p.n, kPanel);
    const int64_t chunk =
        std::min(steps, std::max<int64_t>(16, 32 * kCache / ((row_panels + column_panels) * kPanel * kStep)));
    const bool once = chunk == steps;  // sums need not be kept in memory
    const int64_t panel_bytes = chunk * 2 * kTile;
    const int64_t block = std::max<int64_t>(1, kCache / panel_bytes);
    const int64_t blocks = ceil_div(row_panels, block), width = column_panels * kPanel;
    const int64_t threads = omp_get_max_threads();
    const int64_t splits = std::min(column_panels, std::max<int64_t>(1, ceil_div(8 * threads, blocks)));
    const Zero zero = zero_of(p, a_kind, b_kind);
    auto* a = workspace<uint8_t>(kSlotA, row_panels * panel_bytes);
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* c = workspace<Sum>(kSlotSums, once ? 1 : row_panels * kPanel * width);
    auto* row_sums = workspace<int32_t>(kSlotRowSums, row_panels * kPanel);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, width);
    std::fill_n(row_sums, row_panels * kPanel, 0);
    std::fill_n(column_sums, width, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        const Tiles tiles;
        Sum* local = nullptr;
        guard([&] { local = workspace<Sum>(kSlotPanels, block * kPanel * kPanel); });
        for (int64_t first = 0; first < steps; first += chunk) {
            const int64_t last = std::min(first + chunk, steps);
            pack_all_a(guard, a_kind, p, first, last, a, panel_bytes);
            pack_all_b(guard, b_kind, p, first, last, b, panel_bytes);
            if (zero.b) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < row_panels; m++)
                    add_row_sums(a + m * panel_bytes, (last - first) * 4, p.a_along ? kTiles : across_tiling(),
                                 row_sums + m * kPanel);
            }
            if (zero.a) {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < column_panels; n++)
                    add_column_sums(b_kind, b + n * panel_bytes, (last - first) * 4, kPanel, kTiles,
                                    column_sums + n * kPanel);
            }
            const auto work = [&](int64_t task) {
                const int64_t top = task / splits * block, bottom = std::min(top + block, row_panels);
                const int64_t begin = task % splits * column_panels / splits;
                const int64_t end = (task % splits + 1) * column_panels / splits;
                for (int64_t n = begin; n < end; n++) {
                    const uint8_t* right = b + n * panel_bytes;
                    if (once) {
                        multiply_panels(a_kind, p, a + top * panel_bytes, right, steps, bottom - top, panel_bytes,
                                        p.n - n * kPanel, local);
                        for (int64_t m = top; m < bottom; m++)
                            finish_panel(p, local + (m - top) * kPanel * kPanel, kPanel, zero, m, n,
                                         row_sums + m * kPanel, column_sums + n * kPanel);
                        continue;
                    }
                    const auto multiply = packed_multiplier(a_kind, p, p.n - n * kPanel);
                    for (int64_t m = top; m < bottom; m++)
                        multiply(a + m * panel_bytes, {last - first}, right, c + m * kPanel * width + n * kPanel, width,
                                 first > 0);
                }
            };
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < blocks * splits; task++) guard([&] { work(task); });
        }
        if (!once) {
#pragma omp for schedule(static) nowait
            for (int64_t m = 0; m < row_panels; m++)
                for (int64_t n = 0; n < column_panels; n++)
                    finish_panel(p, c + m * kPanel * width + n * kPanel, width, zero, m, n, row_sums + m * kPanel,
                                 column_sums + n * kPanel);
        }
    }
    guard.rethrow();
}

template <class Kind>
void multiply(const Product& p) {
    if (p.m == 0 || p.n == 0) return;
    if (p.k > 4 * std::max(p.m, p.n) || !p.a_along)
        multiply_long<Kind>(p);
    else
        multiply_tall<Kind>(p);
}

}  // namespace

void multiply_codes(const Product& p) {
    if (!convolve_codes(p)) multiply<Codes>(p);
}
void multiply_halves(const Product& p) {
    if (!convolve_halves(p)) multiply<Halves>(p);
}

}  // namespace lowbit
