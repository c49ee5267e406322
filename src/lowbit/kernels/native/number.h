// Types of numbers that cross from Python, and conversions to and from bfloat16.
//
// Everything is local to the file that includes it, since each is compiled for another instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowbit {

// The values are those of `lowbit.kernels.cpu`; 4 and 5 are int32 and int64, which no pass or product takes.
enum class Type : int { f32 = 0, bf16 = 1, u8 = 2, s8 = 3 };

namespace {

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// 2**32 over the golden ratio: what noise multiplies the number of an element by, which spreads it over 32 bits.
constexpr uint32_t kGolden = 0x9E3779B1u;

// Ties to even; nan stays nan.
inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline float bf16_to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Write `count` floats as numbers `first` and on of y, float32 or bfloat16.
inline void store(const float* from, int64_t count, Type type, void* y, int64_t first) {
    if (type == Type::f32) {
        std::memcpy(static_cast<float*>(y) + first, from, count * sizeof(float));
        return;
    }
    auto* half = static_cast<uint16_t*>(y) + first;
    for (int64_t i = 0; i < count; i++) half[i] = float_to_bf16(from[i]);
}

}  // namespace
}  // namespace lowbit
