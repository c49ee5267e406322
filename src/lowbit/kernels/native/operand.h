// Operands: the numbers of one side as the units take them, and rows of them, through im2col where there is a window.
//
// The units of 8 bits multiply unsigned by signed bytes and add four products to an int32 (vpdpbusd, tdpbusd): the lhs
// is u8, the rhs s8. A side of the other sign is biased, by +128 on the left and -128 on the right, a flip of the
// highest bit, and its zero point moves by as much. What zero points add to a sum is subtracted in the end, exactly, in
// wrapping 32-bit arithmetic:
//
//   sum (qa - za)(qb - zb) = sum qa qb - za sum qb - zb sum qa + k za zb
//
// Other choices are wrong or slow. A signed lhs read as unsigned is 256 too large wherever it is negative. Swapped
// sides would give the weights the bias and activations none, and the sums over the lhs that a zero point of the rhs
// needs are not there where rows overlap in an image; those over the rhs are taken once.
//
// Units that multiply signed bytes (tdpbssd, sdot) bias the other sign.
//
// AVX2 alone has none of these. Its vpmaddubsw adds two products of u8 by s8 in int16, where 2 * 255 * 127 = 64,770
// saturates at 32,767. To take |a| times sign(a) b fails at b = -128, whose negative does not fit in a byte. Halves of
// 4 bits do not saturate, but take as many instructions as q - z in 16 bits by vpmaddwd, which sums in 32 bits and
// needs no zero points. So codes are packed in 16 bits there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "number.h"
#include "product.h"

namespace lowbit {
namespace {

// A kind of product: the packed type, the type of its sums, how many packed numbers make a group of 32 bits, and what
// one side's numbers become.

struct U8S8 {
    using Number = uint8_t;
    using Accumulator = int32_t;
    static constexpr int64_t in_group = 4;
    uint8_t flip;    // 0x80 turns a signed code into an unsigned one and back
    int zero_point;  // of the packed codes

    U8S8(const Side& side, bool lhs) {
        const bool is_signed = side.type == Type::s8;
        flip = is_signed == lhs ? 0x80 : 0;
        zero_point = side.zero_point + (flip ? (lhs ? 128 : -128) : 0);
    }
    void convert(const Side&, const void* from, int64_t first, int64_t count, Number* to) const {
        const uint8_t* q = static_cast<const uint8_t*>(from) + first;
        if (!flip) {
            std::memcpy(to, q, count);
            return;
        }
        for (int64_t i = 0; i < count; i++) to[i] = q[i] ^ 0x80;
    }
    // What stands for a real zero.
    Number padding() const { return static_cast<Number>(zero_point); }
    // Whether groups of the numbers in memory become groups of packed ones by a flip of the bits of `group_flip`.
    bool converts_by_flip(const Side&) const { return true; }
    uint32_t group_flip() const { return flip * 0x01010101u; }
};

// Signed codes on both sides.
struct S8S8 : U8S8 {
    S8S8(const Side& side, bool) : U8S8(side, false) {}
    // Whether neither side has a zero point.
    static bool fits(const Product& p) {
        const auto plain = [](const Side& side) { return side.type == Type::s8 && side.zero_point == 0; };
        return plain(p.lhs) && plain(p.rhs);
    }
};

// q - z in 16 bits.
struct S16S16 {
    using Number = uint16_t;
    using Accumulator = int32_t;
    static constexpr int64_t in_group = 2;
    int zero_point = 0;  // of the packed codes

    S16S16(const Side&, bool) {}
    void convert(const Side& side, const void* from, int64_t first, int64_t count, Number* to) const {
        if (side.type == Type::u8)
            widen(static_cast<const uint8_t*>(from) + first, side.zero_point, count, to);
        else
            widen(static_cast<const int8_t*>(from) + first, side.zero_point, count, to);
    }
    Number padding() const { return 0; }
    bool converts_by_flip(const Side&) const { return false; }
    uint32_t group_flip() const { return 0; }

  private:
    template <class Code>
    static void widen(const Code* q, int zero, int64_t count, Number* to) {
        for (int64_t i = 0; i < count; i++) to[i] = static_cast<Number>(q[i] - zero);
    }
};

// Numbers as bfloat16; codes become q - z, exact for 8 bits and a sign.
struct Bf16 {
    using Number = uint16_t;
    using Accumulator = float;
    static constexpr int64_t in_group = 2;
    int zero_point = 0;

    Bf16(const Side&, bool) {}
    void convert(const Side& side, const void* from, int64_t first, int64_t count, Number* to) const {
        switch (side.type) {
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
                for (int64_t i = 0; i < count; i++) to[i] = exact_bf16(q[i] - side.zero_point);
                return;
            }
            case Type::s8: {
                const int8_t* q = static_cast<const int8_t*>(from) + first;
                for (int64_t i = 0; i < count; i++) to[i] = exact_bf16(q[i] - side.zero_point);
                return;
            }
        }
    }
    Number padding() const { return 0; }
    bool converts_by_flip(const Side& side) const { return side.type == Type::bf16; }
    uint32_t group_flip() const { return 0; }

  private:
    static uint16_t exact_bf16(int32_t q) {
        const float x = static_cast<float>(q);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return static_cast<uint16_t>(bits >> 16);
    }
};

// The coordinate that a tap reaches from a position along one axis; -1 outside.
inline int64_t reached(const Window& w, int axis, int64_t position, int64_t tap) {
    if (!w.transposed) {
        const int64_t at = position * w.stride[axis] - w.padding[axis] + tap * w.dilation[axis];
        return at >= 0 && at < w.size[axis] ? at : -1;
    }
    const int64_t at = position + w.padding[axis] - tap * w.dilation[axis];
    if (at < 0 || at % w.stride[axis]) return -1;
    return at / w.stride[axis] < w.size[axis] ? at / w.stride[axis] : -1;
}

// Numbers [first, first + count) of row r of the im2col matrix.
template <class Kind>
void im2col_row(const Kind& kind, const Side& side, int64_t r, int64_t first, int64_t count,
                typename Kind::Number* to) {
    const Window& w = *side.window;
    const auto* data = static_cast<const uint8_t*>(side.data);
    const int64_t size = bytes_of(side.type);
    uint32_t p[4], rest = static_cast<uint32_t>(r);
    for (int axis = 3; axis >= 0; axis--) {
        p[axis] = rest % static_cast<uint32_t>(w.position[axis]);
        rest /= static_cast<uint32_t>(w.position[axis]);
    }
    const int64_t last = first + count, line = w.kernel[2] * w.channels;
    // Taps of the last axis lie side by side where they go forward in steps of one pixel.
    const bool forward = !w.transposed && w.dilation[2] == 1 && w.channels == side.stride;
    for (int64_t row = first / line; row * line < last; row++) {
        const int64_t d = reached(w, 0, p[1], row / w.kernel[1]), h = reached(w, 1, p[2], row % w.kernel[1]);
        const int64_t begin = std::max(row * line, first), end = std::min((row + 1) * line, last);
        if (d < 0 || h < 0) {
            std::fill(to + (begin - first), to + (end - first), kind.padding());
            continue;
        }
        const uint8_t* pixels = data + ((p[0] * w.size[0] + d) * w.size[1] + h) * w.size[2] * side.stride * size;
        if (forward) {
            // Pixels left of 0 and right of the size are outside; what is between is one run.
            const int64_t left = p[3] * w.stride[2] - w.padding[2];
            const int64_t from = std::max<int64_t>(0, -left), until = std::min(w.kernel[2], w.size[2] - left);
            const int64_t inner = std::clamp(row * line + from * w.channels, begin, end);
            const int64_t outer = std::clamp(row * line + until * w.channels, inner, end);
            std::fill(to + (begin - first), to + (inner - first), kind.padding());
            if (outer > inner)
                kind.convert(side, pixels, left * w.channels + inner - row * line, outer - inner, to + (inner - first));
            std::fill(to + (outer - first), to + (end - first), kind.padding());
            continue;
        }
        for (int64_t at = begin; at < end;) {
            const int64_t tap = (at - row * line) / w.channels, channel = (at - row * line) % w.channels;
            const int64_t until = std::min(end, at - channel + w.channels);
            const int64_t c = reached(w, 2, p[3], tap);
            if (c < 0)
                std::fill(to + (at - first), to + (until - first), kind.padding());
            else
                kind.convert(side, pixels + c * side.stride * size, channel, until - at, to + (at - first));
            at = until;
        }
    }
}

// Numbers [first, first + count) of row r of a side.
template <class Kind>
void load_row(const Kind& kind, const Side& side, int64_t r, int64_t first, int64_t count, typename Kind::Number* to) {
    if (side.window) {
        im2col_row(kind, side, r, first, count, to);
        return;
    }
    const auto* data = static_cast<const uint8_t*>(side.data);
    const int64_t step = side.fold ? (r % side.fold) * (side.rows / side.fold) + r / side.fold : r;
    kind.convert(side, data + step * side.stride * bytes_of(side.type), first, count, to);
}

}  // namespace
}  // namespace lowbit
