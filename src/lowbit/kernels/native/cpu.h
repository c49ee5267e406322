// Products of matrices and convolutions: what they take.
//
// Notation: k the index that a product sums over.
#pragma once

#include <cstdint>

#include "machine.h"
#include "number.h"
#include "parallel.h"

namespace lowbit {

// Rows of numbers in memory. Without a window row r starts at `data + step(r) * stride` where `step` is r itself, or,
// with `fold`, (r % fold) * (rows / fold) + r / fold. With a window it is row r of the matrix that unfolds a
// convolution.
struct Window {
    int64_t position[4];  // batch, then three axes: what a row index counts
    int64_t size[3];      // of the side that the taps reach for
    int64_t kernel[3], stride[3], padding[3], dilation[3];
    bool transposed;   // positions are those of the convolution's input, and taps reach for its output
    int64_t channels;  // numbers at one place, of one group
};

struct Rows {
    const void* data;
    Type type;
    int64_t rows, width, stride, fold;
    const Window* window;
    int zero;  // the code of a real zero, also what lies outside the window
};

// C (m, n) = sum_k A B in the numbers' real values, with scales, bias and layout of the result.
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

// A is m x k: with `a_along` its rows run along k, else they are k. B is k x n likewise: with `b_along` its rows are n.
struct Product {
    Rows a, b;
    bool a_along, b_along;
    int64_t m, n, k;
    Result result;
};
void multiply_codes(const Product& p);   // u8 or s8 by u8 or s8, summed in int32
void multiply_halves(const Product& p);  // f32, bf16 or codes, rounded to bf16, summed in float32
// The same of convolutions whose rows can be read where they lie; false, and nothing done, of all other products.
bool convolve_codes(const Product& p);
bool convolve_halves(const Product& p);

}  // namespace lowbit
