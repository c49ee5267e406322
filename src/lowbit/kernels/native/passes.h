// The passes over memory, and what they take. `dispatch.cpp` chooses those of an instruction set.
//
// Notation: x real value, q code, S scale, z zero point, o offset.
#pragma once

#include <cstdint>

#include "number.h"

namespace lowbit {

// A tensor in memory: outer x channels x inner, or with `channels_last` outer x inner x channels. Its elements are
// numbered as outer x channels x inner in either case: noise is a function of that number.
struct View {
    int64_t outer, channels, inner;
    bool channels_last;
};

// q = clamp(round(x / S) + z, low, high), or with `offset` q = round(clamp((x - o) / S, low, high)).
struct Grid {
    const float* scale;  // S, one or one for each channel
    const float* zero;   // z, or o with `offset`; as many; null for 0
    int64_t scales;
    float low, high;
    bool offset, stochastic;
    uint32_t key0, key1;  // of the noise
};

// How a grid is made of a range, as `lowbit.numerics.elements.Integer.steps` makes it.
struct Rule {
    bool symmetric;
    float levels, floor;   // the largest code, the smallest scale
    int64_t samples;       // 0: a grid for each channel; else one, of the mean of so many samples' extremes
    const float *lo, *hi;  // the range, in place of that of x; null for that of x
    bool stochastic;
    uint32_t key0, key1;  // of the noise
};

// How blocks of so many rows by columns get their scale and codes, which lie in -levels..levels.
struct BlockRule {
    int64_t rows, columns;
    float levels, floor;  // the largest code, the smallest scale
    bool floor_power;     // whether scales are powers of two, rounded down as in the Microscaling formats
    bool stochastic;
    uint32_t key0, key1;  // of the noise
};

// A running range, as `lowbit.numerics.ranges.record_range` keeps it: lo, hi and the number of batches.
struct Running {
    float* range;
    float momentum;
    bool first;     // the first batch is taken whole
    bool training;  // record the batch and use its extremes; else use what was recorded
};

// What one batch says of each channel of codes that are rows by channels.
struct Statistics {
    int64_t* total;  // sums of codes
    float *mean, *sigma;
    int32_t *argmax, *argmin;  // first rows of the extremes, of each chunk
    const float* slopes;       // d sigma / d range, of each chunk
    int64_t chunks;            // 0: mean and sigma were given, and there is no more
};

// Codes of rows by channels: x = (q - zero) S.
struct CodeRows {
    const uint8_t* q;
    const float* scale;
    int zero;
};

// A code book: rows for numbers with and without a sign.
struct Book {
    const float* values;    // 2 x 256, sorted
    const float* limits;    // 2 x 256: beyond limit i the code is larger than i
    const int32_t* starts;  // 2 x 65536: the code of the smallest number with these upper 16 bits
    bool stochastic;
    uint32_t key0, key1;  // of the noise
};

struct Passes {
    // ---- ranges.h ----
    // The smallest and largest value of each channel; nan where a nan is.
    void (*extremes)(const void* x, Type type, View view, float* lo, float* hi);
    // The extremes to use for x, the mean of those of `samples`.
    void (*observe)(const void* x, Type type, int64_t count, int64_t samples, const Running& running, float* lo,
                    float* hi);

    // ---- codes.h ----
    // Codes as bytes, in the order of x; with `taps` > 1 each record of channels x inner numbers, or of inner numbers
    // where the scale is one or there is one channel to a row, is transposed from (.., taps) to (taps, ..).
    void (*encode)(const void* x, Type type, View view, const Grid& grid, int64_t taps, uint8_t* codes);
    // Codes as `encode` writes them, their scales, and the zero point of the only scale; 0 where it is nan.
    int (*quantize)(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale);
    // Codes of a matrix in blocks, in its order, and the scale of each block, row by row.
    void (*encode_blocks)(const void* x, Type type, int64_t rows, int64_t width, const BlockRule& rule, uint8_t* codes,
                          float* scales);
    // Blocks of `size` numbers of each row, or with `along` false of each column, times signs where there are any, in
    // the Hadamard transform times `factor`.
    void (*hadamard)(const float* x, int64_t rows, int64_t width, bool along, int64_t size, const float* signs,
                     float factor, float* y);
    // The values of the codes, (q - z) S or q S + o, in the type and order of x.
    void (*fake_quantize)(const void* x, Type type, View view, const Grid& grid, void* y);
    // The nearest bfloat16 of each number.
    void (*round_bf16)(const float* x, int64_t count, float* y);
    // The uniform noise of numbers 0 to count - 1.
    void (*noise)(int64_t count, uint32_t key0, uint32_t key1, float* u);

    // ---- books.h ----
    // Codes of blocks of numbers and their scales, negative where the block has no negative numbers.
    void (*encode_book)(const void* x, Type type, int64_t count, int64_t block, const Book& book, uint8_t* codes,
                        float* scales);
    // Their values.
    void (*decode_book)(const uint8_t* codes, const float* scales, int64_t count, int64_t block, const float* values,
                        float* y);

    // ---- sums.h ----
    // The sum of each of `width` columns of a matrix.
    void (*sums)(const void* x, Type type, int64_t rows, int64_t width, float* to);
    // The sum of each row of `width` codes.
    void (*row_sums)(const uint8_t* q, int64_t rows, int64_t width, float* to);
    // y += u o + t of rows by channels: u has a number for each row and group of channels, o for each channel, and t
    // `period` rows that repeat, or none.
    void (*add_offsets)(float* y, int64_t rows, int64_t channels, const float* u, int64_t groups, const float* o,
                        const float* t, int64_t period);
    // Of each channel: the sum of a's codes, and of a's times b's where there is a b.
    void (*code_sums)(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t* sum,
                      int64_t* product);
    // All that `Statistics` has, of codes in chunks of rows.
    void (*code_statistics)(const CodeRows& codes, int64_t channels, const int64_t* starts, const Statistics& to);

    // ---- norm.h ----
    // y = a q + b in each channel, with `relu` no less than 0.
    void (*affine)(const uint8_t* q, int64_t rows, int64_t channels, const float* a, const float* b, bool relu, void* y,
                   Type type);
    // y = gamma (x - mean) / d + beta of the values x of codes, and d, which is sqrt(sigma^2 + eps) or sigma + eps;
    // with `rectify` no less than 0. With `narrowest` a sigma of 0 that the codes gave is that of ranges of one step.
    void (*normalize)(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats, float eps,
                      bool narrowest, bool inside, const float* gamma, const float* beta, bool rectify, float* d,
                      void* y, Type type);
    // g where such a y of type `y_type` is not 0 or less, 0 elsewhere.
    void (*rectify_backward)(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats,
                             const float* gamma, const float* beta, const float* d, Type y_type, const void* g,
                             Type type, void* to);
    // The gradients of gamma, beta and x, of the codes g of the output's gradient.
    void (*normalize_backward)(const CodeRows& g, const CodeRows& codes, int64_t rows, int64_t channels,
                               const Statistics& stats, bool inside, const float* gamma, const float* d,
                               float* grad_gamma, float* grad_beta, void* dx, Type type);
};

// Those of the best instruction set that this process may use.
const Passes& passes();

}  // namespace lowbit
