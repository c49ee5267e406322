// The Python face of the native kernels. Tensors come as addresses: `lowbit.kernels.cpu` has checked types and shapes.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>

#include "cpu.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using Address = uintptr_t;
using Shape = std::tuple<int64_t, int64_t, int64_t, bool>;
using Three = std::array<int64_t, 3>;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

View view_of(const Shape& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

Grid grid_of(Address scale, Address zero, int64_t scales, float low, float high, bool offset, bool stochastic,
             uint32_t key0, uint32_t key1) {
    return {at<const float>(scale), at<const float>(zero), scales, low, high, offset, stochastic, key0, key1};
}

// (codes, scale, zero point)
using CodesArgs = std::tuple<Address, Address, int>;

CodeRows codes_of(const CodesArgs& args) {
    const auto& [q, scale, zero] = args;
    return {at<const uint8_t>(q), at<const float>(scale), zero};
}

// (total, mean, sigma, argmax, argmin, slopes, chunks)
using StatisticsArgs = std::tuple<Address, Address, Address, Address, Address, Address, int64_t>;

Statistics statistics_of(const StatisticsArgs& args) {
    const auto& [total, mean, sigma, argmax, argmin, slopes, chunks] = args;
    return {at<int64_t>(total),  at<float>(mean),         at<float>(sigma), at<int32_t>(argmax),
            at<int32_t>(argmin), at<const float>(slopes), chunks};
}

#ifdef LOWBIT_X86
// (data, type, rows, width, stride, fold, zero, window or None)
using WindowArgs = std::tuple<std::array<int64_t, 4>, Three, Three, Three, Three, Three, bool, int64_t>;
using RowsArgs = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int, std::optional<WindowArgs>>;

Rows rows_of(const RowsArgs& args, Window& window) {
    const auto& [data, type, rows, width, stride, fold, zero, w] = args;
    Rows r{at<const void>(data), static_cast<Type>(type), rows, width, stride, fold, nullptr, zero};
    if (!w) return r;
    const auto& [position, size, kernel, step, padding, dilation, transposed, channels] = *w;
    for (int i = 0; i < 4; i++) window.position[i] = position[i];
    for (int i = 0; i < 3; i++) {
        window.size[i] = size[i];
        window.kernel[i] = kernel[i];
        window.stride[i] = step[i];
        window.padding[i] = padding[i];
        window.dilation[i] = dilation[i];
    }
    window.transposed = transposed;
    window.channels = channels;
    r.window = &window;
    return r;
}

// (data, type, stride, taps, row scale, row scales, column scale, column scales, bias)
using ResultArgs = std::tuple<Address, int, int64_t, int64_t, Address, int64_t, Address, int64_t, Address>;

void multiply(bool codes, const RowsArgs& a, bool a_along, const RowsArgs& b, bool b_along, int64_t m, int64_t n,
              int64_t k, const ResultArgs& result) {
    Window a_window, b_window;
    const auto& [data, type, stride, taps, row, rows, column, columns, bias] = result;
    const Product p{rows_of(a, a_window),
                    rows_of(b, b_window),
                    a_along,
                    b_along,
                    m,
                    n,
                    k,
                    {at<void>(data), static_cast<Type>(type), stride, taps, at<const float>(row), rows,
                     at<const float>(column), columns, at<const float>(bias)}};
    const nb::gil_scoped_release release;
    codes ? multiply_codes(p) : multiply_halves(p);
}
#endif

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets that the kernels use here, by their usual names, lowest first.");
    m.def("extremes", [](Address x, int type, const Shape& view, Address lo, Address hi) {
        const nb::gil_scoped_release release;
        elementwise().extremes(at<const void>(x), static_cast<Type>(type), view_of(view), at<float>(lo), at<float>(hi));
    });
    m.def("sums", [](Address x, int type, int64_t rows, int64_t width, Address to) {
        const nb::gil_scoped_release release;
        elementwise().sums(at<const void>(x), static_cast<Type>(type), rows, width, at<float>(to));
    });
    m.def("observe", [](Address x, int type, int64_t count, int64_t samples, Address range, float momentum, bool first,
                        bool training, Address lo, Address hi) {
        const nb::gil_scoped_release release;
        elementwise().observe(at<const void>(x), static_cast<Type>(type), count, samples,
                              {at<float>(range), momentum, first, training}, at<float>(lo), at<float>(hi));
    });
    m.def("quantize", [](Address x, int type, const Shape& view, bool symmetric, float levels, float floor,
                         int64_t samples, Address lo, Address hi, bool stochastic, uint32_t key0, uint32_t key1,
                         int64_t taps, Address codes, Address scale) {
        const Rule rule{symmetric,           levels,     floor, samples, at<const float>(lo),
                        at<const float>(hi), stochastic, key0,  key1};
        const nb::gil_scoped_release release;
        return elementwise().quantize(at<const void>(x), static_cast<Type>(type), view_of(view), rule, taps,
                                      at<uint8_t>(codes), at<float>(scale));
    });
    m.def("code_statistics", [](const CodesArgs& codes, int64_t channels, const std::vector<int64_t>& starts,
                                const StatisticsArgs& to) {
        const nb::gil_scoped_release release;
        elementwise().code_statistics(codes_of(codes), channels, starts.data(), statistics_of(to));
    });
    m.def("normalize", [](const CodesArgs& codes, int64_t rows, int64_t channels, const StatisticsArgs& stats,
                          float eps, bool inside, Address gamma, Address beta, bool rectify, Address d, Address y,
                          int type) {
        const nb::gil_scoped_release release;
        elementwise().normalize(codes_of(codes), rows, channels, statistics_of(stats), eps, inside,
                                at<const float>(gamma), at<const float>(beta), rectify, at<float>(d), at<void>(y),
                                static_cast<Type>(type));
    });
    m.def("rectify_backward", [](const CodesArgs& codes, int64_t rows, int64_t channels, const StatisticsArgs& stats,
                                 Address gamma, Address beta, Address d, int y_type, Address g, int type, Address to) {
        const nb::gil_scoped_release release;
        elementwise().rectify_backward(codes_of(codes), rows, channels, statistics_of(stats), at<const float>(gamma),
                                       at<const float>(beta), at<const float>(d), static_cast<Type>(y_type),
                                       at<const void>(g), static_cast<Type>(type), at<void>(to));
    });
    m.def("normalize_backward", [](const CodesArgs& g, const CodesArgs& codes, int64_t rows, int64_t channels,
                                   const StatisticsArgs& stats, bool inside, Address gamma, Address d,
                                   Address grad_gamma, Address grad_beta, Address dx, int type) {
        const nb::gil_scoped_release release;
        elementwise().normalize_backward(codes_of(g), codes_of(codes), rows, channels, statistics_of(stats), inside,
                                         at<const float>(gamma), at<const float>(d), at<float>(grad_gamma),
                                         at<float>(grad_beta), at<void>(dx), static_cast<Type>(type));
    });
    m.def("code_sums", [](Address a, Address b, int64_t rows, int64_t channels, Address sum, Address product) {
        const nb::gil_scoped_release release;
        elementwise().code_sums(at<const uint8_t>(a), at<const uint8_t>(b), rows, channels, at<int64_t>(sum),
                                at<int64_t>(product));
    });
    m.def("affine", [](Address q, int64_t rows, int64_t channels, Address a, Address b, bool relu, Address y, int type) {
        const nb::gil_scoped_release release;
        elementwise().affine(at<const uint8_t>(q), rows, channels, at<const float>(a), at<const float>(b), relu,
                             at<void>(y), static_cast<Type>(type));
    });
    m.def("encode", [](Address x, int type, const Shape& view, Address scale, Address zero, int64_t scales, float low,
                       float high, bool offset, bool stochastic, uint32_t key0, uint32_t key1, int64_t taps,
                       Address codes) {
        const Grid grid = grid_of(scale, zero, scales, low, high, offset, stochastic, key0, key1);
        const nb::gil_scoped_release release;
        elementwise().encode(at<const void>(x), static_cast<Type>(type), view_of(view), grid, taps,
                             at<uint8_t>(codes));
    });
    m.def("fake_quantize",
          [](Address x, int type, const Shape& view, Address scale, Address zero, int64_t scales, float low, float high,
             bool offset, bool stochastic, uint32_t key0, uint32_t key1, Address y) {
              const Grid grid = grid_of(scale, zero, scales, low, high, offset, stochastic, key0, key1);
              const nb::gil_scoped_release release;
              elementwise().fake_quantize(at<const void>(x), static_cast<Type>(type), view_of(view), grid, at<void>(y));
          });
    m.def("round_bf16", [](Address x, int64_t count, Address y) {
        const nb::gil_scoped_release release;
        elementwise().round_bf16(at<const float>(x), count, at<float>(y));
    });
    m.def("noise", [](int64_t count, uint32_t key0, uint32_t key1, Address u) {
        const nb::gil_scoped_release release;
        elementwise().noise(count, key0, key1, at<float>(u));
    });
#ifdef LOWBIT_X86
    m.def("multiply", &multiply);
#endif
}
