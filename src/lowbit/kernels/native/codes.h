// Codes of a tensor and their values on the grid.
//
// Every result equals that of the torch twin bit for bit: rounding is to even, x / S is correctly rounded, and nothing
// is contracted.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "plan.h"
#include "ranges.h"
#include "rounding.h"
#include "runs.h"

namespace lowbit {
namespace {

// Codes of the numbers x[from, from + count) as bytes, in memory with room for a whole run. An instruction set may have
// an encoder of its own, which must give the same bytes.
struct PortableEncoder {
    static void encode_run(const void* x, Type type, int64_t from, int64_t count, const Run& run, bool per_number,
                           bool by_reciprocal, bool stochastic, uint8_t* bytes) {
        float buffer[kRun], q[kRun];
        run_quantizer(per_number, by_reciprocal, false, stochastic)(load(x, type, from, count, buffer), count, run, q);
        const float zero = *run.zero;
        if (per_number)
            for (int64_t i = 0; i < count; i++)
                bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i] + run.zero[i]));
        else
            for (int64_t i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i] + zero));
    }
};

// Bytes of a record from number `first` on into its place `to`; with taps transposed from (.., taps) to (taps, ..).
void store_codes(const uint8_t* bytes, int64_t first, int64_t count, int64_t length, int64_t taps, uint8_t* to) {
    if (taps == 1) {
        std::memcpy(to + first, bytes, count);
        return;
    }
    const int64_t channels = length / taps;
    int64_t channel = first / taps, tap = first % taps;
    for (int64_t i = 0; i < count; i++) {
        to[tap * channels + channel] = bytes[i];
        if (++tap == taps) {
            tap = 0;
            channel++;
        }
    }
}

template <class Encoder>
void encode(const void* x, Type type, View view, const Grid& grid, int64_t taps, uint8_t* codes) {
    visit(view, grid, taps > 1, [=](const Plan& plan, const Run& run, int64_t record, int64_t first, int64_t count) {
        uint8_t bytes[kRun];
        const int64_t from = record * plan.length + first;
        if (grid.offset) {
            float buffer[kRun], q[kRun];
            plan.quantize(load(x, type, from, count, buffer), count, run, q);
            for (int64_t i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i]));
        } else {
            Encoder::encode_run(x, type, from, count, run, plan.per_number, plan.by_reciprocal, grid.stochastic, bytes);
        }
        store_codes(bytes, first, count, plan.length, taps, codes + record * plan.length);
    });
}

// Scale and zero point of a range, as `lowbit.numerics.elements.Integer.steps` places them; nan stays nan.
void grid_of(const Rule& rule, float lo, float hi, float* scale, float* zero) {
    float span = -lo > hi || lo != lo ? -lo : hi;
    if (!rule.symmetric) {
        lo = lo > 0.0f ? 0.0f : lo;
        hi = hi < 0.0f ? 0.0f : hi;
        span = hi - lo;
    }
    const float s = span / rule.levels, least = rule.floor;
    *scale = least > 0.0f ? (s < least ? least : s) : (s == 0.0f ? 1.0f : s);
    const float z = std::nearbyint(-lo / *scale);
    *zero = rule.symmetric ? 0.0f : z < 0.0f ? 0.0f : z > rule.levels ? rule.levels : z;
}

// Codes of channels that are one piece of memory each: finding their extremes brings them into the cache.
template <class Encoder>
void quantize_rows(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale) {
    const int64_t length = view.inner;
    uint32_t numbers[kRun];
    for (int64_t i = 0; i < kRun; i++) numbers[i] = static_cast<uint32_t>(i) * kGolden;
#pragma omp parallel for schedule(static) if (view.channels * length > kAlone)
    for (int64_t r = 0; r < view.channels; r++) {
        float lo, hi, zero;
        uint8_t bytes[kRun];
        run_extremes(x, type, r * length, length).write(&lo, &hi);
        grid_of(rule, lo, hi, scale + r, &zero);
        const float reciprocal = 1.0f / scale[r], low = rule.symmetric ? -rule.levels : 0.0f;
        for (int64_t i = 0; i < length; i += kRun) {
            const int64_t count = std::min(kRun, length - i);
            const uint32_t first = static_cast<uint32_t>(r * length + i) * kGolden + rule.key0;
            const Run run{scale + r, &reciprocal, &zero, low, rule.levels, first, rule.key1, numbers};
            Encoder::encode_run(x, type, r * length + i, count, run, false, has_plain_reciprocal(scale[r]),
                                rule.stochastic, bytes);
            store_codes(bytes, i, count, length, taps, codes + r * length);
        }
    }
}

template <class Encoder>
int quantize(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale) {
    const int64_t scales = rule.samples ? 1 : view.channels;
    if (rule.symmetric && !rule.samples && !rule.lo && view.outer == 1 && !view.channels_last && view.inner >= kShort) {
        quantize_rows<Encoder>(x, type, view, rule, taps, codes, scale);
        return 0;
    }
    std::vector<float> all(3 * scales);
    float *lo = all.data(), *hi = lo + scales, *zero = hi + scales;
    if (rule.lo) {
        std::copy_n(rule.lo, scales, lo);
        std::copy_n(rule.hi, scales, hi);
    } else if (rule.samples) {
        range_of(x, type, view.outer * view.channels * view.inner, rule.samples, lo, hi);
    } else {
        extremes(x, type, view, lo, hi);
    }
    for (int64_t c = 0; c < scales; c++) grid_of(rule, lo[c], hi[c], scale + c, zero + c);
    const float low = rule.symmetric ? -rule.levels : 0.0f;
    encode<Encoder>(x, type, view,
                    {scale, zero, scales, low, rule.levels, false, rule.stochastic, rule.key0, rule.key1}, taps, codes);
    return scales == 1 && *zero == *zero ? static_cast<int>(*zero) : 0;
}

void fake_quantize(const void* x, Type type, View view, const Grid& grid, void* y) {
    const bool offset = grid.offset;
    visit(view, grid, false, [=](const Plan& plan, const Run& run, int64_t record, int64_t first, int64_t count) {
        float buffer[kRun], q[kRun], values[kRun];
        const int64_t from = record * plan.length + first;
        plan.quantize(load(x, type, from, count, buffer), count, run, q);
        const float scale = *run.scale, zero = offset ? *run.zero : 0.0f;
        if (plan.per_number) {
            for (int64_t i = 0; i < count; i++) {
                const float v = q[i] * run.scale[i];
                values[i] = offset ? v + run.zero[i] : v;
            }
        } else {
            for (int64_t i = 0; i < count; i++) {
                const float v = q[i] * scale;
                values[i] = offset ? v + zero : v;
            }
        }
        store(values, count, type, y, from);
    });
}

void round_bf16(const float* x, int64_t count, float* y) {
#pragma omp parallel for schedule(static) if (count > kAlone)
    for (int64_t begin = 0; begin < count; begin += kRun) {
        uint16_t half[kRun];
        const int64_t now = std::min(kRun, count - begin);
        store(x + begin, now, Type::bf16, half, 0);
        load(half, Type::bf16, 0, now, y + begin);
    }
}

void noise(int64_t count, uint32_t key0, uint32_t key1, float* u) {
#pragma omp parallel for schedule(static) if (count > kAlone)
    for (int64_t begin = 0; begin < count; begin += kTask) {
        const int64_t end = std::min(begin + kTask, count);
        for (int64_t i = begin; i < end; i++) u[i] = uniform(static_cast<uint32_t>(i) * kGolden + key0, key1);
    }
}

}  // namespace
}  // namespace lowbit
