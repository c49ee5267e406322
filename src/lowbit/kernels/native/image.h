// Padded images: what implicit GEMM reads instead of an im2col matrix.
#pragma once

#include <algorithm>
#include <cstdint>

#include "operand.h"
#include "product.h"

namespace lowbit {
namespace {

// Every `row_step`-th row and `pixel_step`-th pixel of an image, from `row` and `pixel` on, with padding around: what
// lies at row and pixel 0 of the result is `above` rows and `before` pixels from the first (less than 0 leaves some
// out).
struct Sampling {
    int64_t above, before, row = 0, pixel = 0, row_step = 1, pixel_step = 1;
};

// Rows [first, first + count) of one sample's padded image, `width` pixels wide. Of each pixel `in_pixel` numbers are
// taken, and padded to `channels`.
template <class Kind>
void pad_image(const Kind& kind, const Side& side, int64_t in_pixel, int64_t channels, int64_t width,
               const Sampling& at, int64_t sample, int64_t first, int64_t count, typename Kind::Number* to) {
    const Window& w = *side.window;
    const int64_t size = bytes_of(side.type), height = w.size[1];
    const int64_t sampled = (w.size[2] - at.pixel + at.pixel_step - 1) / at.pixel_step;
    const int64_t left = std::clamp<int64_t>(at.before, 0, width), out = std::max<int64_t>(-at.before, 0);
    const int64_t inside = std::clamp<int64_t>(width - left, 0, std::max<int64_t>(sampled - out, 0));
    for (int64_t i = 0; i < count; i++, to += width * channels) {
        const int64_t h = (first - at.above + i) * at.row_step + at.row;
        if (h < 0 || h >= height) {
            std::fill_n(to, width * channels, kind.padding());
            continue;
        }
        std::fill_n(to, left * channels, kind.padding());
        const auto* from = static_cast<const uint8_t*>(side.data) +
                           ((sample * height + h) * w.size[2] + out * at.pixel_step + at.pixel) * side.stride * size;
        if (side.stride == channels && in_pixel == channels && at.pixel_step == 1)
            kind.convert(side, from, 0, inside * channels, to + left * channels);
        else
            for (int64_t j = 0; j < inside; j++) {
                auto* pixel = to + (left + j) * channels;
                kind.convert(side, from, j * at.pixel_step * side.stride, in_pixel, pixel);
                std::fill(pixel + in_pixel, pixel + channels, kind.padding());
            }
        std::fill(to + (left + inside) * channels, to + width * channels, kind.padding());
    }
}

}  // namespace
}  // namespace lowbit
