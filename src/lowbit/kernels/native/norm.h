// Normalisation of codes of rows by channels, forward and backward.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "runs.h"
#include "sums.h"

namespace lowbit {
namespace {

// Visit rows by channels in runs: work(first number, count, a and b of each number's channel).
template <class Work>
void by_channel(int64_t rows, int64_t channels, const float* a, const float* b, const Work& work) {
    if (rows * channels == 0) return;
    const int64_t together = std::max<int64_t>(1, kRun / channels);  // rows of one piece, whose factors are repeated
    const int64_t width = std::min(together * channels, std::max(kRun, channels));
    std::vector<float> all_a(width), all_b(width);
    for (int64_t i = 0; i < width; i++) {
        all_a[i] = a[i % channels];
        all_b[i] = b[i % channels];
    }
    const int64_t total = rows * channels;
#pragma omp parallel for schedule(static) if (total > kAlone)
    for (int64_t first = 0; first < total; first += width)
        for (int64_t i = first; i < std::min(first + width, total); i += kRun)
            work(i, std::min({kRun, total - i, first + width - i}), all_a.data() + (i - first),
                 all_b.data() + (i - first));
}

// y = a q + b in each channel, and where `relu` no less than 0.
void affine(const uint8_t* q, int64_t rows, int64_t channels, const float* a, const float* b, bool relu, void* y,
            Type type) {
    const float bottom = relu ? 0.0f : -std::numeric_limits<float>::infinity();
    by_channel(rows, channels, a, b, [=](int64_t i, int64_t count, const float* scale, const float* add) {
        float values[kRun];
        const uint8_t* codes = q + i;
        for (int64_t j = 0; j < count; j++) {
            const float v = static_cast<float>(codes[j]) * scale[j] + add[j];
            values[j] = v < bottom ? bottom : v;
        }
        store(values, count, type, y, i);
    });
}

// The factors that make y = a q + b of the codes of a channel.
struct Factors {
    std::vector<float> a, b;

    Factors(const CodeRows& codes, int64_t channels, const Statistics& stats, const float* gamma, const float* beta,
            const float* d)
        : a(channels), b(channels) {
        const float scale = *codes.scale, zero = static_cast<float>(codes.zero) * scale;
        for (int64_t c = 0; c < channels; c++) {
            const float slope = (gamma ? gamma[c] : 1.0f) / d[c];
            a[c] = slope * scale;
            b[c] = (beta ? beta[c] : 0.0f) - slope * (stats.mean[c] + zero);
        }
    }
};

void normalize(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats, float eps,
               bool narrowest, bool inside, const float* gamma, const float* beta, bool rectify, float* d, void* y,
               Type type) {
    // Values in one code may differ by a step: a range of one step takes the place of their sigma of 0.
    float step = 0.0f;
    for (int64_t k = 0; k < stats.chunks; k++) step += stats.slopes[k] * *codes.scale;
    for (int64_t c = 0; c < channels; c++) {
        const float sigma = narrowest && stats.chunks && stats.sigma[c] == 0.0f ? step : stats.sigma[c];
        d[c] = inside ? std::sqrt(sigma * sigma + eps) : sigma + eps;
    }
    const Factors factors(codes, channels, stats, gamma, beta, d);
    affine(codes.q, rows, channels, factors.a.data(), factors.b.data(), rectify, y, type);
}

// y is made anew from its codes; nan is not 0 or less.
void rectify_backward(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats,
                      const float* gamma, const float* beta, const float* d, Type y_type, const void* g, Type type,
                      void* to) {
    const Factors factors(codes, channels, stats, gamma, beta, d);
    const float least = y_type == Type::bf16 ? 0x1p-134f : 0.0f;  // what rounds to 0
    by_channel(rows, channels, factors.a.data(), factors.b.data(),
               [=](int64_t i, int64_t count, const float* a, const float* b) {
                   float buffer[kRun], values[kRun];
                   const float* v = load(g, type, i, count, buffer);
                   const uint8_t* q = codes.q + i;
                   for (int64_t j = 0; j < count; j++)
                       values[j] = static_cast<float>(q[j]) * a[j] + b[j] <= least ? 0.0f : v[j];
                   store(values, count, type, to, i);
               });
}

// The extremes of chunk k receive plus and minus the gradient of its range, beside the affine part of their gradient.
void add_at_extremes(const uint8_t* g, int64_t channels, const Statistics& stats, const float* a, const float* b,
                     const float* grad_sigma, void* dx, Type type) {
    for (int64_t k = 0; k < stats.chunks; k++)
        for (int64_t c = 0; c < channels; c++) {
            const int64_t i = k * channels + c;
            // Chunks do not overlap, so a number is one largest and one smallest at most; of a constant chunk it is
            // both.
            const float share = stats.argmax[i] == stats.argmin[i] ? 0.0f : grad_sigma[c] * stats.slopes[k];
            const int64_t top = stats.argmax[i] * channels + c, bottom = stats.argmin[i] * channels + c;
            const float high = static_cast<float>(g[top]) * a[c] + b[c] + share;
            const float low = static_cast<float>(g[bottom]) * a[c] + b[c] - share;
            store(&high, 1, type, dx, top);
            store(&low, 1, type, dx, bottom);
        }
}

void normalize_backward(const CodeRows& g, const CodeRows& codes, int64_t rows, int64_t channels,
                        const Statistics& stats, bool inside, const float* gamma, const float* d, float* grad_gamma,
                        float* grad_beta, void* dx, Type type) {
    std::vector<int64_t> sum(channels), product(channels), total(channels);
    code_sums(g.q, codes.q, rows, channels, sum.data(), product.data());
    if (stats.chunks)
        std::copy_n(stats.total, channels, total.data());
    else
        code_sums(codes.q, nullptr, rows, channels, total.data(), nullptr);
    std::vector<float> a(channels), b(channels), grad_sigma(channels);
    const double g_scale = *g.scale, scale = *codes.scale, count = static_cast<double>(rows);
    for (int64_t c = 0; c < channels; c++) {
        // Sums are exact whole numbers until they are scaled.
        const double sum_g = static_cast<double>(sum[c]) - count * g.zero;
        const double sum_q = static_cast<double>(total[c]);
        const double both = static_cast<double>(product[c]) - g.zero * sum_q - codes.zero * sum_g;
        const double centred = both * (g_scale * scale) - stats.mean[c] * (sum_g * g_scale);
        grad_gamma[c] = static_cast<float>(centred / d[c]);
        grad_beta[c] = static_cast<float>(sum_g * g_scale);
        const float weight = gamma ? gamma[c] : 1.0f, slope = weight / d[c];
        const float average = stats.chunks ? grad_beta[c] / static_cast<float>(rows) : 0.0f;
        a[c] = slope * *g.scale;
        b[c] = -slope * (static_cast<float>(g.zero) * *g.scale + average);
        grad_sigma[c] = -weight * grad_gamma[c] / d[c] * (inside ? stats.sigma[c] / d[c] : 1.0f);
    }
    affine(g.q, rows, channels, a.data(), b.data(), false, dx, type);
    add_at_extremes(g.q, channels, stats, a.data(), b.data(), grad_sigma.data(), dx, type);
}

}  // namespace
}  // namespace lowbit
