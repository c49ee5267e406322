// Tiles of attention for AVX-512: how they are loaded, encoded and multiplied.
//
// A product of a tile has an operand that is broadcast, a number group of 4 bytes (or 2 halves) for each row, and one
// that lies in vectors, a group for each of 16 lanes. What the kernels call `lanes` holds groups of the depth as
// [depth / 4][lanes][4], and what they call `rows` holds [rows][depth]:
//
//   scores  S^T [keys][queries]  = k rows (s8)   x q lanes (u8, biased by 128)    deep E
//   output  O^T [F][queries]     = v^T rows (s8) x P^T lanes (u8)                 deep keys
//   dP^T    [keys][queries]      = v rows (bf16) x g lanes (bf16)                 deep F
//   dV      [keys][F]            = P^T rows (u8) x g^T lanes (s8)                 deep queries
//   dK      [keys][E]            = dS^T rows (u8, biased) x q^T lanes (s8)        deep queries
//   dQ^T    [E][queries]         = k^T rows (s8) x dS^T lanes (u8, biased)        deep keys
//
// Queries lie along lanes, so that maxima and sums over keys are sums of vectors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "avx512_vectors.h"

namespace lowbit {
namespace {

// ---- numbers ----

// 2**x for x up to 0, to 2e-7; nan of nan.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(0x1.5c08e4p-10f);
    for (const float c : {0x1.3d0c54p-7f, 0x1.c6b6e6p-5f, 0x1.ebf918p-3f, 0x1.62e428p-1f, 1.0f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

// Magnitudes as whole numbers, whose order is theirs, and nan above all.
inline __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)); }

// The scale of codes up to `levels` for a largest magnitude: 1 for 0, nan for inf and nan.
inline float scale_of(uint32_t magnitude, float levels) {
    float largest;
    std::memcpy(&largest, &magnitude, 4);
    if (magnitude >= 0x7F800000u) return __builtin_nanf("");
    const float scale = largest / levels;
    return scale == 0 ? 1.0f : scale;
}
inline __m512 scale_of(__m512i magnitude, float levels) {
    const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(levels));
    const __mmask16 none = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __mmask16 bad = _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    return _mm512_mask_mov_ps(_mm512_mask_mov_ps(scale, none, _mm512_set1_ps(1.0f)), bad,
                              _mm512_set1_ps(__builtin_nanf("")));
}

// Codes of x / scale, halves to even; of nan anything.
inline __m512i code_of(__m512 x, __m512 scale, __m512 levels) {
    const __m512 t = _mm512_div_ps(x, scale);
    return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), levels), _mm512_min_ps(levels, t)));
}

inline __m512 load_numbers(const void* data, Type type, int64_t at, __mmask16 here) {
    if (type == Type::f32) return _mm512_maskz_loadu_ps(here, static_cast<const float*>(data) + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(data) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i to_halves(__m512 y) {
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0)));
}
inline void store_numbers(void* data, Type type, int64_t at, __mmask16 here, __m512 y) {
    if (type == Type::f32)
        _mm512_mask_storeu_ps(static_cast<float*>(data) + at, here, y);
    else
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + at, here, to_halves(y));
}
inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// ---- tiles of positions ----

// Rows [first, first + 64) of a head as float32, `stride` apart, with zeros beyond the last row and the size.
inline void load_tile(const Heads& of, int64_t sample, int64_t head, int64_t first, int64_t length, int64_t size,
                      float* to, int64_t stride) {
    const int64_t base = sample * of.sample + head * of.head;
    for (int64_t i = 0; i < kTile; i++)
        for (int64_t e = 0; e < stride; e += 16) {
            const __mmask16 here = first + i < length ? first_lanes(size - e) : 0;
            _mm512_store_ps(to + i * stride + e,
                            load_numbers(of.data, of.type, base + (first + i) * of.position + e, here));
        }
}

// Bytes of a tile, row by row, with a scale for each row; and for each column.
inline void encode_rows(const float* x, int64_t stride, float levels, int8_t* codes, float* scales) {
    const __m512 most = _mm512_set1_ps(levels);
    for (int64_t i = 0; i < kTile; i++) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t e = 0; e < stride; e += 16)
            largest = _mm512_max_epu32(largest, magnitude(_mm512_load_ps(x + i * stride + e)));
        scales[i] = scale_of(_mm512_reduce_max_epu32(largest), levels);
        const __m512 scale = _mm512_set1_ps(scales[i]);
        for (int64_t e = 0; e < stride; e += 16)
            _mm_store_si128(reinterpret_cast<__m128i*>(codes + i * stride + e),
                            _mm512_cvtepi32_epi8(code_of(_mm512_load_ps(x + i * stride + e), scale, most)));
    }
}
inline void encode_columns(const float* x, int64_t stride, float levels, int8_t* codes, float* scales) {
    const __m512 most = _mm512_set1_ps(levels);
    for (int64_t e = 0; e < stride; e += 16) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < kTile; i++)
            largest = _mm512_max_epu32(largest, magnitude(_mm512_load_ps(x + i * stride + e)));
        const __m512 scale = scale_of(largest, levels);
        _mm512_store_ps(scales + e, scale);
        for (int64_t i = 0; i < kTile; i++)
            _mm_store_si128(reinterpret_cast<__m128i*>(codes + i * stride + e),
                            _mm512_cvtepi32_epi8(code_of(_mm512_load_ps(x + i * stride + e), scale, most)));
    }
}

// Bytes [64][stride] as lanes of queries, [stride / 4][64][4], biased by 128.
inline void lanes_of_rows(const int8_t* codes, int64_t stride, uint8_t* to) {
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
    alignas(64) uint32_t turned[256];
    for (int64_t i = 0; i < kTile; i += 16)
        for (int64_t e = 0; e < stride; e += 64) {
            const int64_t groups = std::min<int64_t>(16, (stride - e) / 4);
            alignas(64) uint32_t block[256] = {};
            for (int64_t r = 0; r < 16; r++) std::memcpy(block + r * 16, codes + (i + r) * stride + e, groups * 4);
            Avx512::transpose(block, 16, turned, 16);
            for (int64_t g = 0; g < groups; g++)
                _mm512_store_si512(to + ((e / 4 + g) * kTile + i) * 4,
                                   _mm512_xor_si512(bias, _mm512_load_si512(turned + g * 16)));
        }
}
// The same bytes as lanes of columns, [16][stride][4].
inline void lanes_of_columns(const int8_t* codes, int64_t stride, uint8_t* to) {
    for (int64_t g = 0; g < kTile / 4; g++)
        Avx512::interleave(reinterpret_cast<const uint8_t*>(codes) + 4 * g * stride, stride, stride,
                           reinterpret_cast<uint32_t*>(to) + g * stride);
}
// Lanes of columns as rows, [stride][64].
inline void rows_of_lanes(const uint8_t* lanes, int64_t stride, uint8_t* to) {
    for (int64_t e = 0; e < stride; e += 16)
        Avx512::transpose(reinterpret_cast<const uint32_t*>(lanes) + e, stride,
                          reinterpret_cast<uint32_t*>(to) + e * 16, 16);
}
// Minus 128 times the sum of each row of signed bytes; of each column of lanes.
inline void starts_of_rows(const int8_t* codes, int64_t rows, int64_t stride, int32_t* starts) {
    const __m128i bias = _mm_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < rows; i++) {
        __m128i sum = _mm_setzero_si128();
        for (int64_t e = 0; e < stride; e += 16)
            sum = _mm_dpbusd_epi32(sum, bias, _mm_load_si128(reinterpret_cast<const __m128i*>(codes + i * stride + e)));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
        starts[i] = -_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
    }
}
inline void starts_of_lanes(const uint8_t* lanes, int64_t stride, int32_t* starts) {
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t e = 0; e < stride; e += 16) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t g = 0; g < kTile / 4; g++)
            sum = _mm512_dpbusd_epi32(sum, bias, _mm512_load_si512(lanes + (g * stride + e) * 4));
        _mm512_store_si512(starts + e, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
}

// Numbers [64][stride] as bf16 rows, [64][stride]; and those as lanes of queries, [stride / 2][64][2].
inline void half_rows(const float* x, int64_t stride, uint16_t* to) {
    for (int64_t i = 0; i < kTile * stride; i += 16)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), to_halves(_mm512_load_ps(x + i)));
}
inline void half_lanes(const uint16_t* rows, int64_t stride, uint8_t* to) {
    for (int64_t i = 0; i < kTile; i += 16)
        for (int64_t e = 0; e < stride; e += 32) {
            const int64_t groups = std::min<int64_t>(16, (stride - e) / 2);
            alignas(64) uint32_t block[256] = {}, turned[256];
            for (int64_t r = 0; r < 16; r++) std::memcpy(block + r * 16, rows + (i + r) * stride + e, groups * 4);
            Avx512::transpose(block, 16, turned, 16);
            for (int64_t g = 0; g < groups; g++)
                _mm512_store_si512(to + ((e / 2 + g) * kTile + i) * 4, _mm512_load_si512(turned + g * 16));
        }
}

// ---- products ----

// The lanes are unsigned, the broadcast bytes signed.
struct LanesUnsigned {
    using Vector = __m512i;
    static Vector add(Vector sum, __m512i row, __m512i lane) { return _mm512_dpbusd_epi32(sum, lane, row); }
};
// The other way round.
struct RowsUnsigned {
    using Vector = __m512i;
    static Vector add(Vector sum, __m512i row, __m512i lane) { return _mm512_dpbusd_epi32(sum, row, lane); }
};
struct Halves {
    using Vector = __m512;
    static Vector add(Vector sum, __m512i row, __m512i lane) {
        return _mm512_dpbf16_ps(sum, (__m512bh)lane, (__m512bh)row);
    }
};

// Add `groups` groups of the depth to 4 rows by `vectors` vectors of lanes: rows are `row` bytes apart, groups of lanes
// `lane`.
template <class Dot, int vectors>
__attribute__((always_inline)) inline void multiply_4(typename Dot::Vector (&sum)[4][vectors], const uint8_t* rows,
                                                      int64_t row, const uint8_t* lanes, int64_t lane, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) {
        __m512i right[vectors];
        for (int v = 0; v < vectors; v++) right[v] = _mm512_load_si512(lanes + g * lane + v * 64);
        for (int r = 0; r < 4; r++) {
            int32_t group;
            std::memcpy(&group, rows + r * row + g * 4, 4);
            const __m512i left = _mm512_set1_epi32(group);
            for (int v = 0; v < vectors; v++) sum[r][v] = Dot::add(sum[r][v], left, right[v]);
        }
    }
}

// y[r][lane] += row_scale[r] * lane_scale[lane] * (sum over depth), of 4 rows by all lanes of a row of columns: dV and
// dK, with `start` for each lane or null.
template <int vectors>
void add_columns(const uint8_t* rows, const uint8_t* lanes, int64_t stride, int64_t first, const int32_t* start,
                 const float* row_scale, const float* lane_scale, float* y) {
    __m512i sum[4][vectors];
    for (int v = 0; v < vectors; v++) {
        const __m512i begin = start ? _mm512_load_si512(start + first + 16 * v) : _mm512_setzero_si512();
        for (int r = 0; r < 4; r++) sum[r][v] = begin;
    }
    multiply_4<RowsUnsigned, vectors>(sum, rows, kTile, lanes + first * 4, stride * 4, kTile / 4);
    for (int v = 0; v < vectors; v++) {
        const __m512 scale = _mm512_load_ps(lane_scale + first + 16 * v);
        for (int r = 0; r < 4; r++) {
            float* to = y + r * stride + first + 16 * v;
            const __m512 part =
                _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), _mm512_mul_ps(scale, _mm512_set1_ps(row_scale[r])));
            _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), part));
        }
    }
}
inline void add_columns(const uint8_t* rows, const uint8_t* lanes, int64_t stride, const int32_t* start,
                        const float* row_scale, const float* lane_scale, float* y) {
    int64_t e = 0;
    for (; e + 64 <= stride; e += 64) add_columns<4>(rows, lanes, stride, e, start, row_scale, lane_scale, y);
    for (; e < stride; e += 16) add_columns<1>(rows, lanes, stride, e, start, row_scale, lane_scale, y);
}

// y[r][query] = y * old[query] + row_scale[r] * now[query] * (sum over `groups` groups of keys), of `count` rows: O^T
// and dQ^T, with `start` for each row or null.
inline void add_queries(const uint8_t* rows, const uint8_t* lanes, int64_t groups, int64_t count, const int32_t* start,
                        const float* row_scale, const float* now, const float* old, float* y) {
    for (int64_t r0 = 0; r0 < count; r0 += 4) {
        __m512i sum[4][4];
        for (int r = 0; r < 4; r++) {
            const __m512i begin = _mm512_set1_epi32(start ? start[r0 + r] : 0);
            for (int v = 0; v < 4; v++) sum[r][v] = begin;
        }
        multiply_4<LanesUnsigned, 4>(sum, rows + r0 * kTile, kTile, lanes, kTile * 4, groups);
        for (int r = 0; r < 4; r++)
            for (int v = 0; v < 4; v++) {
                float* to = y + (r0 + r) * kTile + 16 * v;
                const __m512 factor = _mm512_mul_ps(_mm512_load_ps(now + 16 * v), _mm512_set1_ps(row_scale[r0 + r]));
                __m512 before = _mm512_load_ps(to);
                if (old) before = _mm512_mul_ps(before, _mm512_load_ps(old + 16 * v));
                _mm512_store_ps(to, _mm512_add_ps(before, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), factor)));
            }
    }
}

// Bytes of 4 rows of codes, whose vectors of 16 queries hold one in each 32 bits, as lanes: a group for each query.
inline __m512i group_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i low = _mm512_or_si512(a, _mm512_slli_epi32(b, 8));
    return _mm512_or_si512(low, _mm512_or_si512(_mm512_slli_epi32(c, 16), _mm512_slli_epi32(d, 24)));
}

// A tile [rows][64] of queries along lanes, written as positions: `of` has `size` numbers for each.
inline void store_queries(const float* y, const Heads& of, int64_t sample, int64_t head, int64_t first, int64_t length,
                          int64_t size) {
    const int64_t base = sample * of.sample + head * of.head;
    alignas(64) float turned[256];
    for (int64_t e = 0; e < size; e += 16)
        for (int64_t i = 0; i < kTile && first + i < length; i += 16) {
            Avx512::transpose(reinterpret_cast<const uint32_t*>(y + e * kTile + i), kTile,
                              reinterpret_cast<uint32_t*>(turned), 16);
            for (int64_t r = 0; r < 16 && first + i + r < length; r++)
                store_numbers(of.data, of.type, base + (first + i + r) * of.position + e, first_lanes(size - e),
                              _mm512_load_ps(turned + r * 16));
        }
}

}  // namespace
}  // namespace lowbit
