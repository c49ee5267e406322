// The pieces in which passes work on a tensor.
#pragma once

#include <cstdint>

#include "number.h"

namespace lowbit {
namespace {

constexpr int64_t kRun = 1024;       // numbers that are worked on at a time, in the first-level cache
constexpr int64_t kTask = 1 << 15;   // numbers of one thread's piece of work
constexpr int64_t kAlone = 1 << 17;  // numbers for which waking other threads costs more than it gains
constexpr int64_t kShort = 64;       // runs of one scale shorter than this are worked on with a scale for each number

// The numbers x[first, first + count) as float: in place for float32, else converted into `buffer`.
inline const float* load(const void* x, Type type, int64_t first, int64_t count, float* buffer) {
    if (type == Type::f32) return static_cast<const float*>(x) + first;
    const uint16_t* half = static_cast<const uint16_t*>(x) + first;
    for (int64_t i = 0; i < count; i++) buffer[i] = bf16_to_float(half[i]);
    return buffer;
}

}  // namespace
}  // namespace lowbit
