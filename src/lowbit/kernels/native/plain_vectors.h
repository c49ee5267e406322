// What packing and the epilogue do, in plain loops that the compiler turns into vectors of any width.
//
// `Square` transposes 4 x 4 groups: `Square::transpose(in, in_stride, out, out_stride)`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "epilogue.h"
#include "layout.h"
#include "product.h"

namespace lowbit {
namespace {

// `Code` is the sign of the packed lhs; the rhs is signed.
template <class Square, class Code>
struct PlainVectors {
    static constexpr bool kTiles = false;
    static constexpr int64_t kLeastRows = 4;
    struct Session {};

    // Transpose 16 x 16 groups.
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
        for (int64_t i = 0; i < 16; i += 4)
            for (int64_t j = 0; j < 16; j += 4)
                Square::transpose(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }

    // Interleave the numbers of 4 rows of bytes, or of 2 rows of halves, each `width` long, into groups.
    static void interleave(const uint8_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
        const uint8_t *a = rows, *b = rows + stride, *c = rows + 2 * stride, *d = rows + 3 * stride;
        for (int64_t i = 0; i < width; i++)
            groups[i] = a[i] | b[i] << 8 | c[i] << 16 | static_cast<uint32_t>(d[i]) << 24;
    }
    static void interleave(const uint16_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
        const uint16_t *a = rows, *b = rows + stride;
        for (int64_t i = 0; i < width; i++) groups[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
    }

    // Add the codes of each row of an lhs panel, of so many quarters of steps.
    static void add_lhs_sums(const uint8_t* lhs, int64_t quarters, const Strides& at, int32_t* sums) {
        if (at.group != kBlocked.group) {
            for (int64_t g = 0; g < quarters * 4; g++)
                for (int64_t half = 0; half < 2; half++)
                    add_groups<Code>(lhs + half * at.half + g * at.group, sums + half * 16);
            return;
        }
        for (int64_t i = 0; i < kMr; i++) {
            const uint8_t* row = lhs + i / 16 * at.half + i % 16 * at.row;
            int32_t sum = 0;
            for (int64_t s = 0; s < quarters / 4; s++)
                for (int64_t j = 0; j < kStep; j++) sum += static_cast<Code>(row[s * at.step + j]);
            sums[i] += sum;
        }
    }

    // Add the codes of each column of an rhs panel, 16 or 32 of them, of so many quarters of steps.
    static void add_rhs_sums(const uint8_t* rhs, int64_t quarters, int64_t columns, const Strides& at, int32_t* sums) {
        for (int64_t half = 0; half < columns / 16; half++)
            for (int64_t g = 0; g < quarters * 4; g++)
                add_groups<int8_t>(rhs + half * at.half + g / 16 * at.step + g % 16 * at.row, sums + half * 16);
    }

    // `finish_rows` of columns n to n + `columns`, where the scales of 16 columns lie side by side or are one.
    template <class Accumulator>
    static void store_rows(const Result& r, const Accumulator* sums, int64_t stride, ZeroPoints zero, int64_t m,
                           int64_t step, int64_t rows, int64_t n, int64_t columns, const int32_t* lhs_sums,
                           const int32_t* rhs_sums) {
        float scale[kNr], bias[kNr], y[kNr];
        for (int64_t j = 0; j < kNr; j++) {
            const int64_t at = n + std::min(j, columns - 1);
            scale[j] = r.column_scale[r.column_scales == 1 ? 0 : at % r.column_scales];
            bias[j] = r.bias ? r.bias[at] : 0.0f;
        }
        for (int64_t i = 0; i < rows; i++) {
            const float row_scale = r.row_scale[r.row_scales == 1 ? 0 : m + i * step];
            subtract_zero_points(sums + i * stride, zero, lhs_sums[i], rhs_sums, columns, y);
            std::fill(y + columns, y + kNr, 0.0f);
            for (int64_t j = 0; j < kNr; j++) y[j] *= row_scale * scale[j];
            if (r.bias)
                for (int64_t j = 0; j < kNr; j++) y[j] += bias[j];
            store(y, columns, r.type, r.data, (m + i * step) * r.stride + n);
        }
    }

  private:
    // Add the four codes of each of 16 groups.
    template <class Number>
    static void add_groups(const uint8_t* groups, int32_t* sums) {
        const auto* codes = reinterpret_cast<const Number*>(groups);
        for (int64_t j = 0; j < 16; j++)
            sums[j] += codes[4 * j] + codes[4 * j + 1] + codes[4 * j + 2] + codes[4 * j + 3];
    }
};

}  // namespace
}  // namespace lowbit
