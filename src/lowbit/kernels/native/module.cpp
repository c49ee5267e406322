// The Python face of the native kernels. `lowbit.kernels.cpu` says where tensors lie; whether a call stays inside them
// is checked here, before anything is read or written.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <stdexcept>

#include "cpu.h"
#include "machine.h"
#include "passes.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using Address = uintptr_t;
// What lies in memory without gaps: where it begins, the type of its numbers, how many they are. None is of type -1.
using Memory = std::tuple<Address, int, int64_t>;
using Shape = std::tuple<int64_t, int64_t, int64_t, bool>;
using Three = std::array<int64_t, 3>;
using Key = std::optional<std::tuple<uint32_t, uint32_t>>;

constexpr const char* kNames[] = {"float32", "bfloat16", "uint8", "int8", "int32", "int64"};
constexpr int64_t kBytes[] = {4, 2, 1, 1, 4, 8};
constexpr int kFloat32 = 1, kFloats = 1 | 2, kUint8 = 4, kBytesOnly = 4 | 8, kNumbers = 15, kInt32 = 16, kInt64 = 32;

template <class T>
constexpr int set_of() {
    if (std::is_same_v<T, float>) return kFloat32;
    if (std::is_same_v<T, uint8_t>) return kUint8;
    return std::is_same_v<T, int32_t> ? kInt32 : kInt64;
}

// One call of a native function: takes its arguments one by one, and knows in the end which memory it writes.
class Call {
  public:
    explicit Call(const char* function) : function_(function) {}

    [[noreturn]] void refuse(const std::string& why) const { throw std::invalid_argument(function_ + (": " + why)); }
    void need(bool holds, const char* why) const {
        if (!holds) refuse(why);
    }
    int64_t times(int64_t a, int64_t b) const {
        int64_t product;
        need(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), "sizes are less than 0 or beyond 64 bits");
        return product;
    }
    int64_t plus(int64_t a, int64_t b) const {
        int64_t sum;
        need(!__builtin_add_overflow(a, b, &sum), "sizes are beyond 64 bits");
        return sum;
    }

    // Memory of one of the types of a set, with `least` to `most` numbers.
    const void* take(const char* name, const Memory& m, int types, int64_t least, int64_t most, bool written) {
        const auto& [address, type, count] = m;
        if (type < 0 || type > 5 || !(types >> type & 1)) {
            std::string allowed;
            for (int i = 0; i < 6; i++)
                if (types >> i & 1) allowed += std::string(allowed.empty() ? "" : " or ") + kNames[i];
            throw nb::type_error((function_ + (": " + std::string(name)) + " is " +
                                  (type < 0 || type > 5 ? "of an unknown type" : kNames[type]) + ": give " + allowed)
                                     .c_str());
        }
        if (count < least || count > most || (count > 0 && !address))
            refuse(std::string(name) + " has " + std::to_string(address ? count : 0) + " numbers: give " +
                   (most == least ? "" : "at least ") + std::to_string(least));
        spans_.push_back({name, address, address + static_cast<Address>(count * kBytes[type]), written});
        return reinterpret_cast<const void*>(address);
    }
    template <class T>
    const T* reads(const char* name, const Memory& m, int64_t count) {
        return static_cast<const T*>(take(name, m, set_of<T>(), count, count, false));
    }
    template <class T>
    T* writes(const char* name, const Memory& m, int64_t count) {
        return const_cast<T*>(static_cast<const T*>(take(name, m, set_of<T>(), count, count, true)));
    }
    // The same, or null for None.
    template <class T>
    const T* may_read(const char* name, const Memory& m, int64_t count) {
        return std::get<1>(m) == -1 ? nullptr : reads<T>(name, m, count);
    }

    // What is written lies apart from all else: the last check of a call.
    void check_apart() const {
        for (const Span& to : spans_)
            for (const Span& other : spans_)
                if (to.written && &to != &other && to.begin < other.end && other.begin < to.end)
                    refuse(std::string(to.name) + " overlaps " + other.name + ": give memory of its own");
    }

  private:
    struct Span {
        const char* name;
        Address begin, end;
        bool written;
    };
    std::string function_;
    std::vector<Span> spans_;
};

int64_t count_of(const Memory& m) { return std::get<2>(m); }
Type type_of(const Memory& m) { return static_cast<Type>(std::get<1>(m)); }

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
    const auto& [outer, channels, inner, last] = s;
    if (call.times(call.times(outer, channels), inner) != count_of(x))
        call.refuse("a view of " + std::to_string(outer) + " x " + std::to_string(channels) + " x " +
                    std::to_string(inner) + " of a tensor of " + std::to_string(count_of(x)) + " numbers");
    return {outer, channels, inner, last};
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

Key key_or(const Key& key) { return key ? key : Key({0, 0}); }

// (scale, zero, low, high, offset, key)
using GridArgs = std::tuple<Memory, Memory, float, float, bool, Key>;

Grid grid_of(Call& call, const GridArgs& args, int64_t channels) {
    const auto& [scale, zero, low, high, offset, key] = args;
    const int64_t scales = count_of(scale);
    call.need(scales == 1 || scales == channels, "there are neither one scale nor one for each channel");
    const auto [first, second] = *key_or(key);
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

// (codes, scale, zero point)
using CodesArgs = std::tuple<Memory, Memory, int>;

CodeRows codes_of(Call& call, const char* name, const CodesArgs& args, int64_t count) {
    const auto& [q, scale, zero] = args;
    call.need(zero >= 0 && zero <= 255, "the zero point is not a code");
    return {call.reads<uint8_t>(name, q, count), call.reads<float>("scale", scale, 1), zero};
}

// (total, mean, sigma, argmax, argmin, slopes)
using StatisticsArgs = std::tuple<Memory, Memory, Memory, Memory, Memory, Memory>;

template <class T>
T* writable(const T* p) {
    return const_cast<T*>(p);
}

Statistics statistics_of(Call& call, const StatisticsArgs& args, int64_t rows, int64_t channels) {
    const auto& [total, mean, sigma, argmax, argmin, slopes] = args;
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
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().extremes(from, type_of(x), view, to_lo, to_hi);
}

void sums(const Memory& x, const Memory& to) {
    Call call("sums");
    const int64_t width = count_of(to), count = count_of(x);
    call.need(width > 0 ? count % width == 0 : count == 0, "x is not whole rows of so many sums");
    const void* from = floats(call, "x", x, count);
    float* sums = call.writes<float>("sums", to, width);
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().sums(from, type_of(x), width ? count / width : 0, width, sums);
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
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().observe(from, type_of(x), count_of(x), samples, running, to_lo, to_hi);
}

// (symmetric, levels, floor, samples or 0, lo, hi, key)
using RuleArgs = std::tuple<bool, float, float, int64_t, Memory, Memory, Key>;

int quantize(const Memory& x, const Shape& shape, const RuleArgs& args, int64_t taps, const Memory& codes,
             const Memory& scale) {
    Call call("quantize");
    const auto& [symmetric, levels, floor, samples, lo, hi, key] = args;
    const View view = view_of(call, shape, x);
    const int64_t scales = samples ? 1 : view.channels;
    if (samples) check_samples(call, count_of(x), samples);
    check_taps(call, view, scales == 1, taps);
    const auto [first, second] = *key_or(key);
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
    call.check_apart();
    const nb::gil_scoped_release release;
    return passes().quantize(from, type_of(x), view, rule, taps, to, to_scale);
}

void code_statistics(const CodesArgs& args, int64_t channels, const std::vector<int64_t>& starts,
                     const StatisticsArgs& to) {
    Call call("code_statistics");
    const auto& [total, mean, sigma, argmax, argmin, slopes] = to;
    const int64_t rows = rows_of(call, std::get<0>(args), channels), chunks = count_of(slopes);
    call.need(chunks > 0 && static_cast<int64_t>(starts.size()) == chunks + 1,
              "chunks and their slopes differ in number");
    call.need(starts[0] == 0 && starts[chunks] == rows && rows <= std::numeric_limits<int32_t>::max() &&
                  std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<>()) == starts.end(),
              "chunks are not all rows, in their order");
    const int64_t all = call.times(chunks, channels);
    const CodeRows codes = codes_of(call, "codes", args, count_of(std::get<0>(args)));
    const Statistics found{call.writes<int64_t>("total", total, channels),
                           call.writes<float>("mean", mean, channels),
                           call.writes<float>("sigma", sigma, channels),
                           call.writes<int32_t>("argmax", argmax, all),
                           call.writes<int32_t>("argmin", argmin, all),
                           call.reads<float>("slopes", slopes, chunks),
                           chunks};
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().code_statistics(codes, channels, starts.data(), found);
}

void normalize(const CodesArgs& args, const StatisticsArgs& stats_args, float eps, bool narrowest, bool inside,
               const Memory& gamma, const Memory& beta, bool rectify, const Memory& d, const Memory& y) {
    Call call("normalize");
    const int64_t channels = count_of(d), rows = rows_of(call, std::get<0>(args), channels);
    const CodeRows codes = codes_of(call, "codes", args, rows * channels);
    const Statistics stats = statistics_of(call, stats_args, rows, channels);
    const float *g = call.may_read<float>("gamma", gamma, channels), *b = call.may_read<float>("beta", beta, channels);
    float* to_d = call.writes<float>("d", d, channels);
    void* to = write_floats(call, "y", y, rows * channels);
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().normalize(codes, rows, channels, stats, eps, narrowest, inside, g, b, rectify, to_d, to, type_of(y));
}

void rectify_backward(const CodesArgs& args, const StatisticsArgs& stats_args, const Memory& gamma, const Memory& beta,
                      const Memory& d, int y_type, const Memory& g, const Memory& to) {
    Call call("rectify_backward");
    const int64_t channels = count_of(d), rows = rows_of(call, std::get<0>(args), channels);
    const CodeRows codes = codes_of(call, "codes", args, rows * channels);
    const Statistics stats = statistics_of(call, stats_args, rows, channels);
    const float *a = call.may_read<float>("gamma", gamma, channels), *b = call.may_read<float>("beta", beta, channels);
    const float* divisors = call.reads<float>("d", d, channels);
    const void* from = floats(call, "g", g, rows * channels);
    void* result = write_floats(call, "the result", to, rows * channels);
    call.need(type_of(to) == type_of(g) && (y_type == 0 || y_type == 1), "types of g and of its result differ");
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().rectify_backward(codes, rows, channels, stats, a, b, divisors, static_cast<Type>(y_type), from, type_of(g),
                              result);
}

void normalize_backward(const CodesArgs& g_args, const CodesArgs& args, const StatisticsArgs& stats_args, bool inside,
                        const Memory& gamma, const Memory& d, const Memory& grad_gamma, const Memory& grad_beta,
                        const Memory& dx) {
    Call call("normalize_backward");
    const int64_t channels = count_of(d), rows = rows_of(call, std::get<0>(args), channels);
    const CodeRows g = codes_of(call, "g", g_args, rows * channels),
                   codes = codes_of(call, "codes", args, rows * channels);
    const Statistics stats = statistics_of(call, stats_args, rows, channels);
    const float *a = call.may_read<float>("gamma", gamma, channels), *divisors = call.reads<float>("d", d, channels);
    float* to_gamma = call.writes<float>("grad_gamma", grad_gamma, channels);
    float* to_beta = call.writes<float>("grad_beta", grad_beta, channels);
    void* to = write_floats(call, "dx", dx, rows * channels);
    call.check_apart();
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
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().code_sums(from, with, rows, channels, to, to_product);
}

void affine(const Memory& q, const Memory& a, const Memory& b, bool relu, const Memory& y) {
    Call call("affine");
    const int64_t channels = count_of(a), rows = rows_of(call, q, channels);
    const uint8_t* codes = call.reads<uint8_t>("q", q, count_of(q));
    const float *scale = call.reads<float>("a", a, channels), *add = call.reads<float>("b", b, channels);
    void* to = write_floats(call, "y", y, count_of(q));
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().affine(codes, rows, channels, scale, add, relu, to, type_of(y));
}

void encode(const Memory& x, const Shape& shape, const GridArgs& args, int64_t taps, const Memory& codes) {
    Call call("encode");
    const View view = view_of(call, shape, x);
    const void* from = floats(call, "x", x, count_of(x));
    const Grid grid = grid_of(call, args, view.channels);
    check_taps(call, view, grid.scales == 1, taps);
    uint8_t* to = write_codes(call, codes, count_of(x));
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().encode(from, type_of(x), view, grid, taps, to);
}

void fake_quantize(const Memory& x, const Shape& shape, const GridArgs& args, const Memory& y) {
    Call call("fake_quantize");
    const View view = view_of(call, shape, x);
    const void* from = floats(call, "x", x, count_of(x));
    const Grid grid = grid_of(call, args, view.channels);
    void* to = write_floats(call, "y", y, count_of(x));
    call.need(type_of(x) == type_of(y), "types of x and y differ");
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().fake_quantize(from, type_of(x), view, grid, to);
}

void round_bf16(const Memory& x, const Memory& y) {
    Call call("round_bf16");
    const float* from = call.reads<float>("x", x, count_of(x));
    float* to = call.writes<float>("y", y, count_of(x));
    call.check_apart();
    const nb::gil_scoped_release release;
    passes().round_bf16(from, count_of(x), to);
}

void noise(uint32_t key0, uint32_t key1, const Memory& u) {
    Call call("noise");
    float* to = call.writes<float>("u", u, count_of(u));
    const nb::gil_scoped_release release;
    passes().noise(count_of(u), key0, key1, to);
}

#ifdef LOWBIT_X86
// (position, size, kernel, stride, padding, dilation, transposed, channels)
using WindowArgs = std::tuple<std::array<int64_t, 4>, Three, Three, Three, Three, Three, bool, int64_t>;
// (data, first number, rows, width, stride, fold, zero, window or None, along)
using RowsArgs = std::tuple<Memory, int64_t, int64_t, int64_t, int64_t, int64_t, int, std::optional<WindowArgs>, bool>;

// Fills `window`, and returns how many places it may reach.
int64_t window_of(const Call& call, const WindowArgs& args, int64_t rows, int64_t width, Window& window) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const auto& [position, size, kernel, step, padding, dilation, transposed, channels] = args;
    int64_t positions = 1, places = position[0], taps = 1;
    for (int i = 0; i < 4; i++) {
        call.need(position[i] <= most, "a window has too many positions");
        window.position[i] = position[i];
        positions = call.times(positions, position[i]);
    }
    for (int i = 0; i < 3; i++) {
        const bool whole = kernel[i] > 0 && step[i] > 0 && dilation[i] > 0 && size[i] >= 0;
        call.need(whole && std::max({kernel[i], step[i], dilation[i], size[i], padding[i], -padding[i]}) <= most,
                  "a window has a kernel, stride or dilation less than 1, or sizes beyond 31 bits");
        window.size[i] = size[i];
        window.kernel[i] = kernel[i];
        window.stride[i] = step[i];
        window.padding[i] = padding[i];
        window.dilation[i] = dilation[i];
        places = call.times(places, size[i]);
        taps = call.times(taps, kernel[i]);
    }
    window.transposed = transposed;
    window.channels = channels;
    call.need(channels > 0 && positions == rows && positions <= std::numeric_limits<uint32_t>::max() &&
                  call.times(taps, channels) == width,
              "a window's positions and taps are not the rows and their width");
    return places;
}

Rows rows_of(Call& call, const char* name, const RowsArgs& args, int types, Window& window) {
    const auto& [data, first, rows, width, stride, fold, zero, w, along] = args;
    call.need(first >= 0 && fold >= 0 && (fold == 0 || rows % fold == 0),
              "rows begin before their memory, or do not fold");
    call.need(zero >= -255 && zero <= 255, "the zero point is not a code");
    const int64_t steps = w ? window_of(call, *w, rows, width, window) : rows, of_step = w ? window.channels : width;
    // From the first number to the end of the last row, or place.
    const int64_t reach = steps && of_step ? call.plus(call.times(steps - 1, stride), of_step) : 0;
    call.need(rows >= 0 && width >= 0 && stride >= 0, "sizes are less than 0");
    const int64_t least = reach ? call.plus(first, reach) : 0;
    const auto* from =
        static_cast<const uint8_t*>(call.take(name, data, types, least, std::numeric_limits<int64_t>::max(), false));
    return {least ? from + first * kBytes[std::get<1>(data)] : from,
            type_of(data),
            rows,
            width,
            stride,
            fold,
            w ? &window : nullptr,
            zero};
}

// (data, first number, stride, taps, row scales, column scales, bias)
using ResultArgs = std::tuple<Memory, int64_t, int64_t, int64_t, Memory, Memory, Memory>;

void multiply(bool codes, const RowsArgs& a_args, const RowsArgs& b_args, const ResultArgs& result) {
    Call call("multiply");
    Window a_window, b_window;
    const int types = codes ? kBytesOnly : kNumbers;
    const Rows a = rows_of(call, "the left side", a_args, types, a_window);
    const Rows b = rows_of(call, "the right side", b_args, types, b_window);
    const bool a_along = std::get<8>(a_args), b_along = std::get<8>(b_args);
    const int64_t m = a_along ? a.rows : a.width, n = b_along ? b.rows : b.width, k = a_along ? a.width : a.rows;
    call.need(k == (b_along ? b.width : b.rows), "the two sides sum over different numbers");
    call.need(k > 0 || !m || !n, "the two sides sum over no numbers: the result is the bias alone");
    const auto& [data, first, stride, taps, row, column, bias] = result;
    const int64_t rows = count_of(row), columns = count_of(column);
    call.need(rows == 1 || rows == m, "there are neither one row scale nor one for each row");
    call.need(columns > 0 && n % columns == 0, "column scales do not repeat over the columns");
    call.need(taps > 0 && n % taps == 0, "columns are not whole taps");
    call.need(first >= 0 && (stride >= n || m <= 1), "rows of the result overlap, or begin before its memory");
    const int64_t reach = m && n ? call.plus(first, call.plus(call.times(m - 1, stride), n)) : 0;
    const auto* to = static_cast<const uint8_t*>(
        call.take("the result", data, kFloats, reach, std::numeric_limits<int64_t>::max(), true));
    const Product p{
        a,
        b,
        a_along,
        b_along,
        m,
        n,
        k,
        {const_cast<uint8_t*>(to) + (reach ? first * kBytes[std::get<1>(data)] : 0), type_of(data), stride, taps,
         call.reads<float>("row scales", row, rows), rows, call.reads<float>("column scales", column, columns), columns,
         call.may_read<float>("bias", bias, n)}};
    call.check_apart();
    const nb::gil_scoped_release release;
    codes ? multiply_codes(p) : multiply_halves(p);
}
#endif

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets that the kernels use here, by their usual names, lowest first.");
    m.def("extremes", &extremes);
    m.def("sums", &sums);
    m.def("observe", &observe);
    m.def("quantize", &quantize);
    m.def("code_statistics", &code_statistics);
    m.def("normalize", &normalize);
    m.def("rectify_backward", &rectify_backward);
    m.def("normalize_backward", &normalize_backward);
    m.def("code_sums", &code_sums);
    m.def("affine", &affine);
    m.def("encode", &encode);
    m.def("fake_quantize", &fake_quantize);
    m.def("round_bf16", &round_bf16);
    m.def("noise", &noise);
#ifdef LOWBIT_X86
    m.def("multiply", &multiply);
#endif
}
