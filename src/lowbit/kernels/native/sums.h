// Sums of columns and of codes, and what one batch of codes says of each channel.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "runs.h"

namespace lowbit {
namespace {

// Of each of `width` columns of a matrix: in float32 over blocks of rows, in float64 over blocks and over a fixed
// number of ranges of rows, in their order, so that the number of threads does not show.
void sums(const void* x, Type type, int64_t rows, int64_t width, float* to) {
    constexpr int64_t kBlock = 64, kRanges = 16;
    const int64_t blocks = ceil_div(rows, kBlock), ranges = std::min(kRanges, blocks);
    std::vector<double> parts(ranges * width, 0.0);
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
    for (int64_t range = 0; range < ranges; range++) {
        double* mine = parts.data() + range * width;
        float buffer[kRun], block[kRun];
        for (int64_t number = range * blocks / ranges; number < (range + 1) * blocks / ranges; number++) {
            const int64_t first = number * kBlock, last = std::min(first + kBlock, rows);
            for (int64_t c = 0; c < width; c += kRun) {
                const int64_t count = std::min(kRun, width - c);
                std::fill_n(block, count, 0.0f);
                for (int64_t r = first; r < last; r++) {
                    const float* v = load(x, type, r * width + c, count, buffer);
                    for (int64_t i = 0; i < count; i++) block[i] += v[i];
                }
                for (int64_t i = 0; i < count; i++) mine[c + i] += static_cast<double>(block[i]);
            }
        }
    }
    for (int64_t c = 0; c < width; c++) {
        double total = 0.0;
        for (int64_t range = 0; range < ranges; range++) total += parts[range * width + c];
        to[c] = static_cast<float>(total);
    }
}

// Of each row of `width` codes.
void row_sums(const uint8_t* q, int64_t rows, int64_t width, float* to) {
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
    for (int64_t r = 0; r < rows; r++) {
        uint64_t total = 0;
        for (int64_t first = 0; first < width; first += 1 << 16) {
            const uint8_t* row = q + r * width + first;
            const int64_t count = std::min<int64_t>(1 << 16, width - first);
            uint32_t part = 0;
            for (int64_t i = 0; i < count; i++) part += row[i];
            total += part;
        }
        to[r] = static_cast<float>(total);
    }
}

// y[r, c] += u[r, g] o[c] + t[r % period, c], where g is the group of channels that c belongs to.
void add_offsets(float* y, int64_t rows, int64_t channels, const float* u, int64_t groups, const float* o,
                 const float* t, int64_t period) {
    const int64_t width = channels / groups;
#pragma omp parallel for schedule(static) if (rows * channels > kAlone)
    for (int64_t r = 0; r < rows; r++) {
        float* row = y + r * channels;
        for (int64_t g = 0; g < groups; g++) {
            const float by = u[r * groups + g];
            for (int64_t c = g * width; c < (g + 1) * width; c++) row[c] += by * o[c];
        }
        if (!period) continue;
        const float* more = t + r % period * channels;
        for (int64_t c = 0; c < channels; c++) row[c] += more[c];
    }
}

constexpr int64_t kFew = 256;  // codes whose sum fits in 16 bits

// Rows that are taken as one, so that vectors are full where channels are few.
int64_t folded(int64_t channels) { return channels >= 64 ? 1 : 64 / channels; }

// Add each code to a sum of its place.
void add_codes(const uint8_t* a, int64_t count, uint16_t* sums) {
    for (int64_t i = 0; i < count; i++) sums[i] = static_cast<uint16_t>(sums[i] + a[i]);
}
void add_products(const uint8_t* a, const uint8_t* b, int64_t count, uint32_t* sums) {
    for (int64_t i = 0; i < count; i++)
        sums[i] +=
            static_cast<uint32_t>(static_cast<uint16_t>(static_cast<uint16_t>(a[i]) * static_cast<uint16_t>(b[i])));
}

// Of `count` columns (`full`: 64) of rows `stride` apart, no more than kFew: extremes and sums so far.
template <bool full>
void add_rows(const uint8_t* q, int64_t rows, int64_t stride, int64_t count, uint8_t* top, uint8_t* bottom,
              uint16_t* sums) {
    const int64_t width = full ? 64 : count;
    uint8_t t[64], b[64];
    uint16_t s[64];
    std::copy_n(top, width, t);
    std::copy_n(bottom, width, b);
    std::copy_n(sums, width, s);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = q + r * stride;
        for (int64_t j = 0; j < width; j++) {
            t[j] = row[j] > t[j] ? row[j] : t[j];
            b[j] = row[j] < b[j] ? row[j] : b[j];
            s[j] = static_cast<uint16_t>(s[j] + row[j]);
        }
    }
    std::copy_n(t, width, top);
    std::copy_n(b, width, bottom);
    std::copy_n(s, width, sums);
}

// Of each channel in rows [first, last): the largest and the smallest code, the first row that has it, and the sum.
// Extremes of blocks of rows tell which block to search.
void chunk_extremes(const uint8_t* q, int64_t first, int64_t last, int64_t channels, uint8_t* high, uint8_t* low,
                    int32_t* argmax, int32_t* argmin, int64_t* sum) {
    const int64_t fold = folded(channels), width = fold * channels, step = 64 * fold;
    const int64_t blocks = ceil_div(last - first, step);
    std::vector<uint8_t> tops(blocks * width, 0), bottoms(blocks * width, 255);
    std::vector<uint16_t> few(width);
    std::fill_n(sum, channels, 0);
    for (int64_t k = 0; k < blocks; k++) {
        const int64_t begin = first + k * step, rows = std::min(step, last - begin);
        const uint8_t* block = q + begin * channels;
        uint8_t *top = tops.data() + k * width, *bottom = bottoms.data() + k * width;
        std::fill(few.begin(), few.end(), uint16_t{0});
        for (int64_t c = 0; c < width; c += 64) {
            const int64_t count = std::min<int64_t>(64, width - c), rest = rows % fold * channels - c;
            const auto add = count == 64 ? add_rows<true> : add_rows<false>;
            uint16_t* sums = few.data() + c;
            add(block + c, rows / fold, width, count, top + c, bottom + c, sums);
            if (rest > 0) add_rows<false>(block + rows / fold * width + c, 1, width, rest, top + c, bottom + c, sums);
        }
        for (int64_t i = 0; i < width; i++) {
            const int64_t c = i % channels;
            top[c] = std::max(top[c], top[i]);
            bottom[c] = std::min(bottom[c], bottom[i]);
            sum[c] += few[i];
        }
    }
    const auto find = [=](const std::vector<uint8_t>& of, int64_t c, uint8_t code) {
        int64_t k = 0;
        while (of[k * width + c] != code) k++;
        int64_t r = first + k * step;
        while (q[r * channels + c] != code) r++;
        return static_cast<int32_t>(r);
    };
    for (int64_t c = 0; c < channels; c++) {
        high[c] = tops[c];
        low[c] = bottoms[c];
        for (int64_t k = 1; k < blocks; k++) {
            high[c] = std::max(high[c], tops[k * width + c]);
            low[c] = std::min(low[c], bottoms[k * width + c]);
        }
        argmax[c] = find(tops, c, high[c]);
        argmin[c] = find(bottoms, c, low[c]);
    }
}

void code_statistics(const CodeRows& codes, int64_t channels, const int64_t* starts, const Statistics& to) {
    const int64_t chunks = to.chunks, rows = starts[chunks];
    std::vector<uint8_t> high(chunks * channels), low(chunks * channels);
    std::vector<int64_t> sum(chunks * channels);
    Guard guard;
#pragma omp parallel for schedule(dynamic) if (rows * channels > kAlone)
    for (int64_t k = 0; k < chunks; k++)
        guard([&] {
            const int64_t at = k * channels;
            chunk_extremes(codes.q, starts[k], starts[k + 1], channels, high.data() + at, low.data() + at,
                           to.argmax + at, to.argmin + at, sum.data() + at);
        });
    guard.rethrow();
    const float scale = *codes.scale;
    for (int64_t c = 0; c < channels; c++) {
        double sigma = 0.0;
        to.total[c] = 0;
        for (int64_t k = 0, i = c; k < chunks; k++, i += channels) {
            to.total[c] += sum[i];
            sigma += static_cast<double>(static_cast<float>(high[i] - low[i]) * scale * to.slopes[k]);
        }
        const double mean = static_cast<double>(to.total[c]) / static_cast<double>(rows);
        to.mean[c] = static_cast<float>((mean - codes.zero) * static_cast<double>(scale));
        to.sigma[c] = static_cast<float>(sigma);
    }
}

// Of each channel: the sum of a's codes, and of a's times b's where there is a b.
void code_sums(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t* sum, int64_t* product) {
    constexpr int64_t kMany = 64 * kFew;  // rows whose products fit in 32 bits
    const int64_t fold = folded(channels), width = fold * channels;
    std::fill_n(sum, channels, 0);
    if (b) std::fill_n(product, channels, 0);
    Guard guard;
#pragma omp parallel if (rows * channels > kAlone)
    {
        std::vector<uint16_t> few;
        std::vector<uint32_t> s, p;
        guard([&] {
            few.resize(width);
            s.resize(width);
            p.resize(width);
        });
        const auto work = [&](int64_t first) {
            const int64_t last = std::min(first + kMany, rows);
            std::fill(s.begin(), s.end(), 0u);
            std::fill(p.begin(), p.end(), 0u);
            for (int64_t begin = first; begin < last; begin += kFew * fold) {
                const int64_t end = std::min(begin + kFew * fold, last);
                std::fill(few.begin(), few.end(), uint16_t{0});
                for (int64_t r = begin; r < end; r += fold) {
                    const int64_t count = std::min(fold, end - r) * channels;
                    add_codes(a + r * channels, count, few.data());
                    if (b) add_products(a + r * channels, b + r * channels, count, p.data());
                }
                for (int64_t i = 0; i < width; i++) s[i] += few[i];
            }
#pragma omp critical(lowbit_code_sums)
            for (int64_t i = 0; i < width; i++) {
                sum[i % channels] += s[i];
                if (b) product[i % channels] += p[i];
            }
        };
#pragma omp for schedule(dynamic) nowait
        for (int64_t first = 0; first < rows; first += kMany) guard([&] { work(first); });
    }
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
