// Passes over memory: extremes, codes, values on the grid, noise. Plain loops that the compiler turns into vectors, but
// for codes on AVX-512; this file is compiled once for each instruction set, and LOWBIT_ISA names the copy.
//
// Every result equals that of the torch twin bit for bit: rounding is to even, x / S is correctly rounded, and nothing
// is contracted.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "cpu.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int64_t kRun = 1024;       // numbers that are worked on at a time, in the first-level cache
constexpr int64_t kTask = 1 << 15;   // numbers of one thread's piece of work
constexpr int64_t kAlone = 1 << 17;  // numbers for which waking other threads costs more than it gains
constexpr int64_t kShort = 64;       // runs of one scale shorter than this are worked on with a scale for each number

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The numbers x[0, count) as float: in place for float32, else converted into `buffer`.
const float* load(const void* x, Type type, int64_t first, int64_t count, float* buffer) {
    if (type == Type::f32) return static_cast<const float*>(x) + first;
    const uint16_t* half = static_cast<const uint16_t*>(x) + first;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
        std::memcpy(buffer + i, &bits, 4);
    }
    return buffer;
}

void store(const float* from, int64_t count, Type type, void* y, int64_t first) {
    if (type == Type::f32) {
        std::memcpy(static_cast<float*>(y) + first, from, count * sizeof(float));
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(y) + first;
    for (int64_t i = 0; i < count; i++) {
        uint32_t u;
        std::memcpy(&u, from + i, 4);
        const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
        half[i] = static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

// ---- extremes ----

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

inline float as_float(float v) { return v; }
inline float as_float(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

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
            const float v = as_float(x[i + j]);
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
            bad[j] |= v != v;
        }
    for (; i < count; i++) {
        const float v = as_float(x[i]);
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

// ---- sums ----

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

// ---- codes of a matrix of rows by channels ----

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
    // Equal codes are told apart to a step only: ranges of one take the place of their sigma of 0.
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
            // Chunks are apart, so a number is one largest and one smallest at most; of a constant chunk it is both.
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

// ---- codes ----

// Correctly rounded x / S: two corrections of x times the rounded 1 / S (Markstein 1990). What is far beyond any grid
// needs none: they would make nan of a product that overflowed.
inline float divide(float x, float scale, float reciprocal) {
    const float first = x * reciprocal;
    const float second = std::fma(std::fma(-first, scale, x), reciprocal, first);
    const float third = std::fma(std::fma(-second, scale, x), reciprocal, second);
    return std::fabs(first) < 0x1p40f ? third : first;
}

// Halves to even for |t| < 2**22, which clamping saw to.
inline float round_even(float t) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2**23
    return (t + kMagic) - kMagic;
}

inline float uniform(uint32_t h, uint32_t key1) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= key1;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f;
}

#ifdef __AVX512BW__
// The same minus 1/2.
inline __m512 centred_noise(__m512i h, __m512i key1) {
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_xor_si512(_mm512_mullo_epi32(h, _mm512_set1_epi32(0x7FEB352D)), key1);
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x846CA68Bu)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    const __m512 u = _mm512_cvtepi32_ps(_mm512_srli_epi32(h, 8));
    return _mm512_fmsub_ps(u, _mm512_set1_ps(0x1p-24f), _mm512_set1_ps(0.5f));
}
#endif

constexpr uint32_t kSpread = 0x9E3779B1u;

// Scales and zeros of a run: one for all numbers of it, or one for each.
struct Run {
    const float *scale, *reciprocal, *zero;
    float low, high;
    uint32_t first, key1;     // hashed number of the first element of the noise field
    const uint32_t* numbers;  // what each number of the run adds to it
};

// Codes of x as floats, without the zero point: q - z, or q with an offset.
template <bool each, bool fast, bool offset, bool stochastic>
void quantize_run(const float* x, int64_t count, const Run& r, float* q) {
    const float one_scale = *r.scale, one_reciprocal = *r.reciprocal, one_zero = r.zero ? *r.zero : 0.0f;
    const float low = r.low, high = r.high;
    const uint32_t first = r.first, key1 = r.key1;
    const uint32_t* numbers = r.numbers;
    const float *scales = r.scale, *reciprocals = r.reciprocal, *zeros = r.zero;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float scale = each ? scales[i] : one_scale;
        const float zero = each ? zeros[i] : one_zero;
        const float v = offset ? x[i] - zero : x[i];
        float t = fast ? divide(v, scale, each ? reciprocals[i] : one_reciprocal) : v / scale;
        const float bottom = offset ? low : low - zero, top = offset ? high : high - zero;
        t = t < bottom ? bottom : t;
        t = t > top ? top : t;
        float whole = round_even(t);
        if (stochastic) {
            whole -= whole > t ? 1.0f : 0.0f;
            whole += t - whole > uniform(first + numbers[i], key1) ? 1.0f : 0.0f;
        }
        q[i] = whole;
    }
}

using QuantizeRun = void (*)(const float*, int64_t, const Run&, float*);

template <bool each, bool fast>
QuantizeRun choose(bool offset, bool stochastic) {
    if (offset) return stochastic ? quantize_run<each, fast, true, true> : quantize_run<each, fast, true, false>;
    return stochastic ? quantize_run<each, fast, false, true> : quantize_run<each, fast, false, false>;
}

// Whether the corrections of `divide` stay among normal numbers.
bool is_plain(float scale) {
#ifdef LOWBIT_HAS_FMA
    return scale > 0x1p-60f && scale < 0x1p20f;
#else
    (void)scale;
    return false;
#endif
}

QuantizeRun choose(bool each, bool fast, bool offset, bool stochastic) {
    if (each) return fast ? choose<true, true>(offset, stochastic) : choose<true, false>(offset, stochastic);
    return fast ? choose<false, true>(offset, stochastic) : choose<false, false>(offset, stochastic);
}

// How a tensor is worked on: `records` of `length` numbers, in runs of at most `run`. A run has one scale, or a scale
// for each number; what differs between the numbers of a run stands in tables, read from where the run lies in its
// record, or, `tiled`, from their beginning, since every run of a record is alike.
struct Plan {
    std::vector<float> scale, reciprocal, zero;
    std::vector<uint32_t> numbers;
    int64_t records, length, run;
    bool each = false, tiled = false, fast = true, rows;
    QuantizeRun quantize = nullptr;
    Grid grid;
    View view;

    Plan(const View& v, const Grid& g, bool by_outer) : grid(g), view(v) {
        const bool many = g.scales > 1;
        int64_t repeat = 1, times = 1;
        rows = v.channels_last && (many || g.stochastic);  // channels are what a run goes along
        run = kRun;
        if (rows && v.channels <= kRun) {
            times = std::min(kRun / v.channels, std::max<int64_t>(v.inner, 1));
            records = v.outer, length = v.inner * v.channels, run = times * v.channels;
            each = many, tiled = true;
        } else if (rows) {
            records = v.outer * v.inner, length = v.channels, each = many;
        } else if (!many) {
            records = by_outer ? v.outer : 1, length = v.outer * v.channels * v.inner / records;
        } else if (v.inner < kShort && v.outer > 1) {
            records = v.outer, length = v.channels * v.inner, each = true, repeat = v.inner;
        } else {
            records = v.outer * v.channels, length = v.inner;
        }
        for (int64_t t = 0; t < (each ? times : 1); t++)
            for (int64_t s = 0; s < g.scales; s++) {
                const float value = g.scale[s];
                fast = fast && is_plain(value);
                scale.insert(scale.end(), repeat, value);
                reciprocal.insert(reciprocal.end(), repeat, 1.0f / value);
                zero.insert(zero.end(), repeat, g.zero ? g.zero[s] : 0.0f);
            }
        if (g.stochastic) {
            numbers.resize(rows ? times * v.channels : kRun);
            for (int64_t i = 0; i < static_cast<int64_t>(numbers.size()); i++) {
                const int64_t number = rows ? i % v.channels * v.inner + i / v.channels : i;
                numbers[i] = static_cast<uint32_t>(number) * kSpread;
            }
        }
        quantize = choose(each, fast, g.offset, g.stochastic);
    }

    // The run that begins at number i of a record.
    Run at(int64_t record, int64_t i) const {
        const int64_t table = each ? (tiled ? 0 : i) : grid.scales == 1 ? 0 : record % view.channels;
        int64_t number = record * length + i;
        if (rows && tiled) number = record * length + i / view.channels;
        if (rows && !tiled) number = record / view.inner * view.channels * view.inner + record % view.inner;
        return {scale.data() + table,
                reciprocal.data() + table,
                zero.data() + table,
                grid.low,
                grid.high,
                static_cast<uint32_t>(number) * kSpread + grid.key0,
                grid.key1,
                numbers.data() + (rows && !tiled ? i : 0)};
    }
};

// Visit the tensor in runs: work(Plan, Run, record, first number in the record, count). `by_outer` makes a record of
// each index of `outer` where one scale serves all.
template <class Work>
void visit(View view, const Grid& grid, bool by_outer, const Work& work) {
    if (view.outer * view.channels * view.inner == 0) return;
    const Plan plan(view, grid, by_outer);
    const int64_t runs = ceil_div(plan.length, plan.run);                                 // of a record
    const int64_t batch = std::max<int64_t>(1, kTask / std::min(plan.run, plan.length));  // runs of one task
    const int64_t total = plan.records * runs;
#pragma omp parallel for schedule(static) if (total * plan.run > kAlone)
    for (int64_t task = 0; task < ceil_div(total, batch); task++) {
        const int64_t last = std::min((task + 1) * batch, total);
        for (int64_t part = task * batch; part < last; part++) {
            const int64_t record = part / runs, i = part % runs * plan.run;
            work(plan, plan.at(record, i), record, i, std::min(plan.run, plan.length - i));
        }
    }
}

#ifdef __AVX512BW__
// As `bytes_of`, 16 numbers at a time. Stochastic rounding of t with noise u is rounding of t - u + 1/2 to nearest, but
// where that lies half way. So x times 1 / S rounds as x / S does unless it lies next to half way, by less than a
// margin wider than the two can differ (codes are bytes): then the 16 are divided, and rounded as they are defined to
// be.
template <bool half, bool each, bool stochastic>
void quick_bytes(const void* x, int64_t from, int64_t count, const Run& r, uint8_t* bytes) {
    const auto table = [](const float* t, int64_t i, __mmask16 here) {
        return each ? _mm512_maskz_loadu_ps(here, t + i) : _mm512_set1_ps(*t);
    };
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2**23: sums with it are whole, their last byte the code
    const __m512 unsure = _mm512_set1_ps(0.5f - 0x1p-14f), middle = _mm512_set1_ps(0.5f);
    const __m512 low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    const __m512i first = _mm512_set1_epi32(static_cast<int>(r.first));
    const __m512i key = _mm512_set1_epi32(static_cast<int>(r.key1));
    __m512 zero = table(r.zero, 0, 0), reciprocal = table(r.reciprocal, 0, 0), shift = zero;
    __m512 bottom = _mm512_sub_ps(low, zero), top = _mm512_sub_ps(high, zero), whole = _mm512_add_ps(magic, zero);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 here = static_cast<__mmask16>(count - i < 16 ? (1 << (count - i)) - 1 : 0xFFFF);
        __m512 v;
        if (half) {
            const __m256i bits = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(x) + from + i);
            v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        } else {
            v = _mm512_maskz_loadu_ps(here, static_cast<const float*>(x) + from + i);
        }
        if (each) {
            zero = table(r.zero, i, here), reciprocal = table(r.reciprocal, i, here);
            bottom = _mm512_sub_ps(low, zero), top = _mm512_sub_ps(high, zero), whole = _mm512_add_ps(magic, zero);
        }
        // Within the bounds; nan stays nan.
        __m512 t = _mm512_min_ps(top, _mm512_max_ps(bottom, _mm512_mul_ps(v, reciprocal)));
        if (stochastic) {
            shift = centred_noise(_mm512_add_epi32(first, _mm512_maskz_loadu_epi32(here, r.numbers + i)), key);
            t = _mm512_sub_ps(t, shift);
        }
        __m512 code = _mm512_add_ps(t, whole);
        const __m512 part = _mm512_sub_ps(t, _mm512_sub_ps(code, whole));
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(part), unsure, _CMP_GT_OQ)) {
            t = _mm512_div_ps(v, table(r.scale, i, here));
            t = _mm512_min_ps(top, _mm512_max_ps(bottom, t));
            __m512 q = _mm512_roundscale_ps(t, stochastic ? _MM_FROUND_TO_NEG_INF : _MM_FROUND_TO_NEAREST_INT);
            if (stochastic) {
                const __mmask16 up = _mm512_cmp_ps_mask(_mm512_sub_ps(t, q), _mm512_add_ps(shift, middle), _CMP_GT_OQ);
                q = _mm512_mask_add_ps(q, up, q, _mm512_set1_ps(1.0f));
            }
            code = _mm512_add_ps(q, whole);
        }
        const __m128i last = _mm512_cvtepi32_epi8(_mm512_castps_si512(code));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), last);
    }
}

template <bool half>
void quick_bytes(const void* x, int64_t from, int64_t count, const Run& r, bool each, bool stochastic, uint8_t* bytes) {
    if (each)
        return stochastic ? quick_bytes<half, true, true>(x, from, count, r, bytes)
                          : quick_bytes<half, true, false>(x, from, count, r, bytes);
    return stochastic ? quick_bytes<half, false, true>(x, from, count, r, bytes)
                      : quick_bytes<half, false, false>(x, from, count, r, bytes);
}
#endif

// Codes of the numbers x[from, from + count) as bytes, whose place has room for a whole run.
void bytes_of(const void* x, Type type, int64_t from, int64_t count, const Run& run, bool each, bool fast,
              bool stochastic, uint8_t* bytes) {
#ifdef __AVX512BW__
    if (fast && type == Type::f32) return quick_bytes<false>(x, from, count, run, each, stochastic, bytes);
    if (fast) return quick_bytes<true>(x, from, count, run, each, stochastic, bytes);
#endif
    float buffer[kRun], q[kRun];
    choose(each, fast, false, stochastic)(load(x, type, from, count, buffer), count, run, q);
    const float zero = *run.zero;
    if (each)
        for (int64_t i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i] + run.zero[i]));
    else
        for (int64_t i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i] + zero));
}

// Bytes of a record from number `first` on into its place `to`; with taps transposed from (.., taps) to (taps, ..).
void put(const uint8_t* bytes, int64_t first, int64_t count, int64_t length, int64_t taps, uint8_t* to) {
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

void encode(const void* x, Type type, View view, const Grid& grid, int64_t taps, uint8_t* codes) {
    visit(view, grid, taps > 1, [=](const Plan& plan, const Run& run, int64_t record, int64_t first, int64_t count) {
        uint8_t bytes[kRun];
        const int64_t from = record * plan.length + first;
        if (grid.offset) {
            float buffer[kRun], q[kRun];
            plan.quantize(load(x, type, from, count, buffer), count, run, q);
            for (int64_t i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(q[i]));
        } else {
            bytes_of(x, type, from, count, run, plan.each, plan.fast, grid.stochastic, bytes);
        }
        put(bytes, first, count, plan.length, taps, codes + record * plan.length);
    });
}

// Scale and zero point of a range, in the steps of `lowbit.quantizer.grid_of`; nan stays nan.
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
void quantize_rows(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale) {
    const int64_t length = view.inner;
    uint32_t numbers[kRun];
    for (int64_t i = 0; i < kRun; i++) numbers[i] = static_cast<uint32_t>(i) * kSpread;
#pragma omp parallel for schedule(static) if (view.channels * length > kAlone)
    for (int64_t r = 0; r < view.channels; r++) {
        float lo, hi, zero;
        uint8_t bytes[kRun];
        run_extremes(x, type, r * length, length).write(&lo, &hi);
        grid_of(rule, lo, hi, scale + r, &zero);
        const float reciprocal = 1.0f / scale[r], low = rule.symmetric ? -rule.levels : 0.0f;
        for (int64_t i = 0; i < length; i += kRun) {
            const int64_t count = std::min(kRun, length - i);
            const uint32_t first = static_cast<uint32_t>(r * length + i) * kSpread + rule.key0;
            const Run run{scale + r, &reciprocal, &zero, low, rule.levels, first, rule.key1, numbers};
            bytes_of(x, type, r * length + i, count, run, false, is_plain(scale[r]), rule.stochastic, bytes);
            put(bytes, i, count, length, taps, codes + r * length);
        }
    }
}

int quantize(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale) {
    const int64_t scales = rule.samples ? 1 : view.channels;
    if (rule.symmetric && !rule.samples && !rule.lo && view.outer == 1 && !view.channels_last && view.inner >= kShort) {
        quantize_rows(x, type, view, rule, taps, codes, scale);
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
    encode(x, type, view, {scale, zero, scales, low, rule.levels, false, rule.stochastic, rule.key0, rule.key1}, taps,
           codes);
    return scales == 1 && *zero == *zero ? static_cast<int>(*zero) : 0;
}

void fake_quantize(const void* x, Type type, View view, const Grid& grid, void* y) {
    const bool offset = grid.offset;
    visit(view, grid, false, [=](const Plan& plan, const Run& run, int64_t record, int64_t first, int64_t count) {
        float buffer[kRun], q[kRun], values[kRun];
        const int64_t from = record * plan.length + first;
        plan.quantize(load(x, type, from, count, buffer), count, run, q);
        const float scale = *run.scale, zero = offset ? *run.zero : 0.0f;
        if (plan.each) {
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
        for (int64_t i = begin; i < end; i++) u[i] = uniform(static_cast<uint32_t>(i) * kSpread + key0, key1);
    }
}

}  // namespace

extern const Elementwise kernels;
const Elementwise kernels = {extremes,
                             observe,
                             quantize,
                             sums,
                             code_sums,
                             code_statistics,
                             normalize,
                             rectify_backward,
                             normalize_backward,
                             affine,
                             encode,
                             fake_quantize,
                             round_bf16,
                             noise};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
