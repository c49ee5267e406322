// Ranges: the extremes of a tensor or of its channels, and running ranges.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "runs.h"

namespace lowbit {
namespace {

struct Extremes {
    float lo = std::numeric_limits<float>::infinity(), hi = -std::numeric_limits<float>::infinity();
    bool nan = false;

    void add(const Extremes& other) {
        lo = std::min(lo, other.lo);
        hi = std::max(hi, other.hi);
        nan = nan || other.nan;
    }
    void write(float* to_lo, float* to_hi) const {
        const float bad = std::numeric_limits<float>::quiet_NaN();
        *to_lo = nan ? bad : lo;
        *to_hi = nan ? bad : hi;
    }
};

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) { return bf16_to_float(v); }

// Of one run, in 64 lanes, since a running minimum in one number would wait for itself.
template <class Number>
Extremes run_extremes(const Number* x, int64_t count) {
    constexpr int kLanes = 64;
    Extremes e;
    float lo[kLanes], hi[kLanes];
    uint32_t bad[kLanes];
    for (int j = 0; j < kLanes; j++) {
        lo[j] = e.lo;
        hi[j] = e.hi;
        bad[j] = 0;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int j = 0; j < kLanes; j++) {
            const float v = to_float(x[i + j]);
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
            bad[j] |= v != v;
        }
    for (; i < count; i++) {
        const float v = to_float(x[i]);
        lo[0] = v < lo[0] ? v : lo[0];
        hi[0] = v > hi[0] ? v : hi[0];
        bad[0] |= v != v;
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        for (int j = 0; j < lanes; j++) {
            lo[j] = lo[j + lanes] < lo[j] ? lo[j + lanes] : lo[j];
            hi[j] = hi[j + lanes] > hi[j] ? hi[j + lanes] : hi[j];
            bad[j] |= bad[j + lanes];
        }
    e.lo = lo[0];
    e.hi = hi[0];
    e.nan = bad[0] != 0;
    return e;
}

Extremes run_extremes(const void* x, Type type, int64_t from, int64_t count) {
    if (type == Type::f32) return run_extremes(static_cast<const float*>(x) + from, count);
    return run_extremes(static_cast<const uint16_t*>(x) + from, count);
}

// Of each channel of outer x channels x inner, the inner runs contiguous.
void block_extremes(const void* x, Type type, View view, float* lo, float* hi) {
    const int64_t pieces = ceil_div(view.inner, kTask);
    std::vector<Extremes> parts(view.outer * view.channels * pieces);
#pragma omp parallel for schedule(static) if (view.outer * view.channels * view.inner > kAlone)
    for (int64_t task = 0; task < static_cast<int64_t>(parts.size()); task++) {
        const int64_t block = task / pieces, begin = task % pieces * kTask;
        parts[task] = run_extremes(x, type, block * view.inner + begin, std::min(kTask, view.inner - begin));
    }
    for (int64_t c = 0; c < view.channels; c++) {
        Extremes e;
        for (int64_t o = 0; o < view.outer; o++)
            for (int64_t p = 0; p < pieces; p++) e.add(parts[(o * view.channels + c) * pieces + p]);
        e.write(lo + c, hi + c);
    }
}

// Of each of `width` columns of a matrix.
void column_extremes(const void* x, Type type, int64_t rows, int64_t width, float* lo, float* hi) {
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<uint32_t> bad(width, 0);
    std::fill_n(lo, width, infinity);
    std::fill_n(hi, width, -infinity);
    Guard guard;
#pragma omp parallel if (rows * width > kAlone)
    {
        std::vector<float> my_lo, my_hi;
        std::vector<uint32_t> my_bad;
        guard([&] {
            my_lo.assign(width, infinity);
            my_hi.assign(width, -infinity);
            my_bad.assign(width, 0);
        });
        const auto work = [&](int64_t r) {
            float buffer[kRun];
            for (int64_t c = 0; c < width; c += kRun) {
                const int64_t count = std::min(kRun, width - c);
                const float* v = load(x, type, r * width + c, count, buffer);
                float *l = my_lo.data() + c, *h = my_hi.data() + c;
                uint32_t* b = my_bad.data() + c;
#pragma omp simd
                for (int64_t i = 0; i < count; i++) {
                    l[i] = v[i] < l[i] ? v[i] : l[i];
                    h[i] = v[i] > h[i] ? v[i] : h[i];
                    b[i] |= v[i] != v[i];
                }
            }
        };
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < rows; r++) guard([&] { work(r); });
#pragma omp critical(lowbit_extremes)
        guard([&] {
            for (int64_t c = 0; c < width; c++) {
                lo[c] = std::min(lo[c], my_lo[c]);
                hi[c] = std::max(hi[c], my_hi[c]);
                bad[c] |= my_bad[c];
            }
        });
    }
    guard.rethrow();
    for (int64_t c = 0; c < width; c++)
        if (bad[c]) lo[c] = hi[c] = std::numeric_limits<float>::quiet_NaN();
}

void extremes(const void* x, Type type, View view, float* lo, float* hi) {
    if (view.channels_last || view.inner == 1) {
        column_extremes(x, type, view.outer * view.inner, view.channels, lo, hi);
        return;
    }
    if (view.inner >= kShort || view.outer == 1 || view.channels == 1) {
        block_extremes(x, type, view, lo, hi);
        return;
    }
    const int64_t width = view.channels * view.inner;
    std::vector<float> all_lo(width), all_hi(width);
    column_extremes(x, type, view.outer, width, all_lo.data(), all_hi.data());
    for (int64_t c = 0; c < view.channels; c++) {
        Extremes e;
        for (int64_t i = c * view.inner; i < (c + 1) * view.inner; i++) {
            e.nan = e.nan || all_lo[i] != all_lo[i];
            e.lo = std::min(e.lo, all_lo[i]);
            e.hi = std::max(e.hi, all_hi[i]);
        }
        e.write(lo + c, hi + c);
    }
}

// The range of a whole tensor: the mean, in float64, of the extremes of samples that lie one after the other.
void range_of(const void* x, Type type, int64_t count, int64_t samples, float* lo, float* hi) {
    std::vector<float> all(2 * samples);
    extremes(x, type, {1, samples, count / samples, false}, all.data(), all.data() + samples);
    double sum_lo = 0.0, sum_hi = 0.0;
    for (int64_t i = 0; i < samples; i++) {
        sum_lo += static_cast<double>(all[i]);
        sum_hi += static_cast<double>(all[samples + i]);
    }
    *lo = static_cast<float>(sum_lo / static_cast<double>(samples));
    *hi = static_cast<float>(sum_hi / static_cast<double>(samples));
}

void observe(const void* x, Type type, int64_t count, int64_t samples, const Running& running, float* lo, float* hi) {
    range_of(x, type, count, samples, lo, hi);
    float* kept = running.range;
    const bool finite = std::isfinite(*lo) && std::isfinite(*hi);
    if (!running.training) {
        if (kept[2] == 0.0f || !finite) return;
        *lo = kept[0];
        *hi = kept[1];
    } else if (finite) {
        const float weight = running.first && kept[2] == 0.0f ? 0.0f : running.momentum;
        kept[0] = kept[0] * weight + *lo * (1.0f - weight);
        kept[1] = kept[1] * weight + *hi * (1.0f - weight);
        kept[2] += 1.0f;
    }
}

}  // namespace
}  // namespace lowbit
