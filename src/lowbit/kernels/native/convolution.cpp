// Convolutions whose rows are read where they lie, for layers of one picture row or more to a panel; others go through
// windows in gemm.cpp.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "panels.h"

namespace lowbit {
namespace {

// Along one axis: which taps reach the places that are computed together, and which places these are.
//
// Taps of a transposed convolution of stride s reach each place y from (y + padding - tap) / s, where that is whole. So
// the places of one phase, y = phase + s i, see every s-th tap, at stride 1: s * s convolutions of fewer taps.
struct Reach {
    int64_t first, step, taps;  // the taps, as taps of the whole kernel
    int64_t padding, stride;    // before the first place that is read; between the places of two positions
    int64_t dilation;           // between the places of two taps
    int64_t start, skip, size;  // positions: the first, the distance to the next, how many

    int64_t span() const { return taps ? (taps - 1) * dilation + 1 : 1; }  // places that one position reaches
    int64_t places() const { return (size - 1) * stride + span(); }
};

Reach reach_of(const Window& w, int axis, int64_t phase) {
    const int64_t taps = w.kernel[axis], stride = w.stride[axis], dilation = w.dilation[axis];
    const int64_t size = w.position[axis + 1];
    if (!w.transposed) return {0, 1, taps, w.padding[axis], stride, dilation, 0, 1, size};
    if (stride == 1) return {0, 1, taps, dilation * (taps - 1) - w.padding[axis], 1, dilation, 0, 1, size};
    const int64_t first = (phase + w.padding[axis]) % stride;
    const int64_t count = first < taps ? (taps - 1 - first) / stride + 1 : 0;
    const int64_t last = (phase + w.padding[axis] - first) / stride;  // where the first tap reaches from place `phase`
    return {first,
            stride,
            count,
            count - 1 - last,
            1,
            1,
            phase,
            stride,
            phase < size ? (size - 1 - phase) / stride + 1 : 0};
}

// The taps of one line of the kernel lie side by side in an image with its padding written out, and the next position
// begins a few bytes on: the multipliers read overlapping rows, and nothing is unfolded. A line of taps is padded to
// whole steps with zeros of B, so what a row reads beyond its line does not count.
struct Direct {
    Reach h, w;
    int64_t line, steps;  // numbers of a line; its steps
    int64_t samples;
    bool flip;  // lines and taps run backwards

    // Number i of line l as a number of k; -1 beyond the line.
    int64_t k_of(const Window& window, int64_t l, int64_t i) const {
        if (i >= line) return -1;
        const int64_t j = i / window.channels;
        const int64_t row = h.first + h.step * (flip ? h.taps - 1 - l : l);
        const int64_t place = w.first + w.step * (flip ? w.taps - 1 - j : j);
        return (row * window.kernel[2] + place) * window.channels + i % window.channels;
    }
};

// The phases of a product that can be computed so; none where it cannot.
template <class Kind>
std::vector<Direct> direct_phases(const Product& p) {
    constexpr int64_t size = sizeof(typename Kind::Number);
    if (!p.a_along || !p.a.window || p.m == 0 || p.n == 0) return {};
    const Window& w = *p.a.window;
    if (w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return {};
    const bool strided = w.stride[1] > 1 || w.stride[2] > 1;
    if (w.dilation[2] != 1 || (strided && w.dilation[1] != 1)) return {};
    if (w.position[3] < 8 || (w.kernel[1] * w.kernel[2] == 1 && !strided)) return {};
    if (w.transposed == p.b_along) return {};  // taps that run backwards lie across
    if (Kind(p.b, false).zero != 0) return {};
    std::vector<Direct> phases;
    for (int64_t i = 0; i < (w.transposed ? w.stride[1] : 1); i++)
        for (int64_t j = 0; j < (w.transposed ? w.stride[2] : 1); j++) {
            Direct d{reach_of(w, 1, i), reach_of(w, 2, j), 0, 0, w.position[0], w.transposed};
            d.line = d.w.taps * w.channels;
            d.steps = ceil_div(d.line * size, kStep);
            if (size > 1 && d.line * size % kStep) return {};  // 0 times nan is no 0
            // The smallest piece of an image stays in a core's cache.
            if (static_cast<double>(d.h.span()) * static_cast<double>(d.w.places()) * static_cast<double>(w.channels) >
                2 * kCache / size)
                return {};
            if (d.h.size && d.w.size) phases.push_back(d);
        }
    return phases;
}

// Every `step`-th row and place of an image from one on, with places outside it around: what lies at row and place 0 is
// `above` rows and `before` places from the first (less than 0 leaves some out).
struct Sampling {
    int64_t above, before, row = 0, place = 0, row_step = 1, place_step = 1;
};

// Rows [first, first + count) of one sample's padded image, `places` wide, each place padded to `channels` numbers.
template <class Kind>
void pad_image(const Kind& kind, const Rows& rows, int64_t of_place, int64_t channels, int64_t places,
               const Sampling& at, int64_t sample, int64_t first, int64_t count, typename Kind::Number* to) {
    const Window& w = *rows.window;
    const int64_t size = bytes_of(rows.type), height = w.size[1];
    const int64_t width = (w.size[2] - at.place + at.place_step - 1) / at.place_step;
    const int64_t left = std::clamp<int64_t>(at.before, 0, places), out = std::max<int64_t>(-at.before, 0);
    const int64_t inside = std::clamp<int64_t>(places - left, 0, std::max<int64_t>(width - out, 0));
    for (int64_t i = 0; i < count; i++, to += places * channels) {
        const int64_t h = (first - at.above + i) * at.row_step + at.row;
        if (h < 0 || h >= height) {
            std::fill_n(to, places * channels, kind.outside());
            continue;
        }
        std::fill_n(to, left * channels, kind.outside());
        const auto* from = static_cast<const uint8_t*>(rows.data) +
                           ((sample * height + h) * w.size[2] + out * at.place_step + at.place) * rows.stride * size;
        if (rows.stride == channels && of_place == channels && at.place_step == 1)
            kind.load(rows, from, 0, inside * channels, to + left * channels);
        else
            for (int64_t j = 0; j < inside; j++) {
                auto* place = to + (left + j) * channels;
                kind.load(rows, from, j * at.place_step * rows.stride, of_place, place);
                std::fill(place + of_place, place + channels, kind.outside());
            }
        std::fill(to + (left + inside) * channels, to + places * channels, kind.outside());
    }
}

// Panel `panel` of B whose rows run along k, line after line.
template <class Kind>
void pack_b_lines(const Kind& kind, const Product& p, const Direct& d, int64_t panel, uint8_t* to) {
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(typename Kind::Number));
    for (int64_t l = 0; l < d.h.taps; l++)
        for (int64_t begin = 0; begin < d.line; begin += per_step, to += 2 * kTile)
            pack_b_step(kind, p, panel, l * d.line + begin, std::min(per_step, d.line - begin), to);
}

// The positions of a run of rows [first, last) of one sample, a panel or less at a time. `image` begins where row
// `first` reaches.
template <class Kind>
void multiply_image(const Kind& kind, const Product& p, const Direct& d, Path at, int64_t sample, int64_t first,
                    int64_t last, const typename Kind::Number* image, const uint8_t* b, int64_t panel,
                    const int32_t* column_sums, Zero zero) {
    const Window& w = *p.a.window;
    const int64_t places = d.w.places(), left = p.n - panel * kPanel;
    const int32_t no_sums[kPanel] = {};
    alignas(64) typename Kind::Sum c[kPanel * kPanel];
    // Where positions follow each other as places do, a panel may go on in the next row: it computes the places
    // between.
    const bool goes_on = d.h.stride == 1 && d.w.stride == 1 && places < whole_grains(d.w.size);
    for (int64_t row = first, x = 0; row < last;) {
        const auto* from = image + ((row - first) * d.h.stride * places + x * d.w.stride) * w.channels;
        const int64_t rest = goes_on ? (last - 1 - row) * places + d.w.size - x : d.w.size - x;
        at.rows = std::min(kPanel, whole_grains(rest));
        multiplier<Lie::anywhere, true>(kind, left, at.rows)(reinterpret_cast<const uint8_t*>(from), at, b, c, kPanel,
                                                             false);
        for (int64_t i = 0; i < at.rows && row < last;) {
            const int64_t count = std::min(at.rows - i, d.w.size - x);
            const int64_t y = sample * w.position[2] + d.h.start + row * d.h.skip;
            finish_rows(p, c + i * kPanel, kPanel, zero, y * w.position[3] + d.w.start + x * d.w.skip, d.w.skip, count,
                        panel, no_sums, column_sums);
            x += count;
            i += count + places - d.w.size;
            if (x < d.w.size) break;
            x = 0;
            row++;
            if (!goes_on) break;
        }
    }
}

template <class Kind>
void multiply_direct(const Product& p, const Direct& d) {
    using Number = typename Kind::Number;
    constexpr int64_t size = sizeof(Number), per_step = kStep / size;
    const Window& w = *p.a.window;
    const Kind a_kind(p.a, true), b_kind(p.b, false);
    const int64_t steps = d.h.taps * d.steps, column_panels = ceil_div(p.n, kPanel), places = d.w.places();
    const int64_t panel_bytes = steps * 2 * kTile, row_bytes = places * w.channels * size;
    const Zero zero{static_cast<uint32_t>(zero_of(p, a_kind, b_kind).a), 0, 0};
    // A task is a run of rows of one sample whose image stays in a core's own cache.
    const int64_t fitting = std::max<int64_t>(1, (kCache / 4 / row_bytes - d.h.span()) / d.h.stride + 1);
    const int64_t block = std::min(d.h.size, fitting), blocks = ceil_div(d.h.size, block);
    const int64_t image = ((block - 1) * d.h.stride + d.h.span()) * places * w.channels;
    const int64_t slack = kPanel * d.w.stride * w.channels + d.steps * per_step;
    const int64_t next = d.w.stride * w.channels * size;  // bytes from one position to the next
    const int64_t whole = d.line * size / kStep, quarters = ceil_div(d.line * size % kStep, kStep / 4);
    const Path at{whole, d.h.taps, {next, 16 * next, kTiles.group, kStep, d.h.dilation * row_bytes}, kTiles, quarters};
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, column_panels * kPanel);
    std::fill_n(column_sums, column_panels * kPanel, 0);
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        if (p.b_along) {
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < column_panels; n++) pack_b_lines(b_kind, p, d, n, b + n * panel_bytes);
        } else {
            std::optional<Across<Kind>> across;
            guard([&] { across.emplace(p.n); });
            const auto row_of = [&](int64_t k) {
                return d.k_of(w, k / (d.steps * per_step), k % (d.steps * per_step));
            };
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < steps; s++)
                guard([&] { pack_b_across(b_kind, p, row_of, s, b + s * 2 * kTile, panel_bytes, *across); });
        }
        if (zero.a) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < column_panels; n++)
                add_column_sums(b_kind, b + n * panel_bytes, steps * 4, kPanel, kTiles, column_sums + n * kPanel);
        }
        const Tiles tiles;
        Number* a = nullptr;
        guard([&] { a = workspace<Number>(kSlotA, image + slack); });
        const auto work = [&](int64_t task) {
            const int64_t sample = task / blocks, first = task % blocks * block;
            const int64_t last = std::min(first + block, d.h.size);
            pad_image(a_kind, p.a, w.channels, w.channels, places, {d.h.padding, d.w.padding}, sample,
                      first * d.h.stride, (last - 1 - first) * d.h.stride + d.h.span(), a);
            for (int64_t n = 0; n < column_panels; n++)
                multiply_image(a_kind, p, d, at, sample, first, last, a, b + n * panel_bytes, n,
                               column_sums + n * kPanel, zero);
        };
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < d.samples * blocks; task++) guard([&] { work(task); });
    }
    guard.rethrow();
}

// The gradient of a weight likewise: a tap's operand is the padded image shifted by whole places, so the image is put
// in groups of k once from each of the first places, and every tap reads one of these. Of a strided convolution each
// phase of the image is one for itself, which some of the taps read. Vectors go from one row of positions to the next,
// tiles through all places; those that are no positions hold real zeros of A.
struct Phase {
    int64_t first[2], step[2], taps[2];  // along both axes: the taps that read it
    int64_t apart[2];                    // places between two taps
    Sampling image;
};
struct DirectWeight {
    std::vector<Phase> phases;
    std::vector<int64_t> tile_of;    // of each tap: its first tile of 16 columns
    int64_t of_place, channels;      // numbers of a place, the taps of a line where they are few; padded to whole tiles
    int64_t places, halo;            // of the padded image's width; rows beyond the positions'
    int64_t rows, width, samples;    // positions
    int64_t block;                   // rows of positions of one task
    int64_t columns, sums;           // tiles of 16 columns; sums of a group of samples
    int64_t groups;                  // of samples, each summed in its order, whatever the number of threads
    int64_t lines, quarters, steps;  // of k of a task; quarters of steps of a line; steps of all lines
    int64_t of_row;                  // numbers of k from one row of positions to the next
    Tiling a;                        // where packed A lies, line after line

    int64_t tiles_of_place() const { return channels / 16; }
};

// Few channels of a line of taps at stride 1: they lie side by side, and are taken as the channels of one tap.
bool takes_lines(const Window& w) {
    return w.kernel[2] > 1 && w.kernel[2] * w.channels <= 16 && w.stride[1] == 1 && w.stride[2] == 1 &&
           w.dilation[2] == 1;
}

template <class Kind>
bool direct_weight_fits(const Product& p, DirectWeight* d) {
    if (p.a_along || p.b_along || !p.b.window || p.a.window || p.a.fold || p.m == 0 || p.n == 0) return false;
    const Window& w = *p.b.window;
    if (w.transposed || w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.position[3] < 8 || w.position[2] * w.position[3] < 16 * Kind::in_group * Kind::in_group)
        return false;  // few positions to a sum: unfolding is faster
    const int64_t stride[] = {w.stride[1], w.stride[2]}, dilation[] = {w.dilation[1], w.dilation[2]};
    if ((stride[0] > 1 && dilation[0] > 1) || (stride[1] > 1 && dilation[1] > 1)) return false;
    const bool strided = stride[0] * stride[1] > 1;
    if (strided ? w.channels > 16 : w.kernel[1] * w.kernel[2] == 1) return false;
    const bool lines = takes_lines(w);
    const int64_t taps[] = {w.kernel[1], lines ? 1 : w.kernel[2]};
    d->of_place = lines ? w.kernel[2] * w.channels : w.channels;
    d->channels = ceil_div(d->of_place, 16) * 16;
    d->columns = taps[0] * taps[1] * d->tiles_of_place();
    d->rows = w.position[2], d->width = w.position[3], d->samples = w.position[0];
    d->sums = whole_grains(p.m) * ceil_div(d->columns, 2) * kPanel;
    if (d->sums * Kind::in_group > 1 << 19) return false;  // they should stay in a core's own cache
    d->tile_of.assign(taps[0] * taps[1], 0);
    d->places = d->width, d->halo = 0;
    int64_t tile = 0;
    for (int64_t i = 0; i < stride[0]; i++)
        for (int64_t j = 0; j < stride[1]; j++) {
            const int64_t start[] = {i, j};
            Phase phase{};
            int64_t before[2];
            for (int axis = 0; axis < 2; axis++) {
                const int64_t padding = w.padding[axis + 1], s = stride[axis];
                phase.first[axis] = ((start[axis] + padding) % s + s) % s;  // a run of positions may begin inside
                phase.step[axis] = s;
                phase.taps[axis] = phase.first[axis] < taps[axis] ? (taps[axis] - 1 - phase.first[axis]) / s + 1 : 0;
                phase.apart[axis] = s > 1 ? 1 : dilation[axis];
                before[axis] = (start[axis] + padding - phase.first[axis]) / s;
            }
            if (phase.taps[0] == 0 || phase.taps[1] == 0) continue;
            phase.image = {before[0], before[1], i, j, stride[0], stride[1]};
            for (int64_t t = 0; t < phase.taps[0]; t++)
                for (int64_t u = 0; u < phase.taps[1]; u++, tile += d->tiles_of_place())
                    d->tile_of[(phase.first[0] + t * stride[0]) * taps[1] + phase.first[1] + u * stride[1]] = tile;
            d->halo = std::max(d->halo, (phase.taps[0] - 1) * phase.apart[0]);
            d->places = std::max(d->places, d->width + (phase.taps[1] - 1) * phase.apart[1]);
            d->phases.push_back(phase);
        }
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group, size = sizeof(typename Kind::Number);
    d->places = ceil_div(d->places, in_group) * in_group;
    const double padded =
        static_cast<double>(1 + d->halo) * static_cast<double>(d->places) * static_cast<double>(d->channels);
    if (padded > kCache / size) return false;  // and so should the smallest piece of an image
    const int64_t row_bytes = d->places * d->channels * size;
    d->block = std::min(d->rows, std::max<int64_t>(1, kCache / 2 / row_bytes - d->halo));
    if (machine().amx) {
        d->lines = 1, d->steps = ceil_div(d->block * d->places, in_step);
        d->quarters = d->steps * 4, d->of_row = d->places;
    } else {
        d->lines = d->block, d->quarters = ceil_div(d->width, in_step / 4);
        d->steps = ceil_div(d->lines * d->quarters, 4), d->of_row = d->quarters * in_step / 4;
        d->a = kGroups;
        d->a.line = d->quarters * 4 * kGroups.group;
    }
    d->groups = std::min<int64_t>(d->samples, std::clamp<int64_t>((1 << 20) / d->sums, 4, 16));
    return true;
}

// The padded image of a phase; with lines each place holds the numbers of a whole line of taps.
template <class Kind>
void pad_phase(const Kind& kind, const Product& p, const DirectWeight& d, const Phase& phase, int64_t sample,
               int64_t first, int64_t count, typename Kind::Number* to) {
    const Window& w = *p.b.window;
    if (!takes_lines(w)) {
        pad_image(kind, p.b, w.channels, d.channels, d.places, phase.image, sample, first, count, to);
        return;
    }
    const int64_t places = d.places + w.kernel[2] - 1;
    auto* narrow = workspace<typename Kind::Number>(kSlotLines, count * places * w.channels);
    pad_image(kind, p.b, w.channels, w.channels, places, phase.image, sample, first, count, narrow);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < d.places; j++, to += d.channels) {
            std::memcpy(to, narrow + (i * places + j) * w.channels, d.of_place * sizeof(*to));
            std::fill(to + d.of_place, to + d.channels, kind.outside());
        }
}

inline void add_to(float& sum, float more) { sum += more; }
inline void add_to(int32_t& sum, int32_t more) {  // wraps: the result without the zero points fits
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(more));
}

// Sums of the taps of one task, `lines` lines of k: `a` packed, the image in groups from each place.
template <class Kind>
void multiply_phase(const Kind& a_kind, const Kind& b_kind, const Product& p, const DirectWeight& d, const Phase& phase,
                    const uint8_t* a, int64_t lines, int64_t panel_bytes, const uint32_t* groups, int64_t grouped,
                    Zero zero, bool add, typename Kind::Sum* c, int32_t* column_sums) {
    constexpr int64_t in_group = Kind::in_group;
    const int64_t width = ceil_div(d.columns, 2) * kPanel, tiles = d.tiles_of_place();
    const int64_t count = phase.taps[0] * phase.taps[1] * tiles;
    const int64_t row_groups = d.places / in_group * d.channels;
    const int64_t begin =
        d.tile_of[phase.first[0] * (takes_lines(*p.b.window) ? 1 : p.b.window->kernel[2]) + phase.first[1]];
    const auto address = [&](int64_t tile, int64_t line) {
        const int64_t tap = tile / tiles, channel = tile % tiles * 16;
        const int64_t place = tap / phase.taps[1] * phase.apart[0] * d.places + tap % phase.taps[1] * phase.apart[1];
        const auto* to =
            groups + place % in_group * grouped + place / in_group * d.channels + channel + line * row_groups;
        return reinterpret_cast<const uint8_t*>(to);
    };
    // So many lines at a time that their tiles stay in the first-level cache.
    const int64_t together = std::max<int64_t>(1, 96 / d.quarters);
    for (int64_t first = 0; first < lines; first += together, add = true) {
        const int64_t now = std::min(together, lines - first);
        for (int64_t n = 0; n < count; n += 2) {
            const uint8_t* b = address(n, first);
            const int64_t columns = n + 1 < count ? kPanel : 16, at_column = (begin + n) * 16;
            const int64_t second = columns > 16 ? address(n + 1, first) - b : 0;
            const Tiling of_b{d.channels * 4, second, 0, d.channels * 64, row_groups * 4};
            Path at{d.quarters / 4, now, d.a, of_b, d.quarters % 4};
            for (int64_t l = 0; l < (zero.a ? now : 0); l++)
                add_column_sums(b_kind, b + l * of_b.line, d.quarters, columns, of_b, column_sums + at_column);
            for (int64_t m = 0; m < ceil_div(p.m, kPanel); m++) {
                at.rows = std::min(kPanel, whole_grains(p.m - m * kPanel));
                multiplier<Lie::groups, false>(a_kind, columns, at.rows)(
                    a + m * panel_bytes + first * d.a.line, at, b, c + m * kPanel * width + at_column, width, add);
            }
        }
    }
}

// Row m of the result before its scales: the sums of all groups of samples, `of_group` numbers apart.
template <class Kind>
void add_groups(const Product& p, const DirectWeight& d, const typename Kind::Sum* all, int64_t of_group, Zero zero,
                int64_t m, float* to) {
    using Sum = typename Kind::Sum;
    const int64_t width = ceil_div(d.columns, 2) * kPanel, row_sums = d.sums,
                  column_sums = d.sums + ceil_div(p.m, kPanel) * kPanel;
    auto* sums = workspace<Sum>(kSlotLines, 2 * width);
    auto* columns = reinterpret_cast<int32_t*>(sums + width);
    std::fill_n(sums, 2 * width, Sum{0});
    int32_t row = 0;
    for (int64_t group = 0; group < d.groups; group++) {
        const Sum* from = all + group * of_group;
        const auto* codes = reinterpret_cast<const int32_t*>(from);
        for (int64_t n = 0; n < width; n++) add_to(sums[n], from[m * width + n]);
        for (int64_t n = 0; n < (zero.a ? width : 0); n++) add_to(columns[n], codes[column_sums + n]);
        add_to(row, codes[row_sums + m]);
    }
    for (int64_t tap = 0; tap * d.of_place < p.n; tap++)
        correct(sums + d.tile_of[tap] * 16, zero, row, columns + d.tile_of[tap] * 16, d.of_place,
                to + tap * d.of_place);
}

// False, and nothing written, where a sum is not finite: places that are no positions hold zeros of A, and 0 times nan
// would spread it to taps that never see it.
template <class Kind>
bool multiply_direct_weight(const Product& p, const DirectWeight& d) {
    using Number = typename Kind::Number;
    using Sum = typename Kind::Sum;
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group;
    const Kind a_kind(p.a, true), b_kind(p.b, false);
    const int64_t panels = ceil_div(p.m, kPanel), width = ceil_div(d.columns, 2) * kPanel;
    const int64_t blocks = ceil_div(d.rows, d.block), panel_bytes = d.steps * 2 * kTile;
    // Places that the last tap of the last line reads.
    const int64_t last = (d.lines - 1 + d.halo) * d.places + d.quarters * in_step / 4 + d.places;
    const int64_t image = last / in_group * in_group + in_group;
    const int64_t grouped = image / in_group * d.channels;  // groups from one of the first places
    Zero zero = zero_of(p, a_kind, b_kind);
    const int64_t lines = d.lines == 1 ? blocks : d.rows;  // of k of a sample, with the places that are no positions
    zero.k = static_cast<uint32_t>(d.samples * lines * d.quarters * in_step / 4);
    // Of each group of samples: sums, then those of the codes of its rows and columns.
    const int64_t of_group = d.sums + panels * kPanel + width;
    auto* all = workspace<Sum>(kSlotSums, d.groups * of_group);
    auto* total = workspace<float>(kSlotPanels, p.m * p.n);
    bool finite = true;
    Guard guard;
#pragma omp parallel if (worth_threads(p))
    {
        const Tiles tiles;
        std::optional<Across<Kind>> across;
        uint8_t* a = nullptr;
        Number* x = nullptr;
        uint32_t* all_groups = nullptr;
        guard([&] {
            across.emplace(p.m);
            a = workspace<uint8_t>(kSlotA, panels * panel_bytes);
            x = workspace<Number>(kSlotImage, image * d.channels);
            all_groups = workspace<uint32_t>(kSlotPairs, in_group * grouped);
        });
        const auto work = [&](int64_t group) {
            Sum* c = all + group * of_group;
            auto* row_sums = reinterpret_cast<int32_t*>(c + d.sums);
            auto* column_sums = row_sums + panels * kPanel;
            std::fill_n(row_sums, panels * kPanel + width, 0);
            const int64_t from = group * d.samples / d.groups, until = (group + 1) * d.samples / d.groups;
            for (int64_t task = from * blocks; task < until * blocks; task++) {
                const int64_t sample = task / blocks, first = task % blocks * d.block;
                const int64_t count = std::min(d.block, d.rows - first), now = std::min(d.lines, count);
                const auto row_of = [&](int64_t k) {
                    const int64_t row = k / d.of_row, place = k % d.of_row;
                    return row < count && place < d.width ? (sample * d.rows + first + row) * d.width + place : -1;
                };
                for (int64_t s = 0; s < d.steps; s++)
                    pack_a_across(a_kind, p, row_of, a_kind.outside(), s, a, panel_bytes, *across);
                for (int64_t m = 0; m < (zero.b ? panels : 0); m++)
                    add_row_sums(a + m * panel_bytes, now * d.quarters, d.a, row_sums + m * kPanel);
                for (const Phase& phase : d.phases) {
                    const int64_t held = (count + d.halo) * d.places;  // zeros after it
                    pad_phase(b_kind, p, d, phase, sample, first, count + d.halo, x);
                    std::fill(x + held * d.channels, x + image * d.channels, Number{0});
                    for (int64_t place = 0; place < in_group; place++)
                        for (int64_t i = 0; i < (image - place) / in_group; i++)
                            interleave(x + (in_group * i + place) * d.channels, d.channels, d.channels,
                                       all_groups + place * grouped + i * d.channels);
                    multiply_phase(a_kind, b_kind, p, d, phase, a, now, panel_bytes, all_groups, grouped, zero,
                                   task > from * blocks, c, column_sums);
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
            for (int64_t n = 0; n < p.n; n += kPanel) finish(p, m, n, std::min(kPanel, p.n - n), total + m * p.n + n);
    }
    guard.rethrow();
    return finite;
}

template <class Kind>
bool convolve(const Product& p) {
    const auto phases = direct_phases<Kind>(p);
    for (const Direct& phase : phases) multiply_direct<Kind>(p, phase);
    return !phases.empty();
}

template <class Kind>
bool convolve_weight(const Product& p) {
    DirectWeight direct;
    return direct_weight_fits<Kind>(p, &direct) && multiply_direct_weight<Kind>(p, direct);
}

}  // namespace

bool convolve_codes(const Product& p) {
    return convolve<Codes>(p) || (SignedCodes::fits(p) ? convolve_weight<SignedCodes>(p) : convolve_weight<Codes>(p));
}
bool convolve_halves(const Product& p) { return convolve<Halves>(p) || convolve_weight<Halves>(p); }

}  // namespace lowbit
