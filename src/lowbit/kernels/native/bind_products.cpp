// Products as a function of Python.

#include <algorithm>

#include "call.h"
#include "product.h"

namespace lowbit {
namespace {

// Where a side of a product lies, beside its data: first number, rows, length, stride, fold, zero point, whether
// width-major; then, of a convolution, its window: batch and sizes of the positions, and, each three numbers, sizes of
// what taps reach for, kernel, stride, padding, dilation; whether transposed, channels.
using Place = std::vector<int64_t>;
constexpr size_t kPlain = 7, kUnfolded = kPlain + 4 + 5 * 3 + 2;

// Fills `window`, and returns how many pixels it may reach.
int64_t window_of(const Call& call, const int64_t* numbers, int64_t rows, int64_t width, Window& window) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t *position = numbers, *size = numbers + 4, *kernel = size + 3, *step = kernel + 3, *padding = step + 3,
                  *dilation = padding + 3, transposed = dilation[3], channels = dilation[4];
    int64_t positions = 1, pixels = position[0], taps = 1;
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
        pixels = call.times(pixels, size[i]);
        taps = call.times(taps, kernel[i]);
    }
    window.transposed = transposed != 0;
    window.channels = channels;
    call.need(channels > 0 && positions == rows && positions <= std::numeric_limits<uint32_t>::max() &&
                  call.times(taps, channels) == width,
              "a window's positions and taps are not the rows and their width");
    return pixels;
}

Side side_of(Call& call, const char* name, const Memory& data, const Place& place, int types, Window& window) {
    call.need(place.size() == kPlain || place.size() == kUnfolded, "a side has too few numbers, or too many");
    const bool unfolded = place.size() == kUnfolded;
    const int64_t first = place[0], rows = place[1], length = place[2], stride = place[3], fold = place[4],
                  zero = place[5], width_major = place[6];
    call.need(first >= 0 && fold >= 0 && (fold == 0 || rows % fold == 0),
              "rows begin before their memory, or do not fold");
    call.need(zero >= -255 && zero <= 255, "the zero point is not a code");
    const int64_t steps = unfolded ? window_of(call, &place[kPlain], rows, length, window) : rows,
                  of_step = unfolded ? window.channels : length;
    // From the first number to the end of the last row, or pixel.
    const int64_t reach = steps && of_step ? call.plus(call.times(steps - 1, stride), of_step) : 0;
    call.need(rows >= 0 && length >= 0 && stride >= 0, "sizes are less than 0");
    const int64_t least = reach ? call.plus(first, reach) : 0;
    const auto* from =
        static_cast<const uint8_t*>(call.take(name, data, types, least, std::numeric_limits<int64_t>::max(), false));
    return {least ? from + first * kBytes[std::get<1>(data)] : from,
            type_of(data),
            rows,
            length,
            stride,
            fold,
            unfolded ? &window : nullptr,
            static_cast<int>(zero),
            width_major ? Order::width_major : Order::depth_major};
}

// `at`: first number of the result, numbers between its rows, taps.
template <bool codes>
void multiply(const Memory& lhs_data, const Place& lhs_place, const Memory& rhs_data, const Place& rhs_place,
              const Memory& data, const std::array<int64_t, 3>& at, const Memory& row, const Memory& column,
              const Memory& bias) {
    Call call("multiply");
    Window lhs_window, rhs_window;
    const int types = codes ? kBytesOnly : kNumbers;
    const Side lhs = side_of(call, "the left side", lhs_data, lhs_place, types, lhs_window);
    const Side rhs = side_of(call, "the right side", rhs_data, rhs_place, types, rhs_window);
    const auto width = [](const Side& s) { return s.order == Order::width_major ? s.rows : s.length; };
    const auto depth = [](const Side& s) { return s.order == Order::width_major ? s.length : s.rows; };
    const int64_t m = width(lhs), n = width(rhs), k = depth(lhs);
    call.need(k == depth(rhs), "the two sides sum over different numbers");
    call.need(k > 0 || !m || !n, "the two sides sum over no numbers: the result is the bias alone");
    const auto [first, stride, taps] = at;
    const int64_t rows = count_of(row), columns = count_of(column);
    call.need(rows == 1 || rows == m, "there are neither one row scale nor one for each row");
    call.need(columns > 0 && n % columns == 0, "column scales do not repeat over the columns");
    call.need(taps > 0 && n % taps == 0, "columns are not whole taps");
    call.need(first >= 0 && (stride >= n || m <= 1), "rows of the result overlap, or begin before its memory");
    const int64_t reach = m && n ? call.plus(first, call.plus(call.times(m - 1, stride), n)) : 0;
    const auto* to = static_cast<const uint8_t*>(
        call.take("the result", data, kFloats, reach, std::numeric_limits<int64_t>::max(), true));
    const Product p{
        lhs,
        rhs,
        m,
        n,
        k,
        {const_cast<uint8_t*>(to) + (reach ? first * kBytes[std::get<1>(data)] : 0), type_of(data), stride, taps,
         call.reads<float>("row scales", row, rows), rows, call.reads<float>("column scales", column, columns), columns,
         call.may_read<float>("bias", bias, n)}};
    call.check_disjoint();
    const auto product = codes ? products().codes : products().bf16;
    if (!product)
        throw std::runtime_error(std::string("multiply: this processor lacks ") +
                                 (codes ? "avx2 or dotprod" : "avx512bf16") + ": multiply on the reference engine");
    const nb::gil_scoped_release release;
    product(p);
}

// Signed codes in blocks of the depth; scales have a row of m, of n, for each block.
void multiply_blocks(const Memory& lhs_data, const Place& lhs_place, const Memory& rhs_data, const Place& rhs_place,
                     const Memory& data, int64_t block, const Memory& row, const Memory& column, const Memory& bias) {
    Call call("multiply_blocks");
    Window none;
    constexpr int kInt8 = 8;
    const Side lhs = side_of(call, "the left side", lhs_data, lhs_place, kInt8, none);
    const Side rhs = side_of(call, "the right side", rhs_data, rhs_place, kInt8, none);
    const bool left = lhs.order == Order::width_major, right = rhs.order == Order::width_major;
    const int64_t m = left ? lhs.rows : lhs.length, k = left ? lhs.length : lhs.rows, n = right ? rhs.rows : rhs.length;
    call.need(k == (right ? rhs.length : rhs.rows), "the two sides sum over different numbers");
    call.need(k > 0, "the two sides sum over no numbers: the result is the bias alone");
    call.need(!lhs.window && !rhs.window && !lhs.fold && !rhs.fold && !lhs.zero_point && !rhs.zero_point,
              "sides in blocks are plain matrices of codes without a zero point");
    // A sum of a block must fit in 32 bits, with the bias of the left side.
    call.need(block > 0 && block % 4 == 0 && block <= 1 << 15, "a block is not a multiple of 4 from 4 to 32768");
    const int64_t blocks = (k - 1) / block + 1;
    const auto* to =
        static_cast<const uint8_t*>(call.take("the result", data, kFloats, call.times(m, n), call.times(m, n), true));
    const Product p{
        lhs,
        rhs,
        m,
        n,
        k,
        {const_cast<uint8_t*>(to), type_of(data), n, 1, call.reads<float>("row scales", row, call.times(blocks, m)), m,
         call.reads<float>("column scales", column, call.times(blocks, n)), n, call.may_read<float>("bias", bias, n)}};
    call.check_disjoint();
    const auto product = products().blocks;
    if (!product)
        throw std::runtime_error(
            "multiply_blocks: this processor lacks avx2 or dotprod: multiply on the reference engine");
    const nb::gil_scoped_release release;
    product(p, block);
}

}  // namespace

void bind_products(nb::module_& m) {
    m.def("multiply_codes", &multiply<true>);
    m.def("multiply_blocks", &multiply_blocks);
    m.def("multiply_halves", &multiply<false>);
}

}  // namespace lowbit
