// The Hadamard transform of blocks of a matrix, along its rows or its columns.
//
// Sums and differences of halves, from neighbours up, then the factor: the order of the torch twin, so that every
// number is the same bit for bit.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "runs.h"

namespace lowbit {
namespace {

// Stages of a block of `size` numbers, each of which is a vector of `count` neighbours, `stride` apart.
inline void butterflies(float* block, int64_t size, int64_t stride, int64_t count, float factor) {
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t first = 0; first < size; first += 2 * half)
            for (int64_t i = first; i < first + half; i++) {
                float *a = block + i * stride, *b = a + half * stride;
#pragma omp simd
                for (int64_t j = 0; j < count; j++) {
                    const float sum = a[j] + b[j], difference = a[j] - b[j];
                    a[j] = sum;
                    b[j] = difference;
                }
            }
    for (int64_t i = 0; i < size; i++)
#pragma omp simd
        for (int64_t j = 0; j < count; j++) block[i * stride + j] *= factor;
}

// y = H D x / sqrt(size) along rows or along columns; `signs` is the diagonal of D, or null.
inline void hadamard(const float* x, int64_t rows, int64_t width, bool along, int64_t size, const float* signs,
                     float factor, float* y) {
    constexpr int64_t kLanes = 64;  // columns that are worked on at a time
    const auto sign = [signs](int64_t i) { return signs ? signs[i] : 1.0f; };
    Guard guard;
    if (!along) {
        const int64_t strips = rows / size;
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
        for (int64_t strip = 0; strip < strips; strip++)
            guard([&] {
                std::vector<float> block(size * kLanes);
                for (int64_t left = 0; left < width; left += kLanes) {
                    const int64_t count = std::min(kLanes, width - left), at = strip * size * width + left;
                    for (int64_t i = 0; i < size; i++)
                        for (int64_t j = 0; j < count; j++) block[i * kLanes + j] = x[at + i * width + j] * sign(i);
                    butterflies(block.data(), size, kLanes, count, factor);
                    for (int64_t i = 0; i < size; i++) std::copy_n(&block[i * kLanes], count, y + at + i * width);
                }
            });
        guard.rethrow();
        return;
    }
    // Blocks that follow each other are transposed, 16 at a time, so that vectors run across them.
    constexpr int64_t kBlocks = 16;
    const int64_t blocks = rows * width / size, groups = ceil_div(blocks, kBlocks);
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
    for (int64_t group = 0; group < groups; group++)
        guard([&] {
            std::vector<float> block(size * kBlocks);
            const int64_t first = group * kBlocks, count = std::min(kBlocks, blocks - first);
            const float* from = x + first * size;
            float* to = y + first * size;
            for (int64_t b = 0; b < count; b++)
                for (int64_t i = 0; i < size; i++) block[i * kBlocks + b] = from[b * size + i] * sign(i);
            butterflies(block.data(), size, kBlocks, kBlocks, factor);
            for (int64_t b = 0; b < count; b++)
                for (int64_t i = 0; i < size; i++) to[b * size + i] = block[i * kBlocks + b];
        });
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
