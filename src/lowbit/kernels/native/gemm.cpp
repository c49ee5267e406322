// Products of codes on 8-bit units and of bf16 values on 16-bit units: pack, multiply in tiles, scale.
//
// Both kinds share everything but the innermost instruction. A number of k is kept in 32-bit groups: four codes or two
// halves. Packed A is tiles of 16 rows by 16 groups and packed B tiles of 16 groups by 16 columns, two tiles to a
// panel and step, as the tile units read them. One call of a multiplier computes 32 rows by 32 columns.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu.h"

namespace lowbit {
namespace {

constexpr int64_t kPanel = 32;      // rows or columns of one multiplication
constexpr int64_t kStep = 64;       // bytes of k in one step
constexpr int64_t kTile = 16 * 64;  // bytes of a tile
constexpr double kAlone = 1 << 21;     // multiplications for which waking other threads costs more than it gains
constexpr int64_t kCache = 512 << 10;  // bytes of packed rows that stay in a core's own cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from one product to the next: fresh memory of this size costs more than packing does.
// Slots are numbered so that what lives at the same time does not share one.
enum Slot {
    kSlotA, kSlotB, kSlotSums, kSlotRowSums, kSlotColumnSums, kSlotGroups, kSlotScratch, kSlotImage, kSlotPairs, kSlotPanels, kSlots
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
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    if (block.bytes < bytes) {
        std::free(block.p);
        block.p = std::aligned_alloc(64, bytes);
        block.bytes = block.p ? bytes : 0;
        if (!block.p) throw std::bad_alloc();
    }
    return static_cast<T*>(block.p);
}

bool worth_threads(const Product& p) {
    return static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) > kAlone;
}

// ---- rows in the packed type ----

// Halves to even; nan stays nan.
uint16_t float_to_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// Of a whole number of 8 bits and a sign, which bf16 holds.
uint16_t exact_bf16(int32_t q) {
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
};

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// Where a tap of a window reaches from a position along one axis; -1 outside.
int64_t reach(const Window& w, int axis, int64_t position, int64_t tap) {
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
void load_row(const Kind& kind, const Rows& rows, int64_t r, int64_t first, int64_t count,
              typename Kind::Number* to) {
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

// Transpose 16 x 16 groups of 32 bits.
void transpose16(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
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
void interleave(const uint8_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
    const uint8_t *a = rows, *b = rows + stride, *c = rows + 2 * stride, *d = rows + 3 * stride;
    for (int64_t i = 0; i < width; i++)
        groups[i] = a[i] | b[i] << 8 | c[i] << 16 | static_cast<uint32_t>(d[i]) << 24;
}
void interleave(const uint16_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
    const uint16_t *a = rows, *b = rows + stride;
    for (int64_t i = 0; i < width; i++) groups[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
}

// Groups [first, first + 16) of k of rows that are k, their numbers [at, at + count): 16 x `count` groups, `stride`
// apart. `row_of` says which row is number k; none, less than 0, is zeros.
template <class Kind, class RowOf>
void load_across(const Kind& kind, const Rows& rows, const RowOf& row_of, int64_t first, int64_t at, int64_t count,
                 uint32_t* groups, int64_t stride, typename Kind::Number* scratch) {
    constexpr int64_t in_group = Kind::in_group;
    for (int64_t g = 0; g < 16; g++) {
        for (int64_t i = 0; i < in_group; i++) {
            const int64_t r = row_of((first + g) * in_group + i);
            if (r >= 0)
                load_row(kind, rows, r, at, count, scratch + i * count);
            else
                std::memset(scratch + i * count, 0, count * sizeof(*scratch));
        }
        interleave(scratch, count, count, groups + g * stride);
        std::memset(groups + g * stride + count, 0, (stride - count) * 4);
    }
}

// Step `step` of every panel of A whose rows are k, panels `panel_bytes` apart.
template <class Kind, class RowOf>
void pack_a_across(const Kind& kind, const Product& p, const RowOf& row_of, int64_t step, uint8_t* to, int64_t panel_bytes,
                   uint32_t* groups, typename Kind::Number* scratch) {
    const int64_t width = ceil_div(p.m, kPanel) * kPanel;
    load_across(kind, p.a, row_of, step * 16, 0, p.m, groups, width, scratch);
    for (int64_t m = 0; m < width; m += 16)
        transpose16(groups + m, width, reinterpret_cast<uint32_t*>(to + m / kPanel * panel_bytes + m % kPanel / 16 * kTile),
                    16);
}

// Step `step` of every panel of B whose rows are k, panels `panel_bytes` apart.
template <class Kind, class RowOf>
void pack_b_across(const Kind& kind, const Product& p, const RowOf& row_of, int64_t step, uint8_t* to, int64_t panel_bytes,
                   uint32_t* groups, typename Kind::Number* scratch) {
    const int64_t width = ceil_div(p.n, kPanel) * kPanel;
    load_across(kind, p.b, row_of, step * 16, 0, p.n, groups, width, scratch);
    for (int64_t n = 0; n < width; n += 16)
        for (int64_t g = 0; g < 16; g++)
            std::memcpy(to + n / kPanel * panel_bytes + n % kPanel / 16 * kTile + g * 64, groups + g * width + n, 64);
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

// Panel `panel` of B whose rows run along k, steps [first, last), as tiles.
template <class Kind>
void pack_b_along(const Kind& kind, const Product& p, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
    using Number = typename Kind::Number;
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(Number));
    const int64_t column = panel * kPanel, columns = std::min(kPanel, p.n - column);
    alignas(64) uint32_t groups[kPanel * 16];
    auto* numbers = reinterpret_cast<Number*>(groups);
    for (int64_t s = first; s < last; s++) {
        const int64_t begin = s * per_step, count = std::min(per_step, p.k - begin);
        if (count < per_step || columns < kPanel) std::memset(groups, 0, sizeof(groups));
        for (int64_t i = 0; i < columns; i++) load_row(kind, p.b, column + i, begin, count, numbers + i * per_step);
        for (int64_t half = 0; half < 2; half++)
            transpose16(groups + half * 256, 16, reinterpret_cast<uint32_t*>(to + ((s - first) * 2 + half) * kTile),
                        16);
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

// Steps [first, last) of all of B, by all threads of the enclosing team, which wait for each other at the end.
template <class Kind>
void pack_all_b(const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* b, int64_t panel_bytes) {
    if (p.b_along) {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < ceil_div(p.n, kPanel); n++)
            pack_b_along(kind, p, n, first, last, b + n * panel_bytes);
    } else {
        Across<Kind> across(p.n);
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic)
        for (int64_t s = first; s < last; s++)
            pack_b_across(kind, p, row_of, s, b + (s - first) * 2 * kTile, panel_bytes, across.groups, across.scratch);
    }
}

// The same of all of A, without the wait.
template <class Kind>
void pack_all_a(const Kind& kind, const Product& p, int64_t first, int64_t last, uint8_t* a, int64_t panel_bytes) {
    if (p.a_along) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t m = 0; m < ceil_div(p.m, kPanel); m++)
            pack_a_along(kind, p, m, first, last, a + m * panel_bytes);
    } else {
        Across<Kind> across(p.m);
        const auto row_of = [&p](int64_t k) { return k < p.k ? k : -1; };
#pragma omp for schedule(dynamic) nowait
        for (int64_t s = first; s < last; s++)
            pack_a_across(kind, p, row_of, s, a + (s - first) * 2 * kTile, panel_bytes, across.groups, across.scratch);
    }
}

// ---- 32 x 32 and 32 x 16 multiplications ----

// Where the tiles of one side lie, in bytes: the rows of a tile, the second tile, the next step, the next line.
struct Tiling {
    int64_t row = 64, second = kTile, step = 2 * kTile, line = 0;
};

// What one multiplication goes through: `lines` times `steps`, and where. By default both sides are packed. B has no
// lines: its steps follow each other.
struct Path {
    int64_t steps, lines = 1;
    Tiling a = {}, b = {};
};

// C (32 x 32 or 32 x 16, rows `c_stride` numbers apart) = or += A (32 rows) B (tiles, all steps of all lines).
template <class Sum>
using Multiply = void (*)(const uint8_t* a, const Path& at, const uint8_t* b, Sum* c, int64_t c_stride, bool add);

#define LOWBIT_TILES(NAME, SUM, TARGET, DOT)                                                                     \
    __attribute__((target(TARGET))) void NAME(const uint8_t* a, const Path& at, const uint8_t* b, SUM* c,        \
                                              int64_t c_stride, bool add) {                                      \
        const int64_t bytes = c_stride * 4;                                                                      \
        if (add) {                                                                                               \
            _tile_loadd(0, c, bytes);                                                                            \
            _tile_loadd(1, c + 16, bytes);                                                                       \
            _tile_loadd(2, c + 16 * c_stride, bytes);                                                            \
            _tile_loadd(3, c + 16 * c_stride + 16, bytes);                                                       \
        } else {                                                                                                 \
            _tile_zero(0);                                                                                       \
            _tile_zero(1);                                                                                       \
            _tile_zero(2);                                                                                       \
            _tile_zero(3);                                                                                       \
        }                                                                                                        \
        for (int64_t l = 0; l < at.lines; l++) {                                                                 \
            const uint8_t* row = a + l * at.a.line;                                                              \
            for (int64_t s = 0; s < at.steps; s++, b += at.b.step) {                                             \
                _tile_loadd(4, row + s * at.a.step, at.a.row);                                                   \
                _tile_loadd(6, b, at.b.row);                                                                     \
                _tile_loadd(5, row + at.a.second + s * at.a.step, at.a.row);                                     \
                _tile_loadd(7, b + at.b.second, at.b.row);                                                       \
                DOT(0, 4, 6);                                                                                    \
                DOT(1, 4, 7);                                                                                    \
                DOT(2, 5, 6);                                                                                    \
                DOT(3, 5, 7);                                                                                    \
            }                                                                                                    \
        }                                                                                                        \
        _tile_stored(0, c, bytes);                                                                               \
        _tile_stored(1, c + 16, bytes);                                                                          \
        _tile_stored(2, c + 16 * c_stride, bytes);                                                               \
        _tile_stored(3, c + 16 * c_stride + 16, bytes);                                                          \
    }                                                                                                            \
    __attribute__((target(TARGET))) void narrow_##NAME(const uint8_t* a, const Path& at, const uint8_t* b,       \
                                                       SUM* c, int64_t c_stride, bool add) {                     \
        const int64_t bytes = c_stride * 4;                                                                      \
        if (add) {                                                                                               \
            _tile_loadd(0, c, bytes);                                                                            \
            _tile_loadd(2, c + 16 * c_stride, bytes);                                                            \
        } else {                                                                                                 \
            _tile_zero(0);                                                                                       \
            _tile_zero(2);                                                                                       \
        }                                                                                                        \
        for (int64_t l = 0; l < at.lines; l++) {                                                                 \
            const uint8_t* row = a + l * at.a.line;                                                              \
            for (int64_t s = 0; s < at.steps; s++, b += at.b.step) {                                             \
                _tile_loadd(4, row + s * at.a.step, at.a.row);                                                   \
                _tile_loadd(6, b, at.b.row);                                                                     \
                _tile_loadd(5, row + at.a.second + s * at.a.step, at.a.row);                                     \
                DOT(0, 4, 6);                                                                                    \
                DOT(2, 5, 6);                                                                                    \
            }                                                                                                    \
        }                                                                                                        \
        _tile_stored(0, c, bytes);                                                                               \
        _tile_stored(2, c + 16 * c_stride, bytes);                                                               \
    }
LOWBIT_TILES(codes_tiles, int32_t, "amx-tile,amx-int8", _tile_dpbusd)
LOWBIT_TILES(signed_codes_tiles, int32_t, "amx-tile,amx-int8", _tile_dpbssd)
LOWBIT_TILES(halves_tiles, float, "amx-tile,amx-bf16", _tile_dpbf16ps)
#undef LOWBIT_TILES

#define LOWBIT_VECTORS(NAME, COLUMNS, ROWS, SUM, VECTOR, TARGET, LOAD, STORE, ZERO, DOT)                         \
    __attribute__((target(TARGET))) void NAME(const uint8_t* a, const Path& at, const uint8_t* b, SUM* c,        \
                                              int64_t c_stride, bool add) {                                      \
        for (int64_t first = 0; first < kPanel; first += ROWS) {                                                 \
            VECTOR sum[ROWS][COLUMNS];                                                                           \
            for (int i = 0; i < ROWS; i++)                                                                       \
                for (int j = 0; j < COLUMNS; j++)                                                                \
                    sum[i][j] = add ? LOAD(c + (first + i) * c_stride + 16 * j) : ZERO();                        \
            const uint8_t* tile = b;                                                                             \
            for (int64_t l = 0; l < at.lines; l++) {                                                             \
                const uint8_t* rows = a + l * at.a.line + first / 16 * at.a.second + first % 16 * at.a.row;      \
                for (int64_t s = 0; s < at.steps; s++, tile += at.b.step)                                        \
                    for (int g = 0; g < 16; g++) {                                                               \
                        __m512i columns[COLUMNS];                                                                \
                        for (int j = 0; j < COLUMNS; j++)                                                        \
                            columns[j] = _mm512_loadu_si512(tile + j * at.b.second + g * at.b.row);              \
                        for (int i = 0; i < ROWS; i++) {                                                         \
                            int32_t group;                                                                       \
                            std::memcpy(&group, rows + i * at.a.row + s * at.a.step + g * 4, 4);                 \
                            const __m512i of_a = _mm512_set1_epi32(group);                                       \
                            for (int j = 0; j < COLUMNS; j++) sum[i][j] = DOT(sum[i][j], of_a, columns[j]);      \
                        }                                                                                        \
                    }                                                                                            \
            }                                                                                                    \
            for (int i = 0; i < ROWS; i++)                                                                       \
                for (int j = 0; j < COLUMNS; j++) STORE(c + (first + i) * c_stride + 16 * j, sum[i][j]);         \
        }                                                                                                        \
    }
#define LOWBIT_DOT_HALVES(S, A, B) _mm512_dpbf16_ps(S, (__m512bh)(A), (__m512bh)(B))
#define LOWBIT_CODES(NAME, COLUMNS, ROWS)                                                                        \
    LOWBIT_VECTORS(NAME, COLUMNS, ROWS, int32_t, __m512i, "avx512f,avx512vnni", _mm512_loadu_si512,              \
                   _mm512_storeu_si512, _mm512_setzero_si512, _mm512_dpbusd_epi32)
#define LOWBIT_HALVES(NAME, COLUMNS, ROWS)                                                                       \
    LOWBIT_VECTORS(NAME, COLUMNS, ROWS, float, __m512, "avx512f,avx512bf16", _mm512_loadu_ps, _mm512_storeu_ps,  \
                   _mm512_setzero_ps, LOWBIT_DOT_HALVES)
LOWBIT_CODES(codes_vectors, 2, 8)
LOWBIT_CODES(narrow_codes_vectors, 1, 16)
LOWBIT_HALVES(halves_vectors, 2, 8)
LOWBIT_HALVES(narrow_halves_vectors, 1, 16)
#undef LOWBIT_CODES
#undef LOWBIT_HALVES
#undef LOWBIT_DOT_HALVES
#undef LOWBIT_VECTORS

struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
__attribute__((target("amx-tile"))) void tiles_on() {
    // Not a local: the compiler does not see that the instruction reads all of it.
    static const TileShape shape;
    _tile_loadconfig(&shape);
}
__attribute__((target("amx-tile"))) void tiles_off() { _tile_release(); }

// Keeps the tile units of this thread configured while it lives.
struct Tiles {
    Tiles() {
        if (machine().amx) tiles_on();
    }
    ~Tiles() {
        if (machine().amx) tiles_off();
    }
};

// The multiplier of a panel with that many columns.
Multiply<int32_t> multiplier(const Codes&, int64_t columns) {
    if (columns <= 16) return machine().amx ? narrow_codes_tiles : narrow_codes_vectors;
    return machine().amx ? codes_tiles : codes_vectors;
}
Multiply<int32_t> multiplier(const SignedCodes&, int64_t columns) {
    return columns <= 16 ? narrow_signed_codes_tiles : signed_codes_tiles;
}
Multiply<float> multiplier(const Halves&, int64_t columns) {
    if (columns <= 16) return machine().amx ? narrow_halves_tiles : narrow_halves_vectors;
    return machine().amx ? halves_tiles : halves_vectors;
}

// ---- results ----

// What the zero points of packed codes add to a sum over k: S = sum(qa qb) - za sum(qb) - zb sum(qa) + k za zb, in
// wrapping 32-bit arithmetic, whose result fits. Halves have none.
struct Zero {
    uint32_t a = 0, b = 0, k = 0;
};
Zero zero_of(const Product& p, const Codes& a, const Codes& b) {
    return {static_cast<uint32_t>(a.zero), static_cast<uint32_t>(b.zero), static_cast<uint32_t>(p.k)};
}
Zero zero_of(const Product&, const Halves&, const Halves&) { return {}; }

// Add the codes of each row of a packed panel of A.
void add_row_sums(const uint8_t* a, int64_t steps, int32_t* sums) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t i = 0; i < kPanel; i++) {
        const uint8_t* row = a + i / 16 * kTile + i % 16 * kStep;
        __m512i sum = none;
        for (int64_t s = 0; s < steps; s++)
            sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_load_si512(row + s * 2 * kTile), none));
        sums[i] += static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
    }
}

// Add the codes of each column of a packed panel of B.
void add_column_sums(const uint8_t* b, int64_t steps, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int half = 0; half < 2; half++) {
        __m512i sum = _mm512_loadu_si512(sums + half * 16);
        for (int64_t s = 0; s < steps; s++)
            for (int g = 0; g < 16; g++)
                sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(b + (s * 2 + half) * kTile + g * 64));
        _mm512_storeu_si512(sums + half * 16, sum);
    }
}

// Sums of one row without what the zero points add, as float.
void correct(const int32_t* sum, Zero zero, int32_t row_sum, const int32_t* column_sums, int64_t count, float* to) {
    const uint32_t row = zero.b * static_cast<uint32_t>(row_sum) - zero.k * zero.a * zero.b;
    for (int64_t j = 0; j < count; j++) {
        const uint32_t column = zero.a * static_cast<uint32_t>(column_sums[j]);
        to[j] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum[j]) - column - row));
    }
}
void correct(const float* sum, Zero, int32_t, const int32_t*, int64_t count, float* to) {
    std::memcpy(to, sum, count * sizeof(float));
}

void store(const float* from, int64_t count, Type type, void* to, int64_t first) {
    if (type == Type::f32) {
        std::memcpy(static_cast<float*>(to) + first, from, count * sizeof(float));
        return;
    }
    auto* half = static_cast<uint16_t*>(to) + first;
    for (int64_t j = 0; j < count; j++) half[j] = float_to_bf16(from[j]);
}

// Scale `count` corrected sums of row m, from column n on, in place, and write them out.
void finish(const Product& p, int64_t m, int64_t n, int64_t count, float* y) {
    const Result& r = p.result;
    const float row = r.row_scale[r.row_scales == 1 ? 0 : m];
    if (r.column_scales == 1) {
        const float scale = row * r.column_scale[0];
        for (int64_t j = 0; j < count; j++) y[j] *= scale;
    } else if (r.column_scales == p.n) {
        for (int64_t j = 0; j < count; j++) y[j] *= row * r.column_scale[n + j];
    } else {
        for (int64_t j = 0; j < count; j++) y[j] *= row * r.column_scale[(n + j) % r.column_scales];
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
__m512 corrected(const int32_t* sum, __m512i column, uint32_t row) {
    const __m512i s = _mm512_sub_epi32(_mm512_loadu_si512(sum), column);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(static_cast<int>(row))));
}
__m512 corrected(const float* sum, __m512i, uint32_t) { return _mm512_loadu_ps(sum); }
__m256i to_bf16(__m512 y) {
    const __m512i u = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 bad = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, bad, _mm512_set1_epi32(0x7FC0)));
}

// Correct, scale and write out sums of rows [m, m + rows) of one panel of columns.
template <class Sum>
void finish_rows(const Product& p, const Sum* sum, int64_t stride, Zero zero, int64_t m, int64_t rows,
                 int64_t column_panel, const int32_t* row_sums, const int32_t* column_sums) {
    const Result& r = p.result;
    const int64_t n = column_panel * kPanel, columns = std::min(kPanel, p.n - n);
    if (r.taps != 1 || (r.column_scales != 1 && r.column_scales != p.n)) {
        float y[kPanel];
        for (int64_t i = 0; i < rows; i++) {
            correct(sum + i * stride, zero, row_sums[i], column_sums, columns, y);
            finish(p, m + i, n, columns, y);
        }
        return;
    }
    for (int64_t half = 0; half < columns; half += 16) {  // the same, a vector wide
        const int64_t count = std::min<int64_t>(16, columns - half);
        const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
        const __m512i column = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(zero.a)),
                                                  _mm512_loadu_si512(column_sums + half));
        const __m512 scale = r.column_scales == 1 ? _mm512_set1_ps(r.column_scale[0])
                                                  : _mm512_maskz_loadu_ps(mask, r.column_scale + n + half);
        const __m512 bias = r.bias ? _mm512_maskz_loadu_ps(mask, r.bias + n + half) : _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; i++) {
            const uint32_t row = zero.b * static_cast<uint32_t>(row_sums[i]) - zero.k * zero.a * zero.b;
            __m512 y = corrected(sum + i * stride + half, column, row);
            const __m512 by = _mm512_mul_ps(_mm512_set1_ps(r.row_scale[r.row_scales == 1 ? 0 : m + i]), scale);
            y = _mm512_mul_ps(y, by);
            if (r.bias) y = _mm512_add_ps(y, bias);
            const int64_t to = (m + i) * r.stride + n + half;
            if (r.type == Type::f32) {
                _mm512_mask_storeu_ps(static_cast<float*>(r.data) + to, mask, y);
            } else if (count == 16) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(r.data) + to), to_bf16(y));
            } else {
                uint16_t tail[16];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(tail), to_bf16(y));
                std::memcpy(static_cast<uint16_t*>(r.data) + to, tail, count * 2);
            }
        }
    }
}

// The same of one panel of rows.
template <class Sum>
void finish_panel(const Product& p, const Sum* sum, int64_t stride, Zero zero, int64_t row_panel, int64_t column_panel,
                  const int32_t* row_sums, const int32_t* column_sums) {
    const int64_t m = row_panel * kPanel;
    finish_rows(p, sum, stride, zero, m, std::min(kPanel, p.m - m), column_panel, row_sums, column_sums);
}

// ---- drivers ----

// Steps of k that are multiplied at a time, so that a panel of B stays in the first-level cache.
constexpr int64_t kDeep = 16;

// Panels [top, bottom) of A by one of B, into `c`: a panel of sums each.
template <class Kind>
void multiply_panels(const Kind& kind, const uint8_t* a, const uint8_t* b, int64_t steps, int64_t panels,
                     int64_t panel_bytes, int64_t columns, typename Kind::Sum* c) {
    const auto multiply = multiplier(kind, columns);
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
    const int64_t splits = std::min(column_panels, std::max<int64_t>(1, ceil_div(threads, groups)));
    const Zero zero = zero_of(p, a_kind, b_kind);
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, column_panels * kPanel);
    std::fill_n(column_sums, column_panels * kPanel, 0);
#pragma omp parallel if (worth_threads(p))
    {
        pack_all_b(b_kind, p, 0, steps, b, panel_bytes);
        if (zero.a) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < column_panels; n++)
                add_column_sums(b + n * panel_bytes, steps, column_sums + n * kPanel);
        }
        const Tiles tiles;
        auto* a = workspace<uint8_t>(kSlotA, group * panel_bytes);
        auto* row_sums = workspace<int32_t>(kSlotRowSums, group * kPanel);
        auto* c = workspace<Sum>(kSlotPanels, group * kPanel * kPanel);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * splits; task++) {
            const int64_t first = task / splits * group, last = std::min(first + group, row_panels);
            const int64_t begin = task % splits * column_panels / splits;
            const int64_t end = (task % splits + 1) * column_panels / splits;
            std::fill_n(row_sums, group * kPanel, 0);
            for (int64_t m = first; m < last; m++) {
                uint8_t* panel = a + (m - first) * panel_bytes;
                pack_a_along(a_kind, p, m, 0, steps, panel);
                if (zero.b) add_row_sums(panel, steps, row_sums + (m - first) * kPanel);
            }
            for (int64_t n = begin; n < end; n++) {
                multiply_panels(a_kind, a, b + n * panel_bytes, steps, last - first, panel_bytes, p.n - n * kPanel, c);
                for (int64_t m = first; m < last; m++)
                    finish_panel(p, c + (m - first) * kPanel * kPanel, kPanel, zero, m, n,
                                 row_sums + (m - first) * kPanel, column_sums + n * kPanel);
            }
        }
    }
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
    const int64_t splits = std::min(column_panels, std::max<int64_t>(1, ceil_div(threads * 2, blocks)));
    const Zero zero = zero_of(p, a_kind, b_kind);
    auto* a = workspace<uint8_t>(kSlotA, row_panels * panel_bytes);
    auto* b = workspace<uint8_t>(kSlotB, column_panels * panel_bytes);
    auto* c = workspace<Sum>(kSlotSums, once ? 1 : row_panels * kPanel * width);
    auto* row_sums = workspace<int32_t>(kSlotRowSums, row_panels * kPanel);
    auto* column_sums = workspace<int32_t>(kSlotColumnSums, width);
    std::fill_n(row_sums, row_panels * kPanel, 0);
    std::fill_n(column_sums, width, 0);
#pragma omp parallel if (worth_threads(p))
    {
        const Tiles tiles;
        auto* local = workspace<Sum>(kSlotPanels, block * kPanel * kPanel);
        for (int64_t first = 0; first < steps; first += chunk) {
            const int64_t last = std::min(first + chunk, steps);
            pack_all_a(a_kind, p, first, last, a, panel_bytes);
            pack_all_b(b_kind, p, first, last, b, panel_bytes);
            if (zero.b) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < row_panels; m++)
                    add_row_sums(a + m * panel_bytes, last - first, row_sums + m * kPanel);
            }
            if (zero.a) {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < column_panels; n++)
                    add_column_sums(b + n * panel_bytes, last - first, column_sums + n * kPanel);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < blocks * splits; task++) {
                const int64_t top = task / splits * block, bottom = std::min(top + block, row_panels);
                const int64_t begin = task % splits * column_panels / splits;
                const int64_t end = (task % splits + 1) * column_panels / splits;
                for (int64_t n = begin; n < end; n++) {
                    const uint8_t* right = b + n * panel_bytes;
                    if (once) {
                        multiply_panels(a_kind, a + top * panel_bytes, right, steps, bottom - top, panel_bytes,
                                        p.n - n * kPanel, local);
                        for (int64_t m = top; m < bottom; m++)
                            finish_panel(p, local + (m - top) * kPanel * kPanel, kPanel, zero, m, n,
                                         row_sums + m * kPanel, column_sums + n * kPanel);
                        continue;
                    }
                    const auto multiply = multiplier(a_kind, p.n - n * kPanel);
                    for (int64_t m = top; m < bottom; m++)
                        multiply(a + m * panel_bytes, {last - first}, right, c + m * kPanel * width + n * kPanel, width,
                                 first > 0);
                }
            }
        }
        if (!once) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < row_panels; m++)
                for (int64_t n = 0; n < column_panels; n++)
                    finish_panel(p, c + m * kPanel * width + n * kPanel, width, zero, m, n, row_sums + m * kPanel,
                                 column_sums + n * kPanel);
        }
    }
}
// ---- convolutions whose rows are read where they lie ----

// The taps of one line of the kernel lie side by side in an image with its padding written out, and the next position
// begins a few bytes on: the multipliers read overlapping rows, and nothing is unfolded. A line of taps is padded to
// whole steps with zeros of B, so what a row reads beyond its line does not count.
struct Direct {
    int64_t places, taps;                // of the padded image's width; of a line
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
    if (!p.a_along || !p.a.window) return false;
    const Window& w = *p.a.window;
    if (w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.dilation[2] != 1 || w.kernel[2] < 2 || w.position[3] < 8) return false;
    if (w.transposed && (w.stride[1] != 1 || w.stride[2] != 1)) return false;
    if (Kind(p.b, false).zero != 0) return false;
    d->flip = w.transposed;
    for (int axis = 0; axis < 2; axis++) {
        const int64_t reach = w.dilation[axis + 1] * (w.kernel[axis + 1] - 1);
        d->padding[axis] = w.transposed ? reach - w.padding[axis + 1] : w.padding[axis + 1];
        d->step[axis] = w.transposed ? 1 : w.stride[axis + 1];
        if (d->padding[axis] < 0) return false;
    }
    d->taps = w.kernel[2];
    d->line = w.kernel[2] * w.channels;
    d->steps = ceil_div(d->line * size, kStep);
    if (size > 1 && d->line * size % kStep) return false;  // 0 times nan is no 0
    d->rows = w.position[2], d->width = w.position[3], d->samples = w.position[0];
    d->places = (d->width - 1) * d->step[1] + d->taps;
    return true;
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
        if (rows.stride == channels)
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
    using Number = typename Kind::Number;
    constexpr int64_t per_step = kStep / static_cast<int64_t>(sizeof(Number));
    const int64_t column = panel * kPanel, columns = std::min(kPanel, p.n - column);
    alignas(64) uint32_t groups[kPanel * 16];
    auto* numbers = reinterpret_cast<Number*>(groups);
    for (int64_t l = 0; l < p.a.window->kernel[1]; l++)
        for (int64_t s = 0; s < d.steps; s++) {
            const int64_t begin = s * per_step, count = std::min(per_step, d.line - begin);
            std::memset(groups, 0, sizeof(groups));
            for (int64_t i = 0; i < columns; i++)
                load_row(kind, p.b, column + i, l * d.line + begin, count, numbers + i * per_step);
            for (int64_t half = 0; half < 2; half++, to += kTile)
                transpose16(groups + half * 256, 16, reinterpret_cast<uint32_t*>(to), 16);
        }
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
    const int64_t halo = (lines - 1) * w.dilation[1] + 1;
    const int64_t fitting = std::max<int64_t>(1, (kCache / 4 / row_bytes - halo) / d.step[0] + 1);
    const int64_t block = std::min(d.rows, fitting), blocks = ceil_div(d.rows, block);
    const int64_t image = ((block - 1) * d.step[0] + halo) * d.places * w.channels;
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
                      (last - 1 - first) * d.step[0] + halo, a);
            for (int64_t n = 0; n < column_panels; n++) {
                const auto multiply = multiplier(a_kind, p.n - n * kPanel);
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
    int64_t halo, taps, columns;     // rows beyond the positions'; taps; tiles of 16 columns
    int64_t groups;                  // of samples, each summed in its order, whatever the number of threads
};

bool direct_weight_fits(const Product& p, DirectWeight* d) {
    if (p.a_along || p.b_along || !p.b.window || p.a.window || p.a.fold || p.m == 0 || p.n == 0) return false;
    const Window& w = *p.b.window;
    if (w.transposed || w.position[1] != 1 || w.size[0] != 1 || w.kernel[0] != 1 || w.padding[0] != 0) return false;
    if (w.stride[1] != 1 || w.stride[2] != 1 || w.position[3] < 8 || w.padding[1] < 0 || w.padding[2] < 0) return false;
    d->taps = w.kernel[1] * w.kernel[2];
    if (d->taps == 1) return false;
    d->channels = ceil_div(w.channels, 16) * 16;
    d->columns = d->taps * d->channels / 16;
    if (p.m * d->columns * 16 > 1 << 16) return false;  // sums that stay in a core's own cache
    d->padding[0] = w.padding[1], d->padding[1] = w.padding[2];
    d->rows = w.position[2], d->width = w.position[3], d->samples = w.position[0];
    d->places = d->width + (w.kernel[2] - 1) * w.dilation[2];
    d->halo = (w.kernel[1] - 1) * w.dilation[1];
    d->groups = std::min<int64_t>(d->samples, 16);
    return true;
}

template <class Kind>
void multiply_direct_weight(const Product& p, const DirectWeight& d) {
    using Number = typename Kind::Number;
    using Sum = typename Kind::Sum;
    constexpr int64_t in_group = Kind::in_group, in_step = 16 * in_group;
    const Kind kind(p.a, true);
    const Window& w = *p.b.window;
    const int64_t panels = ceil_div(p.m, kPanel), width = ceil_div(d.columns, 2) * kPanel, sums = panels * kPanel * width;
    const int64_t row_bytes = d.places * d.channels * static_cast<int64_t>(sizeof(Number));
    const int64_t fitting = std::max<int64_t>(1, kCache / 2 / row_bytes - d.halo);
    const int64_t block = std::min(d.rows, fitting), blocks = ceil_div(d.rows, block);
    const int64_t steps = ceil_div(block * d.places, in_step);
    const int64_t panel_bytes = steps * 2 * kTile;
    const int64_t reach = d.halo * d.places + (w.kernel[2] - 1) * w.dilation[2];  // of the last tap
    const int64_t image = steps * in_step + reach + in_group;  // places
    const int64_t grouped = image / in_group * d.channels;     // groups from one of the first places
    auto* all = workspace<Sum>(kSlotSums, d.groups * sums);
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
            Sum* c = all + group * sums;
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
                        multiplier(kind, both ? kPanel : 16)(a + m * panel_bytes, at, b,
                                                             c + m * kPanel * width + n * 16, width, add);
                    }
            }
        }
    }
    std::vector<float> row(p.n);
    for (int64_t m = 0; m < p.m; m++) {
        for (int64_t n = 0; n < p.n; n++) {
            const int64_t at = m * width + n / w.channels * d.channels + n % w.channels;
            Sum sum = all[at];
            for (int64_t group = 1; group < d.groups; group++) sum += all[group * sums + at];
            row[n] = static_cast<float>(sum);
        }
        for (int64_t n = 0; n < p.n; n += kPanel) finish(p, m, n, std::min(kPanel, p.n - n), row.data() + n);
    }
}

template <class Kind>
void multiply(const Product& p) {
    if (p.m == 0 || p.n == 0) return;
    Direct direct;
    if (direct_fits<Kind>(p, &direct))
        multiply_direct<Kind>(p, direct);
    else if (p.k > 4 * std::max(p.m, p.n) || !p.a_along)
        multiply_long<Kind>(p);
    else
        multiply_tall<Kind>(p);
}

}  // namespace

void multiply_codes(const Product& p) {
    DirectWeight direct;
    if (SignedCodes::fits(p) && direct_weight_fits(p, &direct))
        multiply_direct_weight<SignedCodes>(p, direct);
    else
        multiply<Codes>(p);
}
void multiply_halves(const Product& p) {
    DirectWeight direct;
    if (direct_weight_fits(p, &direct))
        multiply_direct_weight<Halves>(p, direct);
    else
        multiply<Halves>(p);
}

}  // namespace lowbit
