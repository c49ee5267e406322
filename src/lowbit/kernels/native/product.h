// Products of matrices and of convolutions: what they take. `dispatch.cpp` chooses those of an instruction set.
//
// Notation, as in BLAS: C (m x n) = lhs (m x k) rhs (k x n); k is the depth, the index that is summed.
#pragma once

#include <cstdint>

#include "attention.h"
#include "number.h"

namespace lowbit {

// A convolution as a matrix, as im2col would unfold it. Row r is a position: of the output, or with `transposed` of the
// input. Its numbers are those that the taps of the kernel reach from there on the other side, tap after tap, the
// channels of a pixel side by side.
struct Window {
    int64_t position[4];  // batch, then three axes: what a row index counts
    int64_t size[3];      // of the side that the taps reach for
    int64_t kernel[3], stride[3], padding[3], dilation[3];
    bool transposed;   // positions are those of the convolution's input, and taps reach for its output
    int64_t channels;  // numbers of a pixel, of one group
};

// How one side of a product lies in memory (gemmlowp's words). Width is m of the lhs and n of the rhs.
enum class Order {
    width_major,  // a row of memory runs along the depth: a row-major lhs, a column-major rhs
    depth_major,  // a row of memory is one depth: a column-major lhs, a row-major rhs
};

// One side of a product as rows of memory. Without a window row r starts at `data + step(r) * stride` where `step` is r
// itself, or, with `fold`, (r % fold) * (rows / fold) + r / fold. With a window it is a row of the im2col matrix, and
// `stride` lies between pixels.
struct Side {
    const void* data;
    Type type;
    int64_t rows, length, stride, fold;
    const Window* window;
    int zero_point;  // the code of a real zero, also of what lies outside the window
    Order order;
};

// C in the numbers' real values, with scales, bias and layout.
struct Result {
    void* data;
    Type type;       // f32 or bf16
    int64_t stride;  // between rows
    int64_t taps;    // 1, or columns (tap, channel) are written as (channel, tap)
    const float* row_scale;
    int64_t row_scales;  // 1 or m
    const float* column_scale;
    int64_t column_scales;  // 1, n, or n / taps: one for each channel
    const float* bias;      // n numbers, or null
};

struct Product {
    Side lhs, rhs;
    int64_t m, n, k;
    Result result;
};

// The products that an instruction set computes; null where it lacks the units.
struct Products {
    using Multiply = void (*)(const Product& p);
    Multiply codes = nullptr;  // u8 or s8 by u8 or s8, summed in int32
    Multiply bf16 = nullptr;   // f32, bf16 or codes, rounded to bf16, summed in float32
    // s8 by s8 in blocks of so many depths, a multiple of 4: sums of a block in int32, times its scales, in float32.
    // Row and column scales are one row of m, of n, for each block of the depth.
    void (*blocks)(const Product& p, int64_t block) = nullptr;

    // Attention in 8-bit codes, with dP on bf16 units.
    void (*attend)(const Attention& a) = nullptr;
    void (*differentiate)(const Attention& a, const AttentionGradients& of) = nullptr;

    constexpr Products with_codes(Multiply multiply) const {
        Products p = *this;
        p.codes = multiply;
        return p;
    }
    constexpr Products with_bf16(Multiply multiply) const {
        Products p = *this;
        p.bf16 = multiply;
        return p;
    }
    constexpr Products with_blocks(void (*multiply)(const Product&, int64_t)) const {
        Products p = *this;
        p.blocks = multiply;
        return p;
    }
    constexpr Products with_attention(void (*forward)(const Attention&),
                                      void (*backward)(const Attention&, const AttentionGradients&)) const {
        Products p = *this;
        p.attend = forward;
        p.differentiate = backward;
        return p;
    }
};

// Of each kind those of the best instruction set that this process may use.
const Products& products();

}  // namespace lowbit
