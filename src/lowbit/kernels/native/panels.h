// What products of codes on 8-bit units and of bf16 values on 16-bit units are made of: pack, multiply in tiles, scale.
//
// Both kinds share everything but the innermost instruction. A number of k is kept in 32-bit groups: four codes or two
// halves. Packed A is tiles of 16 rows by 16 groups and packed B tiles of 16 groups by 16 columns, two tiles to a
// panel and step, as the tile units read them. One call of a multiplier computes 32 rows by 32 columns.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>

#include "cpu.h"

namespace lowbit {
constexpr int64_t kPanel = 32;         // rows or columns of one multiplication
constexpr int64_t kStep = 64;          // bytes of k in one step
constexpr int64_t kTile = 16 * 64;     // bytes of a tile
constexpr double kAlone = 1 << 21;     // multiplications for which waking other threads costs more than it gains
constexpr int64_t kCache = 512 << 10;  // bytes of packed rows that stay in a core's own cache

// Memory that a thread keeps from one product to the next: fresh memory of this size costs more than packing does.
// Slots are numbered so that what lives at the same time does not share one.
enum Slot {
    kSlotA,
    kSlotB,
    kSlotSums,
    kSlotRowSums,
    kSlotColumnSums,
    kSlotGroups,
    kSlotScratch,
    kSlotImage,
    kSlotLines,
    kSlotPairs,
    kSlotPanels,
    kSlots
};

template <class T>
T* workspace(Slot slot, int64_t count) {
    struct Block {
        void* p = nullptr;
        size_t bytes = 0;
        ~Block() { std::free(p); }
    };
    static thread_local Block blocks[kSlots];
    Block& block = blocks[slot];
#ifdef LOWBIT_SANITIZE
    // Fresh, of the very size, and full of nan or of large numbers: what is read before or beyond it shows.
    constexpr size_t whole = 1;
    block.bytes = 0;
#else
    constexpr size_t whole = 64;
#endif
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + whole + whole - 1) / whole * whole;
    if (block.bytes < bytes) {
        std::free(block.p);
        block.bytes = 0;
        if (posix_memalign(&block.p, 64, bytes)) {
            block.p = nullptr;
            throw std::bad_alloc();
        }
        block.bytes = bytes;
#ifdef LOWBIT_SANITIZE
        std::memset(block.p, 0xFF, bytes);
#endif
    }
    return static_cast<T*>(block.p);
}

inline bool worth_threads(const Product& p) {
    return static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) > kAlone;
}

// ---- rows in the packed type ----

// Of a whole number of 8 bits and a sign, which bf16 holds.
inline uint16_t exact_bf16(int32_t q) {
    const float f = static_cast<float>(q);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
}

// Codes: bytes, unsigned on the left of a product and signed on its right.
struct Codes {
    using Number = uint8_t;
    using Sum = int32_t;
    static constexpr int64_t in_group = 4;
    uint8_t flip;  // 0x80 turns a signed code into an unsigned one and back
    int zero;      // of the packed codes

    Codes(const Rows& rows, bool left) {
        const bool is_signed = rows.type == Type::s8;
        flip = is_signed == left ? 0x80 : 0;
        zero = rows.zero + (flip ? (left ? 128 : -128) : 0);
    }
    void load(const Rows&, const void* from, int64_t first, int64_t count, Number* to) const {
        const uint8_t* q = static_cast<const uint8_t*>(from) + first;
        if (!flip) {
            std::memcpy(to, q, count);
            return;
        }
        for (int64_t i = 0; i < count; i++) to[i] = q[i] ^ 0x80;
    }
    Number outside() const { return static_cast<Number>(zero); }
    // Whether groups of numbers as they lie in memory become those of `load` by exchanging the bits of `flipped`.
    bool lie_so(const Rows&) const { return true; }
    uint32_t flipped() const { return flip * 0x01010101u; }
};

// Codes that are signed and have no zero point, on both sides of a product: tile units take them as they are.
struct SignedCodes {
    using Number = uint8_t;
    using Sum = int32_t;
    static constexpr int64_t in_group = 4;

    SignedCodes(const Rows&, bool) {}
    void load(const Rows&, const void* from, int64_t first, int64_t count, Number* to) const {
        std::memcpy(to, static_cast<const uint8_t*>(from) + first, count);
    }
    Number outside() const { return 0; }
    bool lie_so(const Rows&) const { return true; }
    uint32_t flipped() const { return 0; }
    static bool fits(const Product& p) {
        const auto plain = [](const Rows& rows) { return rows.type == Type::s8 && rows.zero == 0; };
        return machine().amx && plain(p.a) && plain(p.b);
    }
};

// Halves: bf16 numbers; codes become q - z, exact for 8 bits.
struct Halves {
    using Number = uint16_t;
    using Sum = float;
    static constexpr int64_t in_group = 2;
    int zero = 0;

    Halves(const Rows&, bool) {}
    void load(const Rows& rows, const void* from, int64_t first, int64_t count, Number* to) const {
        switch (rows.type) {
            case Type::f32: {
                const float* x = static_cast<const float*>(from) + first;
                for (int64_t i = 0; i < count; i++) to[i] = float_to_bf16(x[i]);
                return;
            }
            case Type::bf16:
                std::memcpy(to, static_cast<const uint16_t*>(from) + first, count * 2);
                return;
            case Type::u8: {
                const uint8_t* q = static_cast<const uint8_t*>(from) + first;
                for (int64_t i = 0; i < count; i++) to[i] = exact_bf16(q[i] - rows.zero);
                return;
            }
            case Type::s8: {
                const int8_t* q = static_cast<const int8_t*>(from) + first;
                for (int64_t i = 0; i < count; i++) to[i] = exact_bf16(q[i] - rows.zero);
                return;
            }
        }
    }
    Number outside() const { return 0; }
    bool lie_so(const Rows& rows) const { return rows.type == Type::bf16; }
    uint32_t flipped() const { return 0; }
};

// Where a tap of a window reaches from a position along one axis; -1 outside.
inline int64_t reach(const Window& w, int axis, int64_t position, int64_t tap) {
    if (!w.transposed) {
        const int64_t at = position * w.stride[axis] - w.padding[axis] + tap * w.dilation[axis];
        return at >= 0 && at < w.size[axis] ? at : -1;
    }
    const int64_t at = position + w.padding[axis] - tap * w.dilation[axis];
    if (at < 0 || at % w.stride[axis]) return -1;
    return at / w.stride[axis] < w.size[axis] ? at / w.stride[axis] : -1;
}

// Load numbers [first, first + count) of row r into `to`.
template <class Kind>
void load_row(const Kind& kind, const Rows& rows, int64_t r, int64_t first, int64_t count, typename Kind::Number* to) {
    const auto* data = static_cast<const uint8_t*>(rows.data);
    const int64_t size = bytes_of(rows.type);
    if (!rows.window) {
        const int64_t step = rows.fold ? (r % rows.fold) * (rows.rows / rows.fold) + r / rows.fold : r;
        kind.load(rows, data + step * rows.stride * size, first, count, to);
        return;
    }
    const Window& w = *rows.window;
    uint32_t p[4], rest = static_cast<uint32_t>(r);
    for (int axis = 3; axis >= 0; axis--) {
        p[axis] = rest % static_cast<uint32_t>(w.position[axis]);
        rest /= static_cast<uint32_t>(w.position[axis]);
    }
    const int64_t last = first + count, line = w.kernel[2] * w.channels;
    // Taps of the last axis lie side by side where they go forward in steps of one place.
    const bool forward = !w.transposed && w.dilation[2] == 1 && w.channels == rows.stride;
    for (int64_t row = first / line; row * line < last; row++) {
        const int64_t d = reach(w, 0, p[1], row / w.kernel[1]), h = reach(w, 1, p[2], row % w.kernel[1]);
        const int64_t begin = std::max(row * line, first), end = std::min((row + 1) * line, last);
        if (d < 0 || h < 0) {
            std::fill(to + (begin - first), to + (end - first), kind.outside());
            continue;
        }
        const uint8_t* places = data + ((p[0] * w.size[0] + d) * w.size[1] + h) * w.size[2] * rows.stride * size;
        if (forward) {
            // Places left of 0 and right of the size are outside; what is between is one run.
            const int64_t left = p[3] * w.stride[2] - w.padding[2];
            const int64_t from = std::max<int64_t>(0, -left), until = std::min(w.kernel[2], w.size[2] - left);
            const int64_t inner = std::clamp(row * line + from * w.channels, begin, end);
            const int64_t outer = std::clamp(row * line + until * w.channels, inner, end);
            std::fill(to + (begin - first), to + (inner - first), kind.outside());
            if (outer > inner)
                kind.load(rows, places, left * w.channels + inner - row * line, outer - inner, to + (inner - first));
            std::fill(to + (outer - first), to + (end - first), kind.outside());
            continue;
        }
        for (int64_t at = begin; at < end;) {
            const int64_t tap = (at - row * line) / w.channels, channel = (at - row * line) % w.channels;
            const int64_t until = std::min(end, at - channel + w.channels);
            const int64_t c = reach(w, 2, p[3], tap);
            if (c < 0)
                std::fill(to + (at - first), to + (until - first), kind.outside());
            else
                kind.load(rows, places + c * rows.stride * size, channel, until - at, to + (at - first));
            at = until;
        }
    }
}

// ---- packing ----

// Where the numbers of one side of a panel lie, in bytes: its rows, rows 16 to 31 from rows 0 to 15, the next group of
// a row, the next step, the next line. Of B a row is a group of all columns.
struct Tiling {
    int64_t row = 64, second = kTile, group = 4, step = 2 * kTile, line = 0;
};
constexpr Tiling kTiles{};
// Groups after each other, 32 rows to each: how rows that are k come out of memory. Tile units cannot read it.
constexpr Tiling kGroups{4, 64, kPanel * 4};
// What packed A whose rows are k lies in.
inline const Tiling& across_tiling() { return machine().amx ? kTiles : kGroups; }

// Transpose 16 x 16 groups of 32 bits.
inline void transpose16(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
        _mm512_storeu_si512(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
    }
}

// Interleave the numbers of `in_group` rows, each `width` long, into groups.
inline void interleave(const uint8_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
    const __m512i to_lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i in_lanes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const auto row = [&](int64_t r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r * stride + i));
        };
        __m512i all = _mm512_castsi128_si512(row(0));
        all = _mm512_inserti32x4(all, row(1), 1);
        all = _mm512_inserti32x4(all, row(2), 2);
        all = _mm512_inserti32x4(all, row(3), 3);
        _mm512_storeu_si512(groups + i, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lanes, all), in_lanes));
    }
    const uint8_t *a = rows, *b = rows + stride, *c = rows + 2 * stride, *d = rows + 3 * stride;
    for (; i < width; i++) groups[i] = a[i] | b[i] << 8 | c[i] << 16 | static_cast<uint32_t>(d[i]) << 24;
}
inline void interleave(const uint16_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
    const uint16_t *a = rows, *b = rows + stride;
    for (int64_t i = 0; i < width; i++) groups[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
}

// Groups [first, first + 16) of k of rows that are k, their numbers [at, at + count): 16 x `count` groups, `stride`
// apart. `row_of` says which row is number k; none, less than 0, is all `none`.
template <class Kind, class RowOf>
void load_across(const Kind& kind, const Rows& rows, const RowOf& row_of, typename Kind::Number none, int64_t first,
                 int64_t at, int64_t count, uint32_t* groups, int64_t stride, typename Kind::Number* scratch) {
    constexpr int64_t in_group = Kind::in_group;
    using Number = typename Kind::Number;
    const bool plain = !rows.window && !rows.fold;
    for (int64_t g = 0; g < 16; g++) {
        const int64_t k = (first + g) * in_group, from = row_of(k);
        const bool together = plain && from >= 0 && row_of(k + in_group - 1) == from + in_group - 1;
        if (together && kind.lie_so(rows)) {
            interleave(static_cast<const Number*>(rows.data) + from * rows.stride + at, rows.stride, count,
                       groups + g * stride);
            const uint32_t flipped = kind.flipped();
            for (int64_t i = 0; i < (flipped ? count : 0); i++) groups[g * stride + i] ^= flipped;
            std::memset(groups + g * stride + count, 0, (stride - count) * 4);
            continue;
        }
        const bool dense = together && rows.stride == count;
        if (dense) load_row(kind, rows, from, at, in_group * count, scratch);
        for (int64_t i = 0; i < in_group && !dense; i++) {
            const int64_t r = row_of(k + i);
            if (r >= 0)
                load_row(kind, rows, r, at, count, scratch + i * count);
            else
                std::fill_n(scratch + i * count, count, none);
        }
        interleave(scratch, count, count, groups + g * stride);
        std::memset(groups + g * stride + count, 0, (stride - count) * 4);
    }
}

// Memory for `pack_a_across` and `pack_b_across` of a width.
template <class Kind>
struct Across {
    uint32_t* groups;
    typename Kind::Number* scratch;
    explicit Across(int64_t width)
        : groups(workspace<uint32_t>(kSlotGroups, 16 * (width + kPanel))),
          scratch(workspace<typename Kind::Number>(kSlotScratch, Kind::in_group * width)) {}
};

// Step `step` of every panel of A whose rows are k, panels `panel_bytes` apart, as `across_tiling` has it.
template <class Kind, class RowOf>
void pack_a_across(const Kind& kind, const Product& p, const RowOf& row_of, typename Kind::Number none, int64_t step,
                   uint8_t* to, int64_t panel_bytes, const Across<Kind>& across) {
    const int64_t width = ceil_div(p.m, kPanel) * kPanel;
    load_across(kind, p.a, row_of, none, step * 16, 0, p.m, across.groups, width, across.scratch);
    to += step * 2 * kTile;
    for (int64_t m = 0; m < width; m += kPanel) {
        uint8_t* panel = to + m / kPanel * panel_bytes;
        if (machine().amx) {
            for (int64_t half = 0; half < 2; half++)
                transpose16(across.groups + m + half * 16, width, reinterpret_cast<uint32_t*>(panel + half * kTile),
                            16);
        } else {
            for (int64_t g = 0; g < 16; g++)
                std::memcpy(panel + g * kGroups.group, across.groups + g * width + m, kPanel * 4);
        }
    }
}

// Step `step` of every panel of B whose rows are k, panels `panel_bytes` apart.
template <class Kind, class RowOf>
void pack_b_across(const Kind& kind, const Product& p, const RowOf& row_of, int64_t step, uint8_t* to,
                   int64_t panel_bytes, const Across<Kind>& across) {
    const int64_t width = ceil_div(p.n, kPanel) * kPanel;
    load_across(kind, p.b, row_of, 0, step * 16, 0, p.n, across.groups, width, across.scratch);
    for (int64_t n = 0; n < width; n += 16)
        for (int64_t g = 0; g < 16; g++)
            std::memcpy(to + n / kPanel * panel_bytes + n % kPanel / 16 * kTile + g * 64, across.groups + g * width + n,
                        64);
}

// Panel `panel` of A whose rows run along k, steps [first, last), as tiles.
template <class Kind>
void pack_a_along(const Kind& kind, const Product& p, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
    using Number = typename Kind::Number;
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(Number));
    const int64_t row = panel * kPanel, rows = std::min(kPanel, p.m - row);
    const int64_t begin = first * per_step, count = std::min(last * per_step, p.k) - begin;
    auto* numbers = workspace<Number>(kSlotScratch, (last - first) * per_step);
    std::fill(numbers + count, numbers + (last - first) * per_step, Number{0});
    for (int64_t i = 0; i < kPanel; i++) {
        uint8_t* at = to + i / 16 * kTile + i % 16 * kStep;
        if (i < rows) load_row(kind, p.a, row + i, begin, count, numbers);
        for (int64_t s = 0; s < last - first; s++) {
            const __m512i part = i < rows ? _mm512_loadu_si512(numbers + s * per_step) : _mm512_setzero_si512();
            _mm512_store_si512(at + s * 2 * kTile, part);
        }
    }
}

// One step of a panel of B whose rows run along k, numbers [begin, begin + count) of them, as two tiles.
template <class Kind>
void pack_b_step(const Kind& kind, const Product& p, int64_t panel, int64_t begin, int64_t count, uint8_t* to) {
    using Number = typename Kind::Number;
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(Number));
    const int64_t column = panel * kPanel, columns = std::min(kPanel, p.n - column);
    alignas(64) uint32_t groups[kPanel * 16];
    auto* numbers = reinterpret_cast<Number*>(groups);
    if (count < per_step || columns < kPanel) std::memset(groups, 0, sizeof(groups));
    for (int64_t i = 0; i < columns; i++) load_row(kind, p.b, column + i, begin, count, numbers + i * per_step);
    for (int64_t half = 0; half < 2; half++)
        transpose16(groups + half * 256, 16, reinterpret_cast<uint32_t*>(to + half * kTile), 16);
}

// Panel `panel` of B whose rows run along k, steps [first, last).
template <class Kind>
void pack_b_along(const Kind& kind, const Product& p, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(typename Kind::Number));
    for (int64_t s = first; s < last; s++, to += 2 * kTile)
        pack_b_step(kind, p, panel, s * per_step, std::min(per_step, p.k - s * per_step), to);
}

// Steps [first, last) of all of B, by all threads of the enclosing team, which wait for each other at the end.
template <class Kind>
void pack_all_b(Guard& guard, const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* b,
                int64_t panel_bytes) {
    if (p.b_along) {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < ceil_div(p.n, kPanel); n++) pack_b_along(kind, p, n, first, last, b + n * panel_bytes);
    } else {
        std::optional<Across<Kind>> across;
        guard([&] { across.emplace(p.n); });
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic)
        for (int64_t s = first; s < last; s++)
            guard([&] { pack_b_across(kind, p, row_of, s, b + (s - first) * 2 * kTile, panel_bytes, *across); });
    }
}

// The same of all of A, without the wait.
template <class Kind>
void pack_all_a(Guard& guard, const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* a,
                int64_t panel_bytes) {
    if (p.a_along) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t m = 0; m < ceil_div(p.m, kPanel); m++)
            guard([&] { pack_a_along(kind, p, m, first, last, a + m * panel_bytes); });
    } else {
        std::optional<Across<Kind>> across;
        guard([&] { across.emplace(p.m); });
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic) nowait
        for (int64_t s = first; s < last; s++)
            guard([&] { pack_a_across(kind, p, row_of, 0, s, a - first * 2 * kTile, panel_bytes, *across); });
    }
}

// ---- 32 x 32 and 32 x 16 multiplications ----

// What one multiplication goes through: `lines` times `steps` and a last step of which `quarters` count, and where. By
// default both sides are packed, and the lines of B follow each other. Vectors leave out what does not count,
// and rows from `rows` on; tiles are always whole.
struct Path {
    int64_t steps, lines = 1;
    Tiling a = kTiles, b = kTiles;
    int64_t quarters = 0, rows = kPanel;
};

// C (32 x 32 or 32 x 16, rows `c_stride` numbers apart) = or += A (32 rows) B (tiles, all steps of all lines).
template <class Sum>
using Multiply = void (*)(const uint8_t* a, const Path& at, const uint8_t* b, Sum* c, int64_t c_stride, bool add);

#define LOWBIT_TILES(NAME, WIDE, SUM, TARGET, DOT)                                                               \
    inline __attribute__((target(TARGET))) void NAME(const uint8_t* a, const Path& at, const uint8_t* b, SUM* c, \
                                                     int64_t c_stride, bool add) {                               \
        const int64_t bytes = c_stride * 4;                                                                      \
        if (add) {                                                                                               \
            _tile_loadd(0, c, bytes);                                                                            \
            if (WIDE) _tile_loadd(1, c + 16, bytes);                                                             \
            _tile_loadd(2, c + 16 * c_stride, bytes);                                                            \
            if (WIDE) _tile_loadd(3, c + 16 * c_stride + 16, bytes);                                             \
        } else {                                                                                                 \
            _tile_zero(0);                                                                                       \
            if (WIDE) _tile_zero(1);                                                                             \
            _tile_zero(2);                                                                                       \
            if (WIDE) _tile_zero(3);                                                                             \
        }                                                                                                        \
        const int64_t steps = at.steps + (at.quarters > 0);                                                      \
        for (int64_t l = 0; l < at.lines; l++) {                                                                 \
            const uint8_t* row = a + l * at.a.line;                                                              \
            for (int64_t s = 0; s < steps; s++, b += at.b.step) {                                                \
                _tile_loadd(4, row + s * at.a.step, at.a.row);                                                   \
                _tile_loadd(6, b, at.b.row);                                                                     \
                _tile_loadd(5, row + at.a.second + s * at.a.step, at.a.row);                                     \
                if (WIDE) _tile_loadd(7, b + at.b.second, at.b.row);                                             \
                DOT(0, 4, 6);                                                                                    \
                if (WIDE) DOT(1, 4, 7);                                                                          \
                DOT(2, 5, 6);                                                                                    \
                if (WIDE) DOT(3, 5, 7);                                                                          \
            }                                                                                                    \
        }                                                                                                        \
        _tile_stored(0, c, bytes);                                                                               \
        if (WIDE) _tile_stored(1, c + 16, bytes);                                                                \
        _tile_stored(2, c + 16 * c_stride, bytes);                                                               \
        if (WIDE) _tile_stored(3, c + 16 * c_stride + 16, bytes);                                                \
    }
LOWBIT_TILES(codes_tiles, true, int32_t, "amx-tile,amx-int8", _tile_dpbusd)
LOWBIT_TILES(narrow_codes_tiles, false, int32_t, "amx-tile,amx-int8", _tile_dpbusd)
LOWBIT_TILES(signed_codes_tiles, true, int32_t, "amx-tile,amx-int8", _tile_dpbssd)
LOWBIT_TILES(narrow_signed_codes_tiles, false, int32_t, "amx-tile,amx-int8", _tile_dpbssd)
LOWBIT_TILES(halves_tiles, true, float, "amx-tile,amx-bf16", _tile_dpbf16ps)
LOWBIT_TILES(narrow_halves_tiles, false, float, "amx-tile,amx-bf16", _tile_dpbf16ps)
#undef LOWBIT_TILES

// One step of a dot product in 16 lanes of 32 bits.
#define LOWBIT_LANES __attribute__((target("avx512f,avx512vnni,avx512bf16"), always_inline)) inline
LOWBIT_LANES void dot(__m512i& sum, __m512i a, __m512i b) { sum = _mm512_dpbusd_epi32(sum, a, b); }
LOWBIT_LANES void dot(__m512& sum, __m512i a, __m512i b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
LOWBIT_LANES void load(__m512i& sum, const int32_t* c) { sum = _mm512_loadu_si512(c); }
LOWBIT_LANES void load(__m512& sum, const float* c) { sum = _mm512_loadu_ps(c); }
LOWBIT_LANES void save(int32_t* c, __m512i sum) { _mm512_storeu_si512(c, sum); }
LOWBIT_LANES void save(float* c, __m512 sum) { _mm512_storeu_ps(c, sum); }

// `groups` groups of rows that begin at `of`, written out: addresses in the instructions are what brings it to the
// speed of the units.
template <class Vector, int rows, int columns, int groups>
LOWBIT_LANES void multiply_groups(Vector (&sum)[rows][columns], const uint8_t* const (&of)[rows], int64_t at,
                                  int64_t a_group, const uint8_t* tile, int64_t b_row, int64_t b_second) {
#pragma GCC unroll 16
    for (int g = 0; g < groups; g++) {
        __m512i right[columns];
        for (int j = 0; j < columns; j++) right[j] = _mm512_loadu_si512(tile + j * b_second + g * b_row);
        for (int i = 0; i < rows; i++) {
            int32_t group;
            std::memcpy(&group, of[i] + at + g * a_group, 4);
            for (int j = 0; j < columns; j++) dot(sum[i][j], _mm512_set1_epi32(group), right[j]);
        }
    }
}
#undef LOWBIT_LANES

// What a multiplier knows of where its sides lie when it is compiled.
enum class Lie { tiles, groups, anywhere };

// With vectors: `rows` rows by `columns` vectors at a time stay in registers.
template <class Sum, class Vector, int rows, int columns, Lie a_lies, bool b_packed>
__attribute__((target("avx512f,avx512vnni,avx512bf16"))) void vectors(const uint8_t* a, const Path& at,
                                                                      const uint8_t* b, Sum* c, int64_t c_stride,
                                                                      bool add) {
    const Tiling of_a = a_lies == Lie::tiles ? kTiles : a_lies == Lie::groups ? kGroups : at.a;
    const Tiling of_b = b_packed ? kTiles : at.b;
    const int64_t group = a_lies == Lie::groups ? kGroups.group : kTiles.group;
    for (int64_t first = 0; first < at.rows; first += rows) {
        Vector sum[rows][columns] = {};
        if (add)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j++) load(sum[i][j], c + (first + i) * c_stride + 16 * j);
        const uint8_t* tile = b;
        for (int64_t l = 0; l < at.lines; l++) {
            const uint8_t* row = a + l * at.a.line + first / 16 * of_a.second + first % 16 * of_a.row;
            if (!b_packed) tile = b + l * at.b.line;
            const uint8_t* of[rows];
            for (int i = 0; i < rows; i++) of[i] = row + i * of_a.row;
            int64_t done = 0;
            for (int64_t s = 0; s < at.steps; s++, done += of_a.step, tile += of_b.step)
                multiply_groups<Vector, rows, columns, 16>(sum, of, done, group, tile, of_b.row, of_b.second);
            for (int64_t q = 0; q < at.quarters; q++)
                multiply_groups<Vector, rows, columns, 4>(sum, of, done + q * 4 * group, group, tile + q * 4 * of_b.row,
                                                          of_b.row, of_b.second);
            if (at.quarters) tile += of_b.step;
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) save(c + (first + i) * c_stride + 16 * j, sum[i][j]);
    }
}
template <class Sum, class Vector, Lie a_lies, bool b_packed>
Multiply<Sum> vectors_for(int64_t columns, int64_t rows) {
    if (columns > 16) return vectors<Sum, Vector, 8, 2, a_lies, b_packed>;
    return rows % 16 ? vectors<Sum, Vector, 8, 1, a_lies, b_packed> : vectors<Sum, Vector, 16, 1, a_lies, b_packed>;
}

struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline __attribute__((target("amx-tile"))) void tiles_on() {
    // Not a local: the compiler does not see that the instruction reads all of it.
    static const TileShape shape;
    _tile_loadconfig(&shape);
}
inline __attribute__((target("amx-tile"))) void tiles_off() { _tile_release(); }

// Keeps the tile units of this thread configured while it lives.
struct Tiles {
    Tiles() {
        if (machine().amx) tiles_on();
    }
    ~Tiles() {
        if (machine().amx) tiles_off();
    }
};

// Rows that a multiplication computes at least.
inline int64_t grain() { return machine().amx ? kPanel : 8; }
inline int64_t whole_grains(int64_t rows) { return ceil_div(rows, grain()) * grain(); }

// The multiplier of that many columns and rows, for sides that lie so.
template <Lie a_lies, bool b_packed>
Multiply<int32_t> multiplier(const Codes&, int64_t columns, int64_t rows = kPanel) {
    if (!machine().amx) return vectors_for<int32_t, __m512i, a_lies, b_packed>(columns, rows);
    return columns <= 16 ? narrow_codes_tiles : codes_tiles;
}
template <Lie a_lies, bool b_packed>
Multiply<int32_t> multiplier(const SignedCodes&, int64_t columns, int64_t = kPanel) {
    return columns <= 16 ? narrow_signed_codes_tiles : signed_codes_tiles;
}
template <Lie a_lies, bool b_packed>
Multiply<float> multiplier(const Halves&, int64_t columns, int64_t rows = kPanel) {
    if (!machine().amx) return vectors_for<float, __m512, a_lies, b_packed>(columns, rows);
    return columns <= 16 ? narrow_halves_tiles : halves_tiles;
}

// ---- results ----

// What the zero points of packed codes add to a sum over k: S = sum(qa qb) - za sum(qb) - zb sum(qa) + k za zb, in
// wrapping 32-bit arithmetic, whose result fits. Halves have none.
struct Zero {
    uint32_t a = 0, b = 0, k = 0;
};
inline Zero zero_of(const Product& p, const Codes& a, const Codes& b) {
    return {static_cast<uint32_t>(a.zero), static_cast<uint32_t>(b.zero), static_cast<uint32_t>(p.k)};
}
template <class Kind>
Zero zero_of(const Product&, const Kind&, const Kind&) {
    return {};
}

// Add the codes of each row of a packed panel of A, of so many quarters of steps.
inline void add_row_sums(const uint8_t* a, int64_t quarters, const Tiling& at, int32_t* sums) {
    if (at.group != kTiles.group) {
        const __m512i ones = _mm512_set1_epi8(1);
        for (int64_t half = 0; half < 2; half++) {
            __m512i sum = _mm512_loadu_si512(sums + half * 16);
            for (int64_t g = 0; g < quarters * 4; g++)
                sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(a + half * at.second + g * at.group), ones);
            _mm512_storeu_si512(sums + half * 16, sum);
        }
        return;
    }
    const __m512i none = _mm512_setzero_si512();
    for (int64_t i = 0; i < kPanel; i++) {
        const uint8_t* row = a + i / 16 * at.second + i % 16 * at.row;
        __m512i sum = none;
        for (int64_t s = 0; s < quarters / 4; s++)
            sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_load_si512(row + s * at.step), none));
        sums[i] += static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
    }
}

// Add the codes of each column of a panel of B, 16 or 32 of them, of so many quarters of steps; SignedCodes and Halves
// have no need.
inline void add_column_sums(const Codes&, const uint8_t* b, int64_t quarters, int64_t columns, const Tiling& at,
                            int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t half = 0; half < columns / 16; half++) {
        __m512i sum = _mm512_loadu_si512(sums + half * 16);
        for (int64_t q = 0; q < quarters; q++)
            for (int64_t g = 0; g < 4; g++) {
                const uint8_t* from = b + half * at.second + q / 4 * at.step + (q % 4 * 4 + g) * at.row;
                sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(from));
            }
        _mm512_storeu_si512(sums + half * 16, sum);
    }
}
template <class Kind>
void add_column_sums(const Kind&, const uint8_t*, int64_t, int64_t, const Tiling&, int32_t*) {}

// Sums of one row without what the zero points add, as float.
inline void correct(const int32_t* sum, Zero zero, int32_t row_sum, const int32_t* column_sums, int64_t count,
                    float* to) {
    const uint32_t row = zero.b * static_cast<uint32_t>(row_sum) - zero.k * zero.a * zero.b;
    for (int64_t j = 0; j < count; j++) {
        const uint32_t column = zero.a * static_cast<uint32_t>(column_sums[j]);
        to[j] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum[j]) - column - row));
    }
}
inline void correct(const float* sum, Zero, int32_t, const int32_t*, int64_t count, float* to) {
    std::memcpy(to, sum, count * sizeof(float));
}

// Scale `count` corrected sums of row m, from column n on, in place, and write them out.
inline void finish(const Product& p, int64_t m, int64_t n, int64_t count, float* y) {
    const Result& r = p.result;
    const float row = r.row_scale[r.row_scales == 1 ? 0 : m];
    if (r.column_scales == 1) {
        const float scale = row * r.column_scale[0];
        for (int64_t j = 0; j < count; j++) y[j] *= scale;
    } else {
        for (int64_t j = 0, channel = n % r.column_scales; j < count; j++) {
            y[j] *= row * r.column_scale[channel];
            if (++channel == r.column_scales) channel = 0;
        }
    }
    if (r.bias)
        for (int64_t j = 0; j < count; j++) y[j] += r.bias[n + j];
    if (r.taps == 1) {
        store(y, count, r.type, r.data, m * r.stride + n);
        return;
    }
    const int64_t channels = p.n / r.taps;
    int64_t channel = n % channels, to = m * r.stride + channel * r.taps + n / channels;
    for (int64_t j = 0; j < count; j++) {
        store(y + j, 1, r.type, r.data, to);
        to += r.taps;
        if (++channel == channels) {
            channel = 0;
            to += 1 - channels * r.taps;
        }
    }
}

// `correct` and `float_to_bf16` of 16 numbers.
inline __m512 corrected(const int32_t* sum, __m512i column, uint32_t row) {
    const __m512i s = _mm512_sub_epi32(_mm512_loadu_si512(sum), column);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(static_cast<int>(row))));
}
inline __m512 corrected(const float* sum, __m512i, uint32_t) { return _mm512_loadu_ps(sum); }
inline __m256i to_bf16(__m512 y) {
    const __m512i u = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 bad = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, bad, _mm512_set1_epi32(0x7FC0)));
}

// Correct, scale and write out `rows` rows of sums of one panel of columns, as rows m, m + step, ... of the result.
template <class Sum>
void finish_rows(const Product& p, const Sum* sum, int64_t stride, Zero zero, int64_t m, int64_t step, int64_t rows,
                 int64_t column_panel, const int32_t* row_sums, const int32_t* column_sums) {
    const Result& r = p.result;
    const int64_t n = column_panel * kPanel, columns = std::min(kPanel, p.n - n);
    const bool whole = r.column_scales == p.n || r.column_scales % 16 == 0;  // 16 columns have scales side by side
    if (r.taps != 1 || (r.column_scales != 1 && !whole)) {
        float y[kPanel];
        for (int64_t i = 0; i < rows; i++) {
            correct(sum + i * stride, zero, row_sums[i], column_sums, columns, y);
            finish(p, m + i * step, n, columns, y);
        }
        return;
    }
    // The same, a vector wide; rows one after the other, so that a line of the cache is written at once.
    __m512i column[2];
    __m512 scale[2], bias[2];
    __mmask16 mask[2];
    for (int64_t half = 0; half < 2; half++) {
        const int64_t count = std::clamp<int64_t>(columns - half * 16, 0, 16), at = n + half * 16;
        mask[half] = static_cast<__mmask16>((1u << count) - 1);
        column[half] = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(zero.a)),
                                          _mm512_loadu_si512(column_sums + half * 16));
        scale[half] = r.column_scales == 1 ? _mm512_set1_ps(r.column_scale[0])
                                           : _mm512_maskz_loadu_ps(mask[half], r.column_scale + at % r.column_scales);
        bias[half] = r.bias ? _mm512_maskz_loadu_ps(mask[half], r.bias + at) : _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < rows; i++) {
        const uint32_t row = zero.b * static_cast<uint32_t>(row_sums[i]) - zero.k * zero.a * zero.b;
        const __m512 row_scale = _mm512_set1_ps(r.row_scale[r.row_scales == 1 ? 0 : m + i * step]);
        const int64_t to = (m + i * step) * r.stride + n;
        for (int64_t half = 0; half < (columns > 16 ? 2 : 1); half++) {
            __m512 y = _mm512_mul_ps(corrected(sum + i * stride + half * 16, column[half], row),
                                     _mm512_mul_ps(row_scale, scale[half]));
            if (r.bias) y = _mm512_add_ps(y, bias[half]);
            if (r.type == Type::f32)
                _mm512_mask_storeu_ps(static_cast<float*>(r.data) + to + half * 16, mask[half], y);
            else
                _mm256_mask_storeu_epi16(static_cast<uint16_t*>(r.data) + to + half * 16, mask[half], to_bf16(y));
        }
    }
}

// The same of one panel of rows.
template <class Sum>
void finish_panel(const Product& p, const Sum* sum, int64_t stride, Zero zero, int64_t row_panel, int64_t column_panel,
                  const int32_t* row_sums, const int32_t* column_sums) {
    const int64_t m = row_panel * kPanel;
    finish_rows(p, sum, stride, zero, m, 1, std::min(kPanel, p.m - m), column_panel, row_sums, column_sums);
}

}  // namespace lowbit
