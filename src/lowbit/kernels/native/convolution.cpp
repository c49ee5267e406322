// Convolutions whose rows are read where they lie, for layers of one picture row or more to a panel; others go through
// windows in gemm.cpp.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "panels.h"

namespace lowbit {
namespace {

// The taps of one line of the kernel lie side by side in an image with its padding written out, and the next position
// begins a few bytes on: the multipliers read overlapping rows, and nothing is unfolded. A line of taps is padded to
// whole steps with zeros of B, so what a row reads beyond its line does not count.
struct Direct {
    int64_t places, halo;                // of the padded image's width; its rows that one position reaches
    int64_t padding[2], step[2];         // before the first row and place; between positions
    int64_t line, steps;                 // numbers of a line; its steps
    int64_t rows, width, samples;        // positions
    bool flip;                           // lines and taps run backwards

    // Number i of line l as a number of k; -1 beyond the line.
    int64_t k_of(const Window& w, int64_t l, int64_t i) const {
        if (i >= line) return -1;
        const int64_t tap = l * w.kernel[2] + i / w.channels, all = w.kernel[1] * w.kernel[2];
        return (flip ? all - 1 - tap : tap) * w.channels + i % w.channels;
    }
};

// Whether a product can be computed so, and how.
template <class Kind>
bool direct_fits(const Product& p, Direct* d) {
    constexpr int64_t size = sizeof(typename Kind::Number);
    if (!p.a_along || !p.a.window || p.m == 0 || p.n == 0) return false;
    const Window& w = *p.a.window;
    if (w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.dilation[2] != 1 || w.kernel[2] < 2 || w.position[3] < 8) return false;
    if (w.transposed == p.b_along) return false;  // taps that run backwards lie across
    if (w.transposed && (w.stride[1] != 1 || w.stride[2] != 1)) return false;
    if (Kind(p.b, false).zero != 0) return false;
    d->flip = w.transposed;
    for (int axis = 0; axis < 2; axis++) {
        const int64_t reach = w.dilation[axis + 1] * (w.kernel[axis + 1] - 1);
        d->padding[axis] = w.transposed ? reach - w.padding[axis + 1] : w.padding[axis + 1];
        d->step[axis] = w.transposed ? 1 : w.stride[axis + 1];
        if (d->padding[axis] < 0) return false;
    }
    d->line = w.kernel[2] * w.channels;
    d->steps = ceil_div(d->line * size, kStep);
    if (size > 1 && d->line * size % kStep) return false;  // 0 times nan is no 0
    d->rows = w.position[2], d->width = w.position[3], d->samples = w.position[0];
    d->places = (d->width - 1) * d->step[1] + w.kernel[2];
    d->halo = (w.kernel[1] - 1) * w.dilation[1] + 1;
    return d->halo * d->places * w.channels * size <= 2 * kCache;  // the smallest piece of an image stays in a core's cache
}

// Rows [first, first + count) of one sample's padded image, `places` wide, each place padded to `channels` numbers.
template <class Kind>
void pad_image(const Kind& kind, const Rows& rows, int64_t of_place, int64_t channels, int64_t places,
               const int64_t* padding, int64_t sample, int64_t first, int64_t count, typename Kind::Number* to) {
    const Window& w = *rows.window;
    const int64_t size = bytes_of(rows.type), height = w.size[1], width = w.size[2];
    const int64_t left = std::min(padding[1], places), inside = std::clamp<int64_t>(places - left, 0, width);
    for (int64_t i = 0; i < count; i++, to += places * channels) {
        const int64_t h = first - padding[0] + i;
        if (h < 0 || h >= height) {
            std::fill_n(to, places * channels, kind.outside());
            continue;
        }
        std::fill_n(to, left * channels, kind.outside());
        const auto* from = static_cast<const uint8_t*>(rows.data) + (sample * height + h) * width * rows.stride * size;
        if (rows.stride == channels && of_place == channels)
            kind.load(rows, from, 0, inside * channels, to + left * channels);
        else
            for (int64_t j = 0; j < inside; j++) {
                auto* place = to + (left + j) * channels;
                kind.load(rows, from, j * rows.stride, of_place, place);
                std::fill(place + of_place, place + channels, kind.outside());
            }
        std::fill(to + (left + inside) * channels, to + places * channels, kind.outside());
    }
}

// Panel `panel` of B whose rows run along k, line after line.
template <class Kind>
void pack_b_lines(const Kind& kind, const Product& p, const Direct& d, int64_t panel, uint8_t* to) {
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(typename Kind::Number));
    for (int64_t l = 0; l < p.a.window->kernel[1]; l++)
        for (int64_t begin = 0; begin < d.line; begin += per_step, to += 2 * kTile)
            pack_b_step(kind, p, panel, l * d.line + begin, std::min(per_step, d.line - begin), to);
}

template <class Kind>
void multiply_direct(const Product& p, const Direct& d) {
    using Sum = typename Kind::Sum;
    using Number = typename Kind::Number;
    constexpr int64_t size = sizeof(Number), per_step = kStep / size;
    const Window& w = *p.a.window;
    const Kind a_kind(p.a, true), b_kind(p.b, false);
    const int64_t lines = w.kernel[1], steps = lines * d.steps, column_panels = ceil_div(p.n, kPanel);
    const int64_t panel_bytes = steps * 2 * kTile, row_bytes = d.places * w.channels * size;
    const Zero zero{static_cast<uint32_t>(zero_of(p, a_kind, b_kind).a), 0, 0};
    // A task is a run of rows of one sample whose image stays in a core's own cache.
    const int64_t fitting = std::max<int64_t>(1, (kCache / 4 / row_bytes - d.halo) / d.step[0] + 1);
    const int64_t block = std::min(d.rows, fitting), blocks = ceil_div(d.rows, block);
    const int64_t image = ((block - 1) * d.step[0] + d.halo) * d.places * w.channels;
    const int64_t slack = kPanel * d.step[1] * w.channels + d.steps * per_step;
    const int64_t next = d.step[1] * w.channels * size;  // bytes from one position to the next
    const Path at{d.steps, lines, {next, 16 * next, kStep, w.dilation[1] * row_bytes}};
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, column_panels * kPanel);
    std::fill_n(column_sums, column_panels * kPanel, 0);
    const int32_t no_sums[kPanel] = {};
#pragma omp parallel if (worth_threads(p))
    {
        if (p.b_along) {
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < column_panels; n++) pack_b_lines(b_kind, p, d, n, b + n * panel_bytes);
        } else {
            Across<Kind> across(p.n);
            const auto row_of = [&](int64_t k) { return d.k_of(w, k / (d.steps * per_step), k % (d.steps * per_step)); };
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < steps; s++)
                pack_b_across(b_kind, p, row_of, s, b + s * 2 * kTile, panel_bytes, across.groups, across.scratch);
        }
        if (zero.a) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < column_panels; n++)
                add_column_sums(b + n * panel_bytes, steps, column_sums + n * kPanel);
        }
        const Tiles tiles;
        auto* a = workspace<Number>(kSlotA, image + slack);
        alignas(64) Sum c[kPanel * kPanel];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < d.samples * blocks; task++) {
            const int64_t sample = task / blocks, first = task % blocks * block;
            const int64_t last = std::min(first + block, d.rows);
            pad_image(a_kind, p.a, w.channels, w.channels, d.places, d.padding, sample, first * d.step[0],
                      (last - 1 - first) * d.step[0] + d.halo, a);
            for (int64_t n = 0; n < column_panels; n++) {
                const auto multiply = multiplier(a_kind, p.n - n * kPanel, false);
                for (int64_t row = first, x = 0; row < last;) {
                    const Number* from = a + ((row - first) * d.step[0] * d.places + x * d.step[1]) * w.channels;
                    multiply(reinterpret_cast<const uint8_t*>(from), at, b + n * panel_bytes, c, kPanel, false);
                    // Where positions follow each other as places do, a panel goes on in the next row.
                    const bool goes_on = d.step[0] == 1 && d.step[1] == 1;
                    for (int64_t i = 0; i < kPanel && row < last;) {
                        const int64_t count = std::min(kPanel - i, d.width - x);
                        const int64_t m = (sample * d.rows + row) * d.width + x;
                        finish_rows(p, c + i * kPanel, kPanel, zero, m, count, n, no_sums, column_sums + n * kPanel);
                        x += count;
                        i += count + d.places - d.width;
                        if (x < d.width) break;
                        x = 0;
                        row++;
                        if (!goes_on) break;
                    }
                }
            }
        }
    }
}

// The gradient of a weight likewise: a tap's operand is the padded image shifted by whole places, so the image is put
// in groups of k once from each of the first places, and every tap reads one of these. Places that are no positions hold
// zeros of A. For kinds whose zero is 0.
struct DirectWeight {
    int64_t places, padding[2];      // of the padded image's width; before its first row and place
    int64_t channels;                // of a place, padded to whole tiles
    int64_t rows, width, samples;    // positions
    int64_t halo, columns, sums;     // rows beyond the positions'; tiles of 16 columns; sums of a group of samples
    int64_t groups;                  // of samples, each summed in its order, whatever the number of threads
};

bool direct_weight_fits(const Product& p, DirectWeight* d) {
    if (p.a_along || p.b_along || !p.b.window || p.a.window || p.a.fold || p.m == 0 || p.n == 0) return false;
    const Window& w = *p.b.window;
    if (w.transposed || w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.stride[1] != 1 || w.stride[2] != 1 || w.position[3] < 8 || w.padding[1] < 0 || w.padding[2] < 0) return false;
    const int64_t taps = w.kernel[1] * w.kernel[2];
    if (taps == 1) return false;
    d->channels = ceil_div(w.channels, 16) * 16;
    d->columns = taps * d->channels / 16;
    d->padding[0] = w.padding[1], d->padding[1] = w.padding[2];
    d->rows = w.position[2], d->width = w.position[3], d->samples = w.position[0];
    d->places = d->width + (w.kernel[2] - 1) * w.dilation[2];
    d->halo = (w.kernel[1] - 1) * w.dilation[1];
    d->sums = ceil_div(p.m, kPanel) * kPanel * ceil_div(d->columns, 2) * kPanel;
    if (d->sums > 1 << 18) return false;  // they should stay in a core's own cache
    if ((1 + d->halo) * d->places * d->channels * 2 > kCache) return false;  // and so should the smallest piece of an image
    d->groups = std::min<int64_t>(d->samples, std::clamp<int64_t>((1 << 20) / d->sums, 4, 16));
    return true;
}

// False, and nothing written, where a sum is not finite: places that are no positions hold zeros of A, and 0 times nan
// would spread it to taps that never see it.
template <class Kind>
bool multiply_direct_weight(const Product& p, const DirectWeight& d) {
    using Number = typename Kind::Number;
    using Sum = typename Kind::Sum;
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group;
    const Kind kind(p.a, true);
    const Window& w = *p.b.window;
    const int64_t panels = ceil_div(p.m, kPanel), width = ceil_div(d.columns, 2) * kPanel;
    const int64_t row_bytes = d.places * d.channels * static_cast<int64_t>(sizeof(Number));
    const int64_t fitting = std::max<int64_t>(1, kCache / 2 / row_bytes - d.halo);
    const int64_t block = std::min(d.rows, fitting), blocks = ceil_div(d.rows, block);
    const int64_t steps = ceil_div(block * d.places, in_step);
    const int64_t panel_bytes = steps * 2 * kTile;
    const int64_t reach = d.halo * d.places + (w.kernel[2] - 1) * w.dilation[2];  // of the last tap
    const int64_t image = steps * in_step + reach + in_group;  // places
    const int64_t grouped = image / in_group * d.channels;     // groups from one of the first places
    auto* all = workspace<Sum>(kSlotSums, d.groups * d.sums);
#pragma omp parallel if (worth_threads(p))
    {
        const Tiles tiles;
        Across<Kind> across(p.m);
        auto* a = workspace<uint8_t>(kSlotA, panels * panel_bytes);
        auto* x = workspace<Number>(kSlotImage, image * d.channels);
        auto* all_groups = workspace<uint32_t>(kSlotPairs, in_group * grouped);
        const auto address = [&](int64_t column) {
            const int64_t tap = column / (d.channels / 16), channel = column % (d.channels / 16) * 16;
            const int64_t place = tap / w.kernel[2] * w.dilation[1] * d.places + tap % w.kernel[2] * w.dilation[2];
            return reinterpret_cast<const uint8_t*>(all_groups + place % in_group * grouped + place / in_group * d.channels + channel);
        };
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < d.groups; group++) {
            Sum* c = all + group * d.sums;
            bool add = false;
            const int64_t from = group * d.samples / d.groups, until = (group + 1) * d.samples / d.groups;
            for (int64_t task = from * blocks; task < until * blocks; task++, add = true) {
                const int64_t sample = task / blocks, first = task % blocks * block;
                const int64_t count = std::min(block, d.rows - first);
                // The image, and zeros after it.
                const int64_t held = (count + d.halo) * d.places;
                pad_image(kind, p.b, w.channels, d.channels, d.places, d.padding, sample, first, count + d.halo, x);
                std::fill(x + held * d.channels, x + image * d.channels, Number{0});
                for (int64_t place = 0; place < in_group; place++)
                    for (int64_t i = 0; i < (image - place) / in_group; i++)
                        interleave(x + (in_group * i + place) * d.channels, d.channels, d.channels,
                                   all_groups + place * grouped + i * d.channels);
                const auto row_of = [&](int64_t k) {
                    const int64_t row = k / d.places, place = k % d.places;
                    return row < count && place < d.width ? (sample * d.rows + first + row) * d.width + place : -1;
                };
                for (int64_t s = 0; s < steps; s++)
                    pack_a_across(kind, p, row_of, s, a + s * 2 * kTile, panel_bytes, across.groups, across.scratch);
                for (int64_t m = 0; m < panels; m++)
                    for (int64_t n = 0; n < d.columns; n += 2) {
                        const uint8_t* b = address(n);
                        const bool both = n + 1 < d.columns;
                        const Path at{steps, 1, {}, {d.channels * 4, both ? address(n + 1) - b : 0, d.channels * 64}};
                        multiplier(kind, both ? kPanel : 16, false)(a + m * panel_bytes, at, b,
                                                             c + m * kPanel * width + n * 16, width, add);
                    }
            }
        }
    }
    std::vector<float> total(p.m * p.n);
    bool finite = true;
    for (int64_t m = 0; m < p.m; m++)
        for (int64_t n = 0; n < p.n; n++) {
            const int64_t at = m * width + n / w.channels * d.channels + n % w.channels;
            Sum sum = all[at];
            for (int64_t group = 1; group < d.groups; group++) sum += all[group * d.sums + at];
            total[m * p.n + n] = static_cast<float>(sum);
            finite = finite && std::isfinite(static_cast<float>(sum));
        }
    if (!finite) return false;
    for (int64_t m = 0; m < p.m; m++)
        for (int64_t n = 0; n < p.n; n += kPanel)
            finish(p, m, n, std::min(kPanel, p.n - n), total.data() + m * p.n + n);
    return true;
}

template <class Kind>
bool convolve(const Product& p) {
    Direct direct;
    if (!direct_fits<Kind>(p, &direct)) return false;
    multiply_direct<Kind>(p, direct);
    return true;
}

template <class Kind>
bool convolve_weight(const Product& p) {
    DirectWeight direct;
    return direct_weight_fits(p, &direct) && multiply_direct_weight<Kind>(p, direct);
}

}  // namespace

bool convolve_codes(const Product& p) {
    return convolve<Codes>(p) || (SignedCodes::fits(p) && convolve_weight<SignedCodes>(p));
}
bool convolve_halves(const Product& p) { return convolve<Halves>(p) || convolve_weight<Halves>(p); }

}  // namespace lowbit
