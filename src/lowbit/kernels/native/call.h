// One call from Python: whether it stays inside its tensors, checked before anything is read or written.
//
// `lowbit.kernels.operators` says where tensors lie.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "number.h"

namespace lowbit {

namespace nb = nanobind;

// Add the functions of bind_attention.cpp, of bind_passes.cpp, of bind_products.cpp, to the module.
void bind_attention(nb::module_& m);
void bind_passes(nb::module_& m);
void bind_products(nb::module_& m);

namespace {

using Address = uintptr_t;
// What lies in memory without gaps: where it begins, the type of its numbers, how many they are. None is of type -1.
using Memory = std::tuple<Address, int, int64_t>;
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
        int64_t product = 0;
        need(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), "sizes are less than 0 or beyond 64 bits");
        return product;
    }
    int64_t plus(int64_t a, int64_t b) const {
        int64_t sum = 0;
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

    // What is written overlaps nothing else: the last check of a call.
    void check_disjoint() const {
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

inline int64_t count_of(const Memory& m) { return std::get<2>(m); }
inline Type type_of(const Memory& m) { return static_cast<Type>(std::get<1>(m)); }

}  // namespace
}  // namespace lowbit
