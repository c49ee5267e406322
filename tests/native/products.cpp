// Random products of codes of one instruction set against plain loops, without Python. `check.sh` builds and runs it.
//
//   products NAME    of the table NAME_products; or `chosen NAME`: what dispatch.cpp chooses has these instruction sets
//
// Expected results follow the definitions in product.h, number by number.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "machine.h"
#include "operand.h"

using namespace lowbit;

namespace {

std::mt19937 generator(0);
int64_t random_of(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float random_scale() { return std::ldexp(static_cast<float>(random_of(1, 1 << 20)), -24); }
template <class T>
T one_of(std::initializer_list<T> all) {
    return all.begin()[random_of(0, static_cast<int64_t>(all.size()) - 1)];
}

// A side and what it points to.
struct Operand {
    std::vector<uint8_t> codes;
    Window window{};
    Side side{};

    Operand(int64_t count) : codes(static_cast<size_t>(count)) {
        for (auto& code : codes)
            code = static_cast<uint8_t>(one_of({random_of(0, 255), int64_t{0}, int64_t{128}, int64_t{255}}));
        side.data = codes.data();
        side.type = one_of({Type::u8, Type::s8});
        side.zero_point = static_cast<int>(side.type == Type::u8 ? one_of({random_of(0, 255), int64_t{0}}) : 0);
    }
    int64_t code(int64_t i) const {
        return (side.type == Type::u8 ? codes[i] : static_cast<int8_t>(codes[i])) - side.zero_point;
    }
    // q - z of number i of row r.
    int64_t at(int64_t r, int64_t i) const {
        if (!side.window) return code(r * side.stride + i);
        const Window& w = window;
        int64_t p[4], tap[3], rest = r, j = i / w.channels, from = 0;
        for (int axis = 3; axis >= 0; axis--) p[axis] = rest % w.position[axis], rest /= w.position[axis];
        for (int axis = 2; axis >= 0; axis--) tap[axis] = j % w.kernel[axis], j /= w.kernel[axis];
        from = p[0];
        for (int axis = 0; axis < 3; axis++) {
            const int64_t to = reached(w, axis, p[axis + 1], tap[axis]);
            if (to < 0) return 0;
            from = from * w.size[axis] + to;
        }
        return code(from * side.stride + i % w.channels);
    }
    // q - z of width w, depth k.
    int64_t number(int64_t w, int64_t k) const { return side.order == Order::width_major ? at(w, k) : at(k, w); }
};

Operand matrix(int64_t width, int64_t depth, Order order) {
    const int64_t rows = order == Order::width_major ? width : depth,
                  length = order == Order::width_major ? depth : width;
    const int64_t stride = length + one_of({0, 0, 5});
    Operand o(rows * stride + 1);
    o.side.rows = rows, o.side.length = length, o.side.stride = stride, o.side.order = order;
    return o;
}

// The side of a convolution that is unfolded.
Operand unfolded(bool transposed, Order order) {
    Window w{};
    int64_t positions = random_of(1, 3), pixels = positions, taps = 1;
    w.position[0] = positions;
    w.transposed = transposed;
    w.channels = one_of({1, 3, 8, 16, 21});
    for (int axis = 0; axis < 3; axis++) {
        const bool flat = axis == 0;
        const int64_t size = flat ? 1 : random_of(4, axis == 1 ? 12 : 40), kernel = flat ? 1 : random_of(1, 4);
        const int64_t stride = flat ? 1 : one_of({1, 1, 2}), padding = flat ? 0 : random_of(0, kernel - 1);
        const int64_t dilation = flat || size <= 2 * kernel ? 1 : one_of({1, 1, 2});
        const int64_t out = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
        w.size[axis] = transposed ? out : size, w.position[axis + 1] = transposed ? size : out;
        w.kernel[axis] = kernel, w.stride[axis] = stride, w.padding[axis] = padding, w.dilation[axis] = dilation;
        positions *= w.position[axis + 1], pixels *= w.size[axis], taps *= kernel;
    }
    Operand o(pixels * w.channels);
    o.window = w;
    o.side.rows = positions, o.side.length = taps * w.channels, o.side.stride = w.channels, o.side.order = order;
    return o;
}

std::vector<float> scales(int64_t count) {
    std::vector<float> all(static_cast<size_t>(count));
    for (auto& scale : all) scale = random_scale();
    return all;
}

// One product, in blocks of the depth where `block` is not 0; true if all its numbers are right.
bool check(const Products& products, Operand& lhs, Operand& rhs, int64_t block) {
    if (lhs.window.channels) lhs.side.window = &lhs.window;
    if (rhs.window.channels) rhs.side.window = &rhs.window;
    lhs.side.data = lhs.codes.data(), rhs.side.data = rhs.codes.data();
    const auto width = [](const Side& s) { return s.order == Order::width_major ? s.rows : s.length; };
    const int64_t m = width(lhs.side), n = width(rhs.side);
    const int64_t k = lhs.side.order == Order::width_major ? lhs.side.length : lhs.side.rows;
    const int64_t blocks = block ? (k - 1) / block + 1 : 1;
    const auto rows = scales(block ? blocks * m : one_of({int64_t{1}, m}));
    const auto columns = scales(block ? blocks * n : one_of({int64_t{1}, n})), bias = scales(n);
    const bool with_bias = one_of({false, true}), half = one_of({false, true});
    std::vector<float> found(static_cast<size_t>(m * n));
    Result result{};
    result.data = found.data(), result.type = half ? Type::bf16 : Type::f32;
    result.stride = n, result.taps = 1;
    result.row_scale = rows.data(), result.row_scales = block ? m : static_cast<int64_t>(rows.size());
    result.column_scale = columns.data(), result.column_scales = block ? n : static_cast<int64_t>(columns.size());
    result.bias = with_bias ? bias.data() : nullptr;
    const Product p{lhs.side, rhs.side, m, n, k, result};
    if (block)
        products.blocks(p, block);
    else
        products.codes(p);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float y = 0.0f;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t sum = 0;
                const int64_t from = b * block, until = block ? std::min(k, from + block) : k;
                for (int64_t d = from; d < until; d++) sum += lhs.number(i, d) * rhs.number(j, d);
                const auto x = static_cast<float>(static_cast<int32_t>(sum));
                if (block)
                    y = std::fma(x * rows[b * m + i], columns[b * n + j], y);
                else
                    y = x * (rows[rows.size() == 1 ? 0 : i] * columns[columns.size() == 1 ? 0 : j]);
            }
            if (with_bias) y += bias[j];
            const bool right = half ? reinterpret_cast<const uint16_t*>(found.data())[i * n + j] == float_to_bf16(y)
                                    : std::memcmp(&found[i * n + j], &y, 4) == 0;
            if (right) continue;
            std::printf(
                "wrong at (%ld, %ld) of a product (%ld, %ld, %ld), block %ld, orders %d and %d, windows %d and %d\n", i,
                j, m, n, k, block, static_cast<int>(lhs.side.order), static_cast<int>(rhs.side.order),
                lhs.side.window != nullptr, rhs.side.window != nullptr);
            return false;
        }
    return true;
}

bool check_any(const Products& products) {
    const auto order = [] { return one_of({Order::width_major, Order::depth_major}); };
    const int64_t n = one_of({random_of(1, 70), int64_t{16}, int64_t{32}});
    switch (random_of(0, 4)) {
        case 0: {  // two matrices
            const int64_t m = random_of(1, 70), k = one_of({random_of(1, 70), random_of(1, 700)});
            Operand lhs = matrix(m, k, order()), rhs = matrix(n, k, order());
            return check(products, lhs, rhs, 0);
        }
        case 1: {  // in blocks, which may be of a set below
            if (!products.blocks) return true;
            const int64_t m = random_of(1, 70), k = random_of(1, 300);
            Operand lhs = matrix(m, k, order()), rhs = matrix(n, k, order());
            for (Operand* o : {&lhs, &rhs}) {
                o->side.type = Type::s8, o->side.zero_point = 0;
                o->side.stride = o->side.length;
            }
            return check(products, lhs, rhs, 4 * random_of(1, 40));
        }
        case 2: {  // a convolution
            Operand lhs = unfolded(false, Order::width_major), rhs = matrix(n, lhs.side.length, Order::width_major);
            return check(products, lhs, rhs, 0);
        }
        case 3: {  // the gradient of its input
            Operand lhs = unfolded(true, Order::width_major), rhs = matrix(n, lhs.side.length, Order::depth_major);
            return check(products, lhs, rhs, 0);
        }
        default: {  // the gradient of its weight
            Operand rhs = unfolded(false, Order::depth_major), lhs = matrix(n, rhs.side.rows, Order::depth_major);
            return check(products, lhs, rhs, 0);
        }
    }
}

}  // namespace

int main(int count, char** words) {
    const std::string name = count > 1 ? words[1] : "";
    if (name == "chosen") {
        std::string sets;
        for (const auto& set : instruction_sets()) sets += (sets.empty() ? "" : " ") + set;
        const bool right = sets == words[2] && (products().codes != nullptr) == !sets.empty();
        std::printf("chosen: %s\n", sets.empty() ? "none" : sets.c_str());
        return right ? 0 : 1;
    }
    const struct {
        const char* name;
        const Products* table;
    } tables[] = {
#ifdef LOWBIT_ARM
        {"dotprod", &dotprod_products},
        {"i8mm", &i8mm_products},
#else
        {"avxvnni", &avxvnni_products},
#endif
    };
    for (const auto& entry : tables) {
        if (name != entry.name) continue;
        for (int i = 0; i < 600; i++)
            if (!check_any(*entry.table)) return 1;
        std::printf("%s: 600 products have the bits of plain loops\n", entry.name);
        return 0;
    }
    std::printf("no instruction set %s\n", name.c_str());
    return 2;
}
