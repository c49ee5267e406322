// The passes over memory as functions of Python, whose arguments are those of the schemas in `operators.py`.

#include <algorithm>
#include <functional>

#include "call.h"
#include "passes.h"

namespace lowbit {
namespace {

using Shape = std::array<int64_t, 4>;  // outer, channels, inner, whether channels are last
using Key = std::array<uint32_t, 2>;
using MaybeKey = std::optional<Key>;

const void* floats(Call& call, const char* name, const Memory& m, int64_t count) {
    return call.take(name, m, kFloats, count, count, false);
}
void* write_floats(Call& call, const char* name, const Memory& m, int64_t count) {
    return const_cast<void*>(call.take(name, m, kFloats, count, count, true));
}
uint8_t* write_codes(Call& call, const Memory& m, int64_t count) {
    return static_cast<uint8_t*>(const_cast<void*>(call.take("codes", m, kBytesOnly, count, count, true)));
}

// The view of x's memory; all of it.
View view_of(const Call& call, const Shape& s, const Memory& x) {
    const auto [outer, channels, inner, last] = s;
    if (call.times(call.times(outer, channels), inner) != count_of(x))
        call.refuse("a view of " + std::to_string(outer) + " x " + std::to_string(channels) + " x " +
                    std::to_string(inner) + " of a tensor of " + std::to_string(count_of(x)) + " numbers");
    return {outer, channels, inner, last != 0};
}

// Rows of so many channels.
int64_t rows_of(const Call& call, const Memory& m, int64_t channels) {
    call.need(channels > 0 && count_of(m) % channels == 0, "codes are not whole rows of channels");
    return count_of(m) / channels;
}

// Records of numbers are transposed as a whole.
void check_taps(const Call& call, const View& view, bool one_scale, int64_t taps) {
    call.need(taps > 0, "taps are less than 1");
    if (taps == 1) return;
    const bool by_outer = one_scale || (view.inner < 64 && view.outer > 1);
    call.need(!view.channels_last && (by_outer ? view.channels * view.inner : view.inner) % taps == 0,
              "records are not whole taps, or have their channels last");
}

Grid grid_of(Call& call, const Memory& scale, const Memory& zero, float low, float high, bool offset,
             const MaybeKey& key, int64_t channels) {
    const int64_t scales = count_of(scale);
    call.need(scales == 1 || scales == channels, "there are neither one scale nor one for each channel");
    const auto [first, second] = key.value_or(Key{});
    return {call.reads<float>("scale", scale, scales),
            call.may_read<float>("zero", zero, scales),
            scales,
            low,
            high,
            offset,
            key.has_value(),
            first,
            second};
}

CodeRows codes_of(Call& call, const char* name, const Memory& q, const Memory& scale, int zero, int64_t count) {
    call.need(zero >= 0 && zero <= 255, "the zero point is not a code");
    return {call.reads<uint8_t>(name, q, count), call.reads<float>("code_scale", scale, 1), zero};
}

template <class T>
T* writable(const T* p) {
    return const_cast<T*>(p);
}

Statistics statistics_of(Call& call, const Memory& total, const Memory& mean, const Memory& sigma, const Memory& argmax,
                         const Memory& argmin, const Memory& slopes, int64_t rows, int64_t channels) {
    const int64_t chunks = count_of(slopes), all = call.times(chunks, channels);
    const Statistics stats{chunks ? writable(call.reads<int64_t>("total", total, channels)) : nullptr,
                           writable(call.reads<float>("mean", mean, channels)),
                           writable(call.reads<float>("sigma", sigma, channels)),
                           chunks ? writable(call.reads<int32_t>("argmax", argmax, all)) : nullptr,
                           chunks ? writable(call.reads<int32_t>("argmin", argmin, all)) : nullptr,
                           chunks ? call.reads<float>("slopes", slopes, chunks) : nullptr,
                           chunks};
    for (int64_t i = 0; i < all; i++)
        call.need(stats.argmax[i] >= 0 && stats.argmax[i] < rows && stats.argmin[i] >= 0 && stats.argmin[i] < rows,
                  "argmax and argmin are not rows of the codes");
    return stats;
}

void extremes(const Memory& x, const Shape& shape, const Memory& lo, const Memory& hi) {
    Call call("extremes");
    const View view = view_of(call, shape, x);
    const void* from = floats(call, "x", x, count_of(x));
    float *to_lo = call.writes<float>("lo", lo, view.channels), *to_hi = call.writes<float>("hi", hi, view.channels);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().extremes(from, type_of(x), view, to_lo, to_hi);
}

void sums(const Memory& x, const Memory& to) {
    Call call("sums");
    const int64_t width = count_of(to), count = count_of(x);
    call.need(width > 0 ? count % width == 0 : count == 0, "x is not whole rows of so many sums");
    const void* from = floats(call, "x", x, count);
    float* sums = call.writes<float>("sums", to, width);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().sums(from, type_of(x), width ? count / width : 0, width, sums);
}

void row_sums(const Memory& q, int64_t width, const Memory& to) {
    Call call("row_sums");
    const int64_t rows = count_of(to), count = count_of(q);
    call.need(call.times(rows, width) == count, "the codes are not so many rows of this width");
    const uint8_t* from = call.reads<uint8_t>("q", q, count);
    float* sums = call.writes<float>("sums", to, rows);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().row_sums(from, rows, width, sums);
}

void add_offsets(const Memory& y, const Memory& u, const Memory& o, const Memory& t) {
    Call call("add_offsets");
    const int64_t channels = count_of(o), rows = rows_of(call, y, channels), period = rows_of(call, t, channels);
    call.need(rows > 0 ? count_of(u) > 0 && count_of(u) % rows == 0 : count_of(u) == 0, "u is not whole rows");
    const int64_t groups = rows ? count_of(u) / rows : 1;
    call.need(channels % groups == 0, "channels are not whole groups");
    call.need(period == 0 || rows % period == 0, "t does not repeat over the rows");
    float* to = call.writes<float>("y", y, rows * channels);
    const float *by = call.reads<float>("u", u, rows * groups), *with = call.reads<float>("o", o, channels),
                *more = call.reads<float>("t", t, period * channels);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().add_offsets(to, rows, channels, by, groups, with, more, period);
}

// Samples that lie one after the other.
void check_samples(const Call& call, int64_t count, int64_t samples) {
    call.need(samples > 0 && count > 0 && count % samples == 0, "x is not whole samples, of one number or more");
}

void observe(const Memory& x, int64_t samples, const Memory& range, float momentum, bool first, bool training,
             const Memory& lo, const Memory& hi) {
    Call call("observe");
    check_samples(call, count_of(x), samples);
    const void* from = floats(call, "x", x, count_of(x));
    const Running running{call.writes<float>("running", range, 3), momentum, first, training};
    float *to_lo = call.writes<float>("lo", lo, 1), *to_hi = call.writes<float>("hi", hi, 1);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().observe(from, type_of(x), count_of(x), samples, running, to_lo, to_hi);
}

void quantize(const Memory& x, const Shape& shape, bool symmetric, float levels, float floor, int64_t samples,
              const Memory& lo, const Memory& hi, const MaybeKey& key, int64_t taps, const Memory& codes,
              const Memory& scale, const Memory& zero) {
    Call call("quantize");
    const View view = view_of(call, shape, x);
    const int64_t scales = samples ? 1 : view.channels;
    if (samples) check_samples(call, count_of(x), samples);
    check_taps(call, view, scales == 1, taps);
    const auto [first, second] = key.value_or(Key{});
    const void* from = floats(call, "x", x, count_of(x));
    const Rule rule{symmetric,
                    levels,
                    floor,
                    samples,
                    call.may_read<float>("lo", lo, scales),
                    call.may_read<float>("hi", hi, scales),
                    key.has_value(),
                    first,
                    second};
    call.need(!rule.lo == !rule.hi, "only one end of a range is given");
    uint8_t* to = write_codes(call, codes, count_of(x));
    float* to_scale = call.writes<float>("scale", scale, scales);
    int32_t* to_zero = symmetric ? nullptr : call.writes<int32_t>("zero", zero, 1);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    const int found = passes().quantize(from, type_of(x), view, rule, taps, to, to_scale);
    if (to_zero) *to_zero = found;
}

void code_statistics(const Memory& q, const Memory& scale, int zero, int64_t channels,
                     const std::vector<int64_t>& starts, const Memory& slopes, const Memory& total, const Memory& mean,
                     const Memory& sigma, const Memory& argmax, const Memory& argmin) {
    Call call("code_statistics");
    const int64_t rows = rows_of(call, q, channels), chunks = count_of(slopes);
    call.need(chunks > 0 && static_cast<int64_t>(starts.size()) == chunks + 1,
              "chunks and their slopes differ in number");
    call.need(starts[0] == 0 && starts[chunks] == rows && rows <= std::numeric_limits<int32_t>::max() &&
                  std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<>()) == starts.end(),
              "chunks are not all rows, in their order");
    const int64_t all = call.times(chunks, channels);
    const CodeRows codes = codes_of(call, "codes", q, scale, zero, count_of(q));
    const Statistics found{call.writes<int64_t>("total", total, channels),
                           call.writes<float>("mean", mean, channels),
                           call.writes<float>("sigma", sigma, channels),
                           call.writes<int32_t>("argmax", argmax, all),
                           call.writes<int32_t>("argmin", argmin, all),
                           call.reads<float>("slopes", slopes, chunks),
                           chunks};
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().code_statistics(codes, channels, starts.data(), found);
}

void normalize(const Memory& q, const Memory& scale, int zero, const Memory& total, const Memory& mean,
               const Memory& sigma, const Memory& argmax, const Memory& argmin, const Memory& slopes, float eps,
               bool narrowest, bool inside, const Memory& gamma, const Memory& beta, bool rectify, const Memory& d,
               const Memory& y) {
    Call call("normalize");
    const int64_t channels = count_of(d), rows = rows_of(call, q, channels);
    const CodeRows codes = codes_of(call, "codes", q, scale, zero, rows * channels);
    const Statistics stats = statistics_of(call, total, mean, sigma, argmax, argmin, slopes, rows, channels);
    const float *g = call.may_read<float>("gamma", gamma, channels), *b = call.may_read<float>("beta", beta, channels);
    float* to_d = call.writes<float>("d", d, channels);
    void* to = write_floats(call, "y", y, rows * channels);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().normalize(codes, rows, channels, stats, eps, narrowest, inside, g, b, rectify, to_d, to, type_of(y));
}

void rectify_backward(const Memory& q, const Memory& scale, int zero, const Memory& total, const Memory& mean,
                      const Memory& sigma, const Memory& argmax, const Memory& argmin, const Memory& slopes,
                      const Memory& gamma, const Memory& beta, const Memory& d, int y_type, const Memory& g,
                      const Memory& to) {
    Call call("rectify_backward");
    const int64_t channels = count_of(d), rows = rows_of(call, q, channels);
    const CodeRows codes = codes_of(call, "codes", q, scale, zero, rows * channels);
    const Statistics stats = statistics_of(call, total, mean, sigma, argmax, argmin, slopes, rows, channels);
    const float *a = call.may_read<float>("gamma", gamma, channels), *b = call.may_read<float>("beta", beta, channels);
    const float* divisors = call.reads<float>("d", d, channels);
    const void* from = floats(call, "g", g, rows * channels);
    void* result = write_floats(call, "the result", to, rows * channels);
    call.need(type_of(to) == type_of(g) && (y_type == 0 || y_type == 1), "types of g and of its result differ");
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().rectify_backward(codes, rows, channels, stats, a, b, divisors, static_cast<Type>(y_type), from, type_of(g),
                              result);
}

void normalize_backward(const Memory& g_q, const Memory& g_scale, int g_zero, const Memory& q, const Memory& scale,
                        int zero, const Memory& total, const Memory& mean, const Memory& sigma, const Memory& argmax,
                        const Memory& argmin, const Memory& slopes, bool inside, const Memory& gamma, const Memory& d,
                        const Memory& grad_gamma, const Memory& grad_beta, const Memory& dx) {
    Call call("normalize_backward");
    const int64_t channels = count_of(d), rows = rows_of(call, q, channels);
    const CodeRows g = codes_of(call, "g", g_q, g_scale, g_zero, rows * channels),
                   codes = codes_of(call, "codes", q, scale, zero, rows * channels);
    const Statistics stats = statistics_of(call, total, mean, sigma, argmax, argmin, slopes, rows, channels);
    const float *a = call.may_read<float>("gamma", gamma, channels), *divisors = call.reads<float>("d", d, channels);
    float* to_gamma = call.writes<float>("grad_gamma", grad_gamma, channels);
    float* to_beta = call.writes<float>("grad_beta", grad_beta, channels);
    void* to = write_floats(call, "dx", dx, rows * channels);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().normalize_backward(g, codes, rows, channels, stats, inside, a, divisors, to_gamma, to_beta, to,
                                type_of(dx));
}

void code_sums(const Memory& a, const Memory& b, const Memory& sum, const Memory& product) {
    Call call("code_sums");
    const int64_t channels = count_of(sum), rows = rows_of(call, a, channels);
    const uint8_t *from = call.reads<uint8_t>("a", a, count_of(a)), *with = call.may_read<uint8_t>("b", b, count_of(a));
    int64_t *to = call.writes<int64_t>("sums", sum, channels),
            *to_product = call.writes<int64_t>("products", product, channels);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().code_sums(from, with, rows, channels, to, to_product);
}

void affine(const Memory& q, const Memory& a, const Memory& b, bool relu, const Memory& y) {
    Call call("affine");
    const int64_t channels = count_of(a), rows = rows_of(call, q, channels);
    const uint8_t* codes = call.reads<uint8_t>("q", q, count_of(q));
    const float *scale = call.reads<float>("a", a, channels), *add = call.reads<float>("b", b, channels);
    void* to = write_floats(call, "y", y, count_of(q));
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().affine(codes, rows, channels, scale, add, relu, to, type_of(y));
}

void encode(const Memory& x, const Shape& shape, const Memory& scale, const Memory& zero, float low, float high,
            bool offset, const MaybeKey& key, int64_t taps, const Memory& codes) {
    Call call("encode");
    const View view = view_of(call, shape, x);
    const void* from = floats(call, "x", x, count_of(x));
    const Grid grid = grid_of(call, scale, zero, low, high, offset, key, view.channels);
    check_taps(call, view, grid.scales == 1, taps);
    uint8_t* to = write_codes(call, codes, count_of(x));
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().encode(from, type_of(x), view, grid, taps, to);
}

// `block`: rows and columns of one; the scales are as many as there are blocks.
void encode_blocks(const Memory& x, int64_t width, const std::array<int64_t, 2>& block, float levels, float floor,
                   bool floor_power, const MaybeKey& key, const Memory& codes, const Memory& scale) {
    Call call("encode_blocks");
    const auto [high, wide] = block;
    call.need(high > 0 && wide > 0, "a block has less than one row or column");
    call.need(levels >= 1 && levels <= 127, "the largest code is not 1 to 127");
    const int64_t rows = rows_of(call, x, width);
    const int64_t blocks = call.times((rows - 1) / high + (rows > 0), (width - 1) / wide + 1);
    const auto [first, second] = key.value_or(Key{});
    const void* from = floats(call, "x", x, count_of(x));
    uint8_t* to = write_codes(call, codes, count_of(x));
    float* to_scale = call.writes<float>("scale", scale, blocks);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().encode_blocks(from, type_of(x), rows, width,
                           {high, wide, levels, floor, floor_power, key.has_value(), first, second}, to, to_scale);
}

void hadamard(const Memory& x, int64_t width, bool along, const Memory& signs, int64_t size, float factor,
              const Memory& y) {
    Call call("hadamard");
    const int64_t rows = rows_of(call, x, width);
    call.need(size >= 2 && size <= 1024 && (size & (size - 1)) == 0, "the size is not a power of two from 2 to 1024");
    call.need((along ? width : rows) % size == 0, "the axis is not whole blocks");
    const float *from = call.reads<float>("x", x, count_of(x)), *of = call.may_read<float>("signs", signs, size);
    float* to = call.writes<float>("y", y, count_of(x));
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().hadamard(from, rows, width, along, size, of, factor, to);
}

void fake_quantize(const Memory& x, const Shape& shape, const Memory& scale, const Memory& zero, float low, float high,
                   bool offset, const MaybeKey& key, const Memory& y) {
    Call call("fake_quantize");
    const View view = view_of(call, shape, x);
    const void* from = floats(call, "x", x, count_of(x));
    const Grid grid = grid_of(call, scale, zero, low, high, offset, key, view.channels);
    void* to = write_floats(call, "y", y, count_of(x));
    call.need(type_of(x) == type_of(y), "types of x and y differ");
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().fake_quantize(from, type_of(x), view, grid, to);
}

void round_bf16(const Memory& x, const Memory& y) {
    Call call("round_bf16");
    const float* from = call.reads<float>("x", x, count_of(x));
    float* to = call.writes<float>("y", y, count_of(x));
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().round_bf16(from, count_of(x), to);
}

// So many blocks as there are scales.
void check_blocks(const Call& call, int64_t count, int64_t block, int64_t scales) {
    call.need(block > 0, "a block has less than 1 number");
    call.need(count / block + (count % block > 0) == scales, "there is not one scale for each block");
}

void encode_book(const Memory& x, int64_t block, const Memory& values, const Memory& limits, const Memory& starts,
                 const MaybeKey& key, const Memory& codes, const Memory& scales) {
    Call call("encode_book");
    const int64_t count = count_of(x);
    check_blocks(call, count, block, count_of(scales));
    const auto [first, second] = key.value_or(Key{});
    const void* from = floats(call, "x", x, count);
    const Book book{call.reads<float>("values", values, 512),
                    call.reads<float>("limits", limits, 512),
                    call.reads<int32_t>("starts", starts, 131072),
                    key.has_value(),
                    first,
                    second};
    // A larger code would read beyond the rows: the last number of the book by noise, the last limit otherwise.
    const int32_t most = key ? 254 : 255;
    for (int64_t i = 0; i < 131072; i++)
        call.need(book.starts[i] >= 0 && book.starts[i] <= most, "starts are not codes");
    for (int64_t row = 0; row < 2; row++)
        call.need(!(book.limits[row * 256 + most] < std::numeric_limits<float>::infinity()), "limits have no end");
    uint8_t* to = call.writes<uint8_t>("codes", codes, count);
    float* to_scales = call.writes<float>("scales", scales, count_of(scales));
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().encode_book(from, type_of(x), count, block, book, to, to_scales);
}

void decode_book(const Memory& codes, const Memory& scales, int64_t block, const Memory& values, const Memory& y) {
    Call call("decode_book");
    const int64_t count = count_of(y);
    check_blocks(call, count, block, count_of(scales));
    const uint8_t* from = call.reads<uint8_t>("codes", codes, count);
    const float *by = call.reads<float>("scales", scales, count_of(scales)),
                *numbers = call.reads<float>("values", values, 512);
    float* to = call.writes<float>("y", y, count);
    call.check_disjoint();
    const nb::gil_scoped_release release;
    passes().decode_book(from, by, count, block, numbers, to);
}

void noise(const Key& key, const Memory& u) {
    Call call("noise");
    float* to = call.writes<float>("u", u, count_of(u));
    const nb::gil_scoped_release release;
    passes().noise(count_of(u), key[0], key[1], to);
}

}  // namespace

void bind_passes(nb::module_& m) {
    m.def("extremes", &extremes);
    m.def("sums", &sums);
    m.def("row_sums", &row_sums);
    m.def("add_offsets", &add_offsets);
    m.def("observe", &observe);
    m.def("quantize", &quantize);
    m.def("code_statistics", &code_statistics);
    m.def("normalize", &normalize);
    m.def("rectify_backward", &rectify_backward);
    m.def("normalize_backward", &normalize_backward);
    m.def("code_sums", &code_sums);
    m.def("affine", &affine);
    m.def("encode", &encode);
    m.def("encode_blocks", &encode_blocks);
    m.def("hadamard", &hadamard);
    m.def("fake_quantize", &fake_quantize);
    m.def("round_bf16", &round_bf16);
    m.def("noise", &noise);
    m.def("encode_book", &encode_book);
    m.def("decode_book", &decode_book);
}

}  // namespace lowbit
