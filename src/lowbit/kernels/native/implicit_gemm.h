// Implicit GEMM: convolutions, and gradients of their inputs, whose lhs is never unfolded.
//
// The taps of one row of the kernel lie side by side in an image with its padding written out, and the next position
// begins a few bytes on: micro-kernels read overlapping rows of the im2col matrix in place. A row of taps, a *line*, is
// padded to whole steps with zeros of the rhs, so what is read beyond a line does not count. Layers with less than a
// picture row to a panel, and those that `implicit_gemms` turns down, go through im2col in gemm.h.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
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

// Along one axis: which taps reach the pixels that are computed together, and which pixels these are.
//
// Taps of a transposed convolution of stride s reach each pixel y from (y + padding - tap) / s, where that is whole. So
// the pixels of one phase, y = phase + s i, see every s-th tap, at stride 1: s * s convolutions of fewer taps.
struct Axis {
    int64_t first_tap, tap_step, taps;        // of the whole kernel
    int64_t padding, stride;                  // before the first pixel that is read; pixels between two positions
    int64_t dilation;                         // pixels between two taps
    int64_t start, position_step, positions;  // the first, the distance to the next, how many

    int64_t field() const { return taps ? (taps - 1) * dilation + 1 : 1; }  // pixels that one position reaches
    int64_t pixels() const { return (positions - 1) * stride + field(); }
};

inline Axis axis_of(const Window& w, int axis, int64_t phase) {
    const int64_t taps = w.kernel[axis], stride = w.stride[axis], dilation = w.dilation[axis];
    const int64_t size = w.position[axis + 1];
    if (!w.transposed) return {0, 1, taps, w.padding[axis], stride, dilation, 0, 1, size};
    if (stride == 1) return {0, 1, taps, dilation * (taps - 1) - w.padding[axis], 1, dilation, 0, 1, size};
    const int64_t first = (phase + w.padding[axis]) % stride;
    const int64_t count = first < taps ? (taps - 1 - first) / stride + 1 : 0;
    const int64_t last = (phase + w.padding[axis] - first) / stride;  // where the first tap reaches from pixel `phase`
    const int64_t positions = phase < size ? (size - 1 - phase) / stride + 1 : 0;
    return {first, stride, count, count - 1 - last, 1, 1, phase, stride, positions};
}

struct ImplicitGemm {
    Axis h, w;
    int64_t line, steps;  // numbers of a line; its steps
    int64_t samples;
    bool flip;  // lines and taps run backwards

    // Number i of line l as a depth of the rhs; -1 beyond the line.
    int64_t depth_of(const Window& window, int64_t l, int64_t i) const {
        if (i >= line) return -1;
        const int64_t j = i / window.channels;
        const int64_t row = h.first_tap + h.tap_step * (flip ? h.taps - 1 - l : l);
        const int64_t tap = w.first_tap + w.tap_step * (flip ? w.taps - 1 - j : j);
        return (row * window.kernel[2] + tap) * window.channels + i % window.channels;
    }
};

// A product as implicit GEMMs, one for each phase; none where it cannot be computed so, or is faster through im2col.
template <class Kind>
std::vector<ImplicitGemm> implicit_gemms(const Product& p) {
    constexpr int64_t size = sizeof(typename Kind::Number);
    constexpr bool floats = std::is_same_v<typename Kind::Accumulator, float>;
    if (p.lhs.order == Order::depth_major || !p.lhs.window || p.m == 0 || p.n == 0) return {};
    const Window& w = *p.lhs.window;
    if (w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return {};
    const bool strided = w.stride[1] > 1 || w.stride[2] > 1;
    if (w.dilation[2] != 1 || (strided && w.dilation[1] != 1)) return {};
    if (w.position[3] < 8 || (w.kernel[1] * w.kernel[2] == 1 && !strided)) return {};
    if (w.transposed == (p.rhs.order == Order::width_major)) return {};  // taps that run backwards are depth-major
    if (Kind(p.rhs, false).zero_point != 0) return {};                   // it takes sums over overlapping rows
    std::vector<ImplicitGemm> phases;
    for (int64_t i = 0; i < (w.transposed ? w.stride[1] : 1); i++)
        for (int64_t j = 0; j < (w.transposed ? w.stride[2] : 1); j++) {
            ImplicitGemm d{axis_of(w, 1, i), axis_of(w, 2, j), 0, 0, w.position[0], w.transposed};
            d.line = d.w.taps * w.channels;
            d.steps = steps_of<Kind>(d.line);
            if (floats && d.line * size % kStep) return {};  // 0 times nan is not 0
            // The smallest piece of an image stays in a core's cache.
            if (static_cast<double>(d.h.field()) * static_cast<double>(d.w.pixels()) * static_cast<double>(w.channels) >
                2 * kCache / size)
                return {};
            if (d.h.positions && d.w.positions) phases.push_back(d);
        }
    return phases;
}

// An rhs panel of a width-major side, line after line.
template <class Isa, class Kind>
void pack_rhs_lines(const Kind& kind, const Product& p, const ImplicitGemm& d, int64_t panel, uint8_t* to) {
    constexpr int64_t per_step = kPerStep<Kind>;
    for (int64_t l = 0; l < d.h.taps; l++)
        for (int64_t begin = 0; begin < d.line; begin += per_step, to += kPanelStep)
            pack_rhs_step<Isa>(kind, p, panel, l * d.line + begin, std::min(per_step, d.line - begin), to);
}

// All positions of rows [first, last) of one sample by one rhs panel, at most an lhs panel at a time. `image` begins
// where row `first` reaches.
template <class Isa, class Kind>
void multiply_image(const Product& p, const ImplicitGemm& d, Extent extent, int64_t sample, int64_t first, int64_t last,
                    const typename Kind::Number* image, const uint8_t* rhs, int64_t panel, const int32_t* rhs_sums,
                    ZeroPoints zero) {
    const Window& w = *p.lhs.window;
    const int64_t pixels = d.w.pixels(), columns = p.n - panel * kNr;
    const int32_t no_sums[kMr] = {};
    alignas(64) typename Kind::Accumulator c[kMr * kNr];
    // Where positions follow each other as pixels do, a panel may go on in the next row: it computes the pixels
    // between.
    const bool goes_on = d.h.stride == 1 && d.w.stride == 1 && pixels < round_up(d.w.positions, Isa::kLeastRows);
    for (int64_t row = first, x = 0; row < last;) {
        const auto* from = image + ((row - first) * d.h.stride * pixels + x * d.w.stride) * w.channels;
        const int64_t rest = goes_on ? (last - 1 - row) * pixels + d.w.positions - x : d.w.positions - x;
        extent.rows = std::min(kMr, round_up(rest, Isa::kLeastRows));
        const auto kernel = Isa::template kernel<Kind, LhsLayout::in_place, true>(columns, extent.rows);
        kernel(reinterpret_cast<const uint8_t*>(from), extent, rhs, c, kNr, false);
        for (int64_t i = 0; i < extent.rows && row < last;) {
            const int64_t count = std::min(extent.rows - i, d.w.positions - x);
            const int64_t y = sample * w.position[2] + d.h.start + row * d.h.position_step;
            finish_rows<Isa>(p, c + i * kNr, kNr, zero, y * w.position[3] + d.w.start + x * d.w.position_step,
                             d.w.position_step, count, panel, no_sums, rhs_sums);
            x += count;
            i += count + pixels - d.w.positions;
            if (x < d.w.positions) break;
            x = 0;
            row++;
            if (!goes_on) break;
        }
    }
}

template <class Isa, class Kind>
void multiply_implicit(const Product& p, const ImplicitGemm& d) {
    using Number = typename Kind::Number;
    constexpr int64_t size = sizeof(Number), per_step = kPerStep<Kind>;
    const Window& w = *p.lhs.window;
    const Kind lhs_kind(p.lhs, true), rhs_kind(p.rhs, false);
    const int64_t steps = d.h.taps * d.steps, rhs_panels = ceil_div(p.n, kNr), pixels = d.w.pixels();
    const int64_t panel_bytes = steps * kPanelStep, row_bytes = pixels * w.channels * size;
    const ZeroPoints zero{zero_points(p, lhs_kind, rhs_kind).lhs, 0, 0};
    // A task is a run of rows of one sample whose image stays in a core's own cache.
    const int64_t fitting = std::max<int64_t>(1, (kCache / 4 / row_bytes - d.h.field()) / d.h.stride + 1);
    const int64_t block = std::min(d.h.positions, fitting), blocks = ceil_div(d.h.positions, block);
    const int64_t image_numbers = ((block - 1) * d.h.stride + d.h.field()) * pixels * w.channels;
    const int64_t slack = kMr * d.w.stride * w.channels + d.steps * per_step;
    const int64_t next = d.w.stride * w.channels * size;  // bytes from one position to the next
    const int64_t whole = d.line * size / kStep, quarters = ceil_div(d.line * size % kStep, kStep / 4);
    const Strides of_image{next, 16 * next, kBlocked.group, kStep, d.h.dilation * row_bytes};
    const Extent extent{whole, d.h.taps, of_image, kBlocked, quarters};
    auto* rhs = workspace<uint8_t>(Slot::packed_rhs, rhs_panels * panel_bytes);
    auto* rhs_sums = workspace<int32_t>(Slot::rhs_sums, rhs_panels * kNr);
    std::fill_n(rhs_sums, rhs_panels * kNr, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        if (p.rhs.order == Order::width_major) {
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < rhs_panels; n++) pack_rhs_lines<Isa>(rhs_kind, p, d, n, rhs + n * panel_bytes);
        } else {
            std::optional<DepthMajorBuffers<Kind>> buffers;
            guard([&] { buffers.emplace(p.n); });
            const int64_t in_line = d.steps * per_step;
            const auto row_of = [&](int64_t k) { return d.depth_of(w, k / in_line, k % in_line); };
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < steps; s++)
                guard([&] {
                    pack_rhs_step_of_all<Isa>(rhs_kind, p, row_of, s, rhs + s * kPanelStep, panel_bytes, *buffers);
                });
        }
        if (zero.lhs) sum_rhs_panels<Isa>(rhs, rhs_panels, panel_bytes, steps, rhs_sums);
        [[maybe_unused]] const typename Isa::Session session{};
        Number* image = nullptr;
        guard([&] { image = workspace<Number>(Slot::image, image_numbers + slack); });
        const auto work = [&](int64_t task) {
            const int64_t sample = task / blocks, first = task % blocks * block;
            const int64_t last = std::min(first + block, d.h.positions);
            pad_image(lhs_kind, p.lhs, w.channels, w.channels, pixels, {d.h.padding, d.w.padding}, sample,
                      first * d.h.stride, (last - 1 - first) * d.h.stride + d.h.field(), image);
            for (int64_t n = 0; n < rhs_panels; n++)
                multiply_image<Isa, Kind>(p, d, extent, sample, first, last, image, rhs + n * panel_bytes, n,
                                          rhs_sums + n * kNr, zero);
        };
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < d.samples * blocks; task++) guard([&] { work(task); });
    }
    guard.rethrow();
}

// False, and nothing done, where the product is none of this file's.
template <class Isa, class Kind>
bool convolve(const Product& p) {
    const auto phases = implicit_gemms<Kind>(p);
    for (const ImplicitGemm& phase : phases) multiply_implicit<Isa, Kind>(p, phase);
    return !phases.empty();
}

}  // namespace
}  // namespace lowbit
