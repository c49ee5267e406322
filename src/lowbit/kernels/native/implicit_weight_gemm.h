// Implicit GEMM for the gradient of a convolution's weight: the image is the rhs, and its depth are the positions.
//
// The operand of a tap is the padded image shifted by whole pixels. So the image is put into groups of depth once from
// each of the first pixels, and every tap reads one of these in place. A strided convolution has an image for each
// phase, which some of the taps read. Vectors go from one row of positions to the next (a *line*), tiles through all
// pixels; those that are not positions hold real zeros of the lhs.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "epilogue.h"
#include "gemm.h"
#include "image.h"
#include "layout.h"
#include "operand.h"
#include "pack.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

namespace lowbit {
namespace {

// Along both axes: the taps that read one image.
struct WeightPhase {
    int64_t first_tap[2], tap_step[2], taps[2];
    int64_t dilation[2];  // pixels of the image between two taps
    Sampling image;
};

struct ImplicitWeightGemm {
    std::vector<WeightPhase> phases;
    std::vector<int64_t> block_of_tap;  // the first block of 16 columns of each tap
    int64_t in_pixel, channels;         // numbers of a pixel, or of a row of taps; padded to whole blocks
    int64_t pixels, halo;               // of the padded image's width; rows beyond those of the positions
    int64_t rows, width, samples;       // positions
    int64_t rows_of_task;               // of positions
    int64_t column_blocks, sums;        // blocks of 16 columns; accumulators of a group of samples
    int64_t groups;                     // of samples, each summed in its order, whatever the number of threads
    int64_t lines, quarters, steps;     // of depth of a task; quarters of steps of a line; steps of all lines
    int64_t row_depth;                  // depth from one row of positions to the next
    Strides lhs;                        // of the packed lhs, line after line

    int64_t blocks_of_tap() const { return channels / 16; }
    int64_t c_stride() const { return ceil_div(column_blocks, 2) * kNr; }
};

// Few channels at stride 1: a row of taps lies side by side, and is taken as the channels of one tap.
inline bool joins_taps(const Window& w) {
    return w.kernel[2] > 1 && w.kernel[2] * w.channels <= 16 && w.stride[1] == 1 && w.stride[2] == 1 &&
           w.dilation[2] == 1;
}

// Whether implicit GEMM can compute the product, and is faster than im2col.
template <class Kind>
bool fits_implicit_weight_gemm(const Product& p) {
    constexpr int64_t in_group = Kind::in_group;
    if (p.lhs.order == Order::width_major || p.rhs.order == Order::width_major || !p.rhs.window || p.lhs.window ||
        p.lhs.fold || p.m == 0 || p.n == 0)
        return false;
    const Window& w = *p.rhs.window;
    if (w.transposed || w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.position[3] < 8 || w.position[2] * w.position[3] < 16 * in_group * in_group) return false;  // too few to sum
    if ((w.stride[1] > 1 && w.dilation[1] > 1) || (w.stride[2] > 1 && w.dilation[2] > 1)) return false;
    const bool strided = w.stride[1] * w.stride[2] > 1;
    return strided ? w.channels <= 16 : w.kernel[1] * w.kernel[2] != 1;
}

// The taps of phase (i, j) of the image along both axes; no taps along one of them where none reads it.
inline WeightPhase weight_phase(const Window& w, int64_t i, int64_t j, const int64_t (&taps)[2]) {
    const int64_t start[] = {i, j}, stride[] = {w.stride[1], w.stride[2]};
    WeightPhase phase{};
    int64_t before[2];
    for (int axis = 0; axis < 2; axis++) {
        const int64_t padding = w.padding[axis + 1], s = stride[axis];
        phase.first_tap[axis] = ((start[axis] + padding) % s + s) % s;  // a run of positions may begin inside
        phase.tap_step[axis] = s;
        phase.taps[axis] = phase.first_tap[axis] < taps[axis] ? (taps[axis] - 1 - phase.first_tap[axis]) / s + 1 : 0;
        phase.dilation[axis] = s > 1 ? 1 : w.dilation[axis + 1];
        before[axis] = (start[axis] + padding - phase.first_tap[axis]) / s;
    }
    phase.image = {before[0], before[1], i, j, stride[0], stride[1]};
    return phase;
}

template <class Isa, class Kind>
std::optional<ImplicitWeightGemm> implicit_weight_gemm(const Product& p) {
    if (!fits_implicit_weight_gemm<Kind>(p)) return {};
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group, size = sizeof(typename Kind::Number);
    const Window& w = *p.rhs.window;
    const bool joined = joins_taps(w);
    const int64_t taps[] = {w.kernel[1], joined ? 1 : w.kernel[2]};
    ImplicitWeightGemm d;
    d.in_pixel = joined ? w.kernel[2] * w.channels : w.channels;
    d.channels = round_up(d.in_pixel, 16);
    d.column_blocks = taps[0] * taps[1] * d.blocks_of_tap();
    d.rows = w.position[2], d.width = w.position[3], d.samples = w.position[0];
    d.sums = round_up(p.m, Isa::kLeastRows) * d.c_stride();
    if (d.sums * in_group > 1 << 19) return {};  // they should stay in a core's own cache
    d.block_of_tap.assign(taps[0] * taps[1], 0);
    d.pixels = d.width, d.halo = 0;
    int64_t block = 0;
    for (int64_t i = 0; i < w.stride[1]; i++)
        for (int64_t j = 0; j < w.stride[2]; j++) {
            const WeightPhase phase = weight_phase(w, i, j, taps);
            if (phase.taps[0] == 0 || phase.taps[1] == 0) continue;
            for (int64_t t = 0; t < phase.taps[0]; t++)
                for (int64_t u = 0; u < phase.taps[1]; u++, block += d.blocks_of_tap())
                    d.block_of_tap[(phase.first_tap[0] + t * w.stride[1]) * taps[1] + phase.first_tap[1] +
                                   u * w.stride[2]] = block;
            d.halo = std::max(d.halo, (phase.taps[0] - 1) * phase.dilation[0]);
            d.pixels = std::max(d.pixels, d.width + (phase.taps[1] - 1) * phase.dilation[1]);
            d.phases.push_back(phase);
        }
    d.pixels = round_up(d.pixels, in_group);
    const double padded =
        static_cast<double>(1 + d.halo) * static_cast<double>(d.pixels) * static_cast<double>(d.channels);
    if (padded > kCache / size) return {};  // and so should the smallest piece of an image
    const int64_t row_bytes = d.pixels * d.channels * size;
    d.rows_of_task = std::min(d.rows, std::max<int64_t>(1, kCache / 2 / row_bytes - d.halo));
    if constexpr (Isa::kTiles) {
        d.lines = 1, d.steps = ceil_div(d.rows_of_task * d.pixels, in_step);
        d.quarters = d.steps * 4, d.row_depth = d.pixels;
    } else {
        d.lines = d.rows_of_task, d.quarters = ceil_div(d.width, in_step / 4);
        d.steps = ceil_div(d.lines * d.quarters, 4), d.row_depth = d.quarters * in_step / 4;
        d.lhs = kDepthMajor;
        d.lhs.line = d.quarters * 4 * kDepthMajor.group;
    }
    d.groups = std::min<int64_t>(d.samples, std::clamp<int64_t>((1 << 20) / d.sums, 4, 16));
    return d;
}

// The padded image of a phase; where taps are joined each pixel holds the numbers of a whole row of taps.
template <class Kind>
void pad_phase(const Kind& kind, const Product& p, const ImplicitWeightGemm& d, const WeightPhase& phase,
               int64_t sample, int64_t first, int64_t count, typename Kind::Number* to) {
    const Window& w = *p.rhs.window;
    if (!joins_taps(w)) {
        pad_image(kind, p.rhs, w.channels, d.channels, d.pixels, phase.image, sample, first, count, to);
        return;
    }
    const int64_t pixels = d.pixels + w.kernel[2] - 1;
    auto* narrow = workspace<typename Kind::Number>(Slot::kernel_row, count * pixels * w.channels);
    pad_image(kind, p.rhs, w.channels, w.channels, pixels, phase.image, sample, first, count, narrow);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < d.pixels; j++, to += d.channels) {
            std::memcpy(to, narrow + (i * pixels + j) * w.channels, d.in_pixel * sizeof(*to));
            std::fill(to + d.in_pixel, to + d.channels, kind.padding());
        }
}

// An image of so many pixels in groups of depth, once from each of its first `in_group` pixels, `grouped` groups each.
// Channels are whole blocks: a constant width leaves the vectors without a tail.
template <class Isa, class Kind>
void group_image(const typename Kind::Number* image, int64_t pixels, int64_t channels, int64_t grouped,
                 uint32_t* groups) {
    constexpr int64_t in_group = Kind::in_group;
    for (int64_t pixel = 0; pixel < in_group; pixel++)
        for (int64_t i = 0; i < (pixels - pixel) / in_group; i++)
            for (int64_t c = 0; c < channels; c += 16)
                Isa::interleave(image + (in_group * i + pixel) * channels + c, channels, 16,
                                groups + pixel * grouped + i * channels + c);
}

// Sums of the taps of one phase and task, `lines` lines of depth: `lhs` packed, `image` in groups from each of the
// first pixels, `grouped` groups each.
template <class Isa, class Kind>
void multiply_phase(const Product& p, const ImplicitWeightGemm& d, const WeightPhase& phase, const uint8_t* lhs,
                    int64_t lines, int64_t panel_bytes, const uint32_t* image, int64_t grouped, ZeroPoints zero,
                    bool add, typename Kind::Accumulator* c, int32_t* rhs_sums) {
    constexpr int64_t in_group = Kind::in_group;
    const Window& w = *p.rhs.window;
    const int64_t c_stride = d.c_stride(), of_tap = d.blocks_of_tap(), taps = joins_taps(w) ? 1 : w.kernel[2];
    const int64_t blocks = phase.taps[0] * phase.taps[1] * of_tap;
    const int64_t row_groups = d.pixels / in_group * d.channels;
    const int64_t begin = d.block_of_tap[phase.first_tap[0] * taps + phase.first_tap[1]];
    const auto address = [&](int64_t block, int64_t line) {
        const int64_t tap = block / of_tap, channel = block % of_tap * 16;
        const int64_t pixel =
            tap / phase.taps[1] * phase.dilation[0] * d.pixels + tap % phase.taps[1] * phase.dilation[1];
        const auto* to =
            image + pixel % in_group * grouped + pixel / in_group * d.channels + channel + line * row_groups;
        return reinterpret_cast<const uint8_t*>(to);
    };
    // So many lines at a time that their blocks stay in the first-level cache.
    const int64_t together = std::max<int64_t>(1, 96 / d.quarters);
    for (int64_t first = 0; first < lines; first += together, add = true) {
        const int64_t now = std::min(together, lines - first);
        for (int64_t n = 0; n < blocks; n += 2) {
            const uint8_t* rhs = address(n, first);
            const int64_t columns = n + 1 < blocks ? kNr : 16, at_column = (begin + n) * 16;
            const int64_t half = columns > 16 ? address(n + 1, first) - rhs : 0;
            const Strides of_rhs{d.channels * 4, half, 0, d.channels * 64, row_groups * 4};
            Extent extent{d.quarters / 4, now, d.lhs, of_rhs, d.quarters % 4};
            for (int64_t l = 0; l < (zero.lhs ? now : 0); l++)
                Isa::add_rhs_sums(rhs + l * of_rhs.line, d.quarters, columns, of_rhs, rhs_sums + at_column);
            for (int64_t m = 0; m < ceil_div(p.m, kMr); m++) {
                extent.rows = std::min(kMr, round_up(p.m - m * kMr, Isa::kLeastRows));
                const auto kernel = Isa::template kernel<Kind, LhsLayout::depth_major, false>(columns, extent.rows);
                kernel(lhs + m * panel_bytes + first * d.lhs.line, extent, rhs, c + m * kMr * c_stride + at_column,
                       c_stride, add);
            }
        }
    }
}

inline void add_to(float& sum, float more) { sum += more; }
inline void add_to(int32_t& sum, int32_t more) {  // wraps: the result without the zero points fits
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(more));
}

// Row m of the result before its scales: the sums of all groups of samples, `of_group` numbers apart.
template <class Kind>
void add_groups(const Product& p, const ImplicitWeightGemm& d, const typename Kind::Accumulator* all, int64_t of_group,
                ZeroPoints zero, int64_t m, float* to) {
    using Accumulator = typename Kind::Accumulator;
    const int64_t width = d.c_stride(), lhs_sums = d.sums, rhs_sums = d.sums + ceil_div(p.m, kMr) * kMr;
    auto* sums = workspace<Accumulator>(Slot::kernel_row, 2 * width);
    auto* columns = reinterpret_cast<int32_t*>(sums + width);
    std::fill_n(sums, 2 * width, Accumulator{0});
    int32_t row = 0;
    for (int64_t group = 0; group < d.groups; group++) {
        const Accumulator* from = all + group * of_group;
        const auto* codes = reinterpret_cast<const int32_t*>(from);
        for (int64_t n = 0; n < width; n++) add_to(sums[n], from[m * width + n]);
        for (int64_t n = 0; n < (zero.lhs ? width : 0); n++) add_to(columns[n], codes[rhs_sums + n]);
        add_to(row, codes[lhs_sums + m]);
    }
    for (int64_t tap = 0; tap * d.in_pixel < p.n; tap++)
        subtract_zero_points(sums + d.block_of_tap[tap] * 16, zero, row, columns + d.block_of_tap[tap] * 16, d.in_pixel,
                             to + tap * d.in_pixel);
}

// False, and nothing written, where a sum is not finite: pixels that are not positions hold zeros of the lhs, and 0
// times nan would spread it to taps that never see it.
template <class Isa, class Kind>
bool multiply_implicit_weight(const Product& p, const ImplicitWeightGemm& d) {
    using Number = typename Kind::Number;
    using Accumulator = typename Kind::Accumulator;
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group;
    const Kind lhs_kind(p.lhs, true), rhs_kind(p.rhs, false);
    const int64_t panels = ceil_div(p.m, kMr), width = d.c_stride();
    const int64_t blocks = ceil_div(d.rows, d.rows_of_task), panel_bytes = d.steps * kPanelStep;
    // Pixels that the last tap of the last line reads.
    const int64_t last = (d.lines - 1 + d.halo) * d.pixels + d.quarters * in_step / 4 + d.pixels;
    const int64_t image_pixels = last / in_group * in_group + in_group;
    const int64_t grouped = image_pixels / in_group * d.channels;  // groups from one of the first pixels
    ZeroPoints zero = zero_points(p, lhs_kind, rhs_kind);
    const int64_t lines = d.lines == 1 ? blocks : d.rows;  // of depth of a sample, with the pixels between positions
    zero.depth = static_cast<uint32_t>(d.samples * lines * d.quarters * in_step / 4);
    // Of each group of samples: sums, then those of the codes of its rows and columns.
    const int64_t of_group = d.sums + panels * kMr + width;
    auto* all = workspace<Accumulator>(Slot::accumulators, d.groups * of_group);
    auto* total = workspace<float>(Slot::panel, p.m * p.n);
    bool finite = true;
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        [[maybe_unused]] const typename Isa::Session session{};
        std::optional<DepthMajorBuffers<Kind>> buffers;
        uint8_t* lhs = nullptr;
        Number* image = nullptr;
        uint32_t* all_groups = nullptr;
        guard([&] {
            buffers.emplace(p.m);
            lhs = workspace<uint8_t>(Slot::packed_lhs, panels * panel_bytes);
            image = workspace<Number>(Slot::image, image_pixels * d.channels);
            all_groups = workspace<uint32_t>(Slot::grouped_image, in_group * grouped);
        });
        const auto work = [&](int64_t group) {
            Accumulator* c = all + group * of_group;
            auto* lhs_sums = reinterpret_cast<int32_t*>(c + d.sums);
            auto* rhs_sums = lhs_sums + panels * kMr;
            std::fill_n(lhs_sums, panels * kMr + width, 0);
            const int64_t from = group * d.samples / d.groups, until = (group + 1) * d.samples / d.groups;
            for (int64_t task = from * blocks; task < until * blocks; task++) {
                const int64_t sample = task / blocks, first = task % blocks * d.rows_of_task;
                const int64_t count = std::min(d.rows_of_task, d.rows - first), now = std::min(d.lines, count);
                const auto row_of = [&](int64_t k) {
                    const int64_t row = k / d.row_depth, pixel = k % d.row_depth;
                    return row < count && pixel < d.width ? (sample * d.rows + first + row) * d.width + pixel : -1;
                };
                for (int64_t s = 0; s < d.steps; s++)
                    pack_lhs_step_of_all<Isa>(lhs_kind, p, row_of, lhs_kind.padding(), s, lhs, panel_bytes, *buffers);
                for (int64_t m = 0; m < (zero.rhs ? panels : 0); m++)
                    Isa::add_lhs_sums(lhs + m * panel_bytes, now * d.quarters, d.lhs, lhs_sums + m * kMr);
                for (const WeightPhase& phase : d.phases) {
                    const int64_t held = (count + d.halo) * d.pixels;  // zeros after it
                    pad_phase(rhs_kind, p, d, phase, sample, first, count + d.halo, image);
                    std::fill(image + held * d.channels, image + image_pixels * d.channels, Number{0});
                    group_image<Isa, Kind>(image, image_pixels, d.channels, grouped, all_groups);
                    multiply_phase<Isa, Kind>(p, d, phase, lhs, now, panel_bytes, all_groups, grouped, zero,
                                              task > from * blocks, c, rhs_sums);
                }
            }
        };
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < d.groups; group++) guard([&] { work(group); });
#pragma omp for schedule(static) reduction(&& : finite)
        for (int64_t m = 0; m < p.m; m++) {
            guard([&] { add_groups<Kind>(p, d, all, of_group, zero, m, total + m * p.n); });
            for (int64_t n = 0; n < p.n; n++) finite = finite && std::isfinite(total[m * p.n + n]);
        }
#pragma omp for schedule(static) nowait
        for (int64_t m = 0; m < (finite ? p.m : 0); m++)
            for (int64_t n = 0; n < p.n; n += kNr)
                scale_and_store(p, m, n, std::min(kNr, p.n - n), total + m * p.n + n);
    }
    guard.rethrow();
    return finite;
}

// False, and nothing done, where the product is none of this file's.
template <class Isa, class Kind>
bool convolve_weight(const Product& p) {
    const auto gemm = implicit_weight_gemm<Isa, Kind>(p);
    return gemm && multiply_implicit_weight<Isa, Kind>(p, *gemm);
}

}  // namespace
}  // namespace lowbit
