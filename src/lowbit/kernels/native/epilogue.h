// The epilogue of a product: sums without what zero points added, scaled, with bias, written out.
//
// `Isa` does whole panels of the plain layouts with vectors (`Isa::store_rows`); the rest goes number by number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layout.h"
#include "operand.h"
#include "product.h"

namespace lowbit {
namespace {

// Zero points of the packed codes, and the depth they are summed over; zeros where there are none.
struct ZeroPoints {
    uint32_t lhs = 0, rhs = 0, depth = 0;

    // What row sums of the lhs, and the constant part, add to each sum of a row.
    uint32_t of_row(int32_t lhs_sum) const { return rhs * static_cast<uint32_t>(lhs_sum) - depth * lhs * rhs; }
};
template <class Kind>
ZeroPoints zero_points(const Product& p, const Kind& lhs, const Kind& rhs) {
    return {static_cast<uint32_t>(lhs.zero_point), static_cast<uint32_t>(rhs.zero_point), static_cast<uint32_t>(p.k)};
}

// Sums of one row without what zero points added, as float.
inline void subtract_zero_points(const int32_t* sum, ZeroPoints zero, int32_t lhs_sum, const int32_t* rhs_sums,
                                 int64_t count, float* to) {
    const uint32_t row = zero.of_row(lhs_sum);
    for (int64_t j = 0; j < count; j++) {
        const uint32_t column = zero.lhs * static_cast<uint32_t>(rhs_sums[j]);
        to[j] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum[j]) - column - row));
    }
}
inline void subtract_zero_points(const float* sum, ZeroPoints, int32_t, const int32_t*, int64_t count, float* to) {
    std::memcpy(to, sum, count * sizeof(float));
}

// Scale `count` numbers of row m, from column n on, in place, and write them out.
inline void scale_and_store(const Product& p, int64_t m, int64_t n, int64_t count, float* y) {
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

// Finish `rows` rows of sums of rhs panel `panel`, `stride` numbers apart: they are rows m, m + step, ... of C.
template <class Isa, class Accumulator>
void finish_rows(const Product& p, const Accumulator* sums, int64_t stride, ZeroPoints zero, int64_t m, int64_t step,
                 int64_t rows, int64_t panel, const int32_t* lhs_sums, const int32_t* rhs_sums) {
    const Result& r = p.result;
    const int64_t n = panel * kNr, columns = std::min(kNr, p.n - n);
    const bool side_by_side = r.column_scales == p.n || r.column_scales % 16 == 0;  // the scales of 16 columns
    if (r.taps == 1 && (r.column_scales == 1 || side_by_side)) {
        Isa::store_rows(r, sums, stride, zero, m, step, rows, n, columns, lhs_sums, rhs_sums);
        return;
    }
    float y[kNr];
    for (int64_t i = 0; i < rows; i++) {
        subtract_zero_points(sums + i * stride, zero, lhs_sums[i], rhs_sums, columns, y);
        scale_and_store(p, m + i * step, n, columns, y);
    }
}

// The same of one panel by one panel.
template <class Isa, class Accumulator>
void finish_panel(const Product& p, const Accumulator* sums, int64_t stride, ZeroPoints zero, int64_t lhs_panel,
                  int64_t rhs_panel, const int32_t* lhs_sums, const int32_t* rhs_sums) {
    const int64_t m = lhs_panel * kMr;
    finish_rows<Isa>(p, sums, stride, zero, m, 1, std::min(kMr, p.m - m), rhs_panel, lhs_sums, rhs_sums);
}

}  // namespace
}  // namespace lowbit
