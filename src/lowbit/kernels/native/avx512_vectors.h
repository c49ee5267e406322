// What packing and the epilogue do with vectors of AVX-512: the part of an instruction set that its micro-kernels
// share.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "epilogue.h"
#include "layout.h"
#include "product.h"

namespace lowbit {
namespace {

struct Avx512 {
    // Transpose 16 x 16 groups.
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
        __m512i r[16], t[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * in_stride);
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
            t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
        }
        for (int i = 0; i < 4; i++) {
            _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
            _mm512_storeu_si512(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
            _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
            _mm512_storeu_si512(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
        }
    }

    // Interleave the numbers of 4 rows of bytes, or of 2 rows of halves, each `width` long, into groups.
    static void interleave(const uint8_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
        const __m512i to_lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i in_lanes =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) {
            const auto row = [&](int64_t r) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r * stride + i));
            };
            __m512i all = _mm512_castsi128_si512(row(0));
            all = _mm512_inserti32x4(all, row(1), 1);
            all = _mm512_inserti32x4(all, row(2), 2);
            all = _mm512_inserti32x4(all, row(3), 3);
            _mm512_storeu_si512(groups + i, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lanes, all), in_lanes));
        }
        const uint8_t *a = rows, *b = rows + stride, *c = rows + 2 * stride, *d = rows + 3 * stride;
        for (; i < width; i++) groups[i] = a[i] | b[i] << 8 | c[i] << 16 | static_cast<uint32_t>(d[i]) << 24;
    }
    static void interleave(const uint16_t* rows, int64_t stride, int64_t width, uint32_t* groups) {
        const uint16_t *a = rows, *b = rows + stride;
        for (int64_t i = 0; i < width; i++) groups[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
    }

    // Add the codes of each row of an lhs panel, of so many quarters of steps.
    static void add_lhs_sums(const uint8_t* lhs, int64_t quarters, const Strides& at, int32_t* sums) {
        if (at.group != kBlocked.group) {
            const __m512i ones = _mm512_set1_epi8(1);
            for (int64_t half = 0; half < 2; half++) {
                __m512i sum = _mm512_loadu_si512(sums + half * 16);
                for (int64_t g = 0; g < quarters * 4; g++)
                    sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(lhs + half * at.half + g * at.group), ones);
                _mm512_storeu_si512(sums + half * 16, sum);
            }
            return;
        }
        const __m512i none = _mm512_setzero_si512();
        for (int64_t i = 0; i < kMr; i++) {
            const uint8_t* row = lhs + i / 16 * at.half + i % 16 * at.row;
            __m512i sum = none;
            for (int64_t s = 0; s < quarters / 4; s++)
                sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_load_si512(row + s * at.step), none));
            sums[i] += static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
        }
    }

    // Add the codes of each column of an rhs panel, 16 or 32 of them, of so many quarters of steps.
    static void add_rhs_sums(const uint8_t* rhs, int64_t quarters, int64_t columns, const Strides& at, int32_t* sums) {
        const __m512i ones = _mm512_set1_epi8(1);
        for (int64_t half = 0; half < columns / 16; half++) {
            __m512i sum = _mm512_loadu_si512(sums + half * 16);
            for (int64_t q = 0; q < quarters; q++)
                for (int64_t g = 0; g < 4; g++) {
                    const uint8_t* from = rhs + half * at.half + q / 4 * at.step + (q % 4 * 4 + g) * at.row;
                    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(from));
                }
            _mm512_storeu_si512(sums + half * 16, sum);
        }
    }

    // `finish_rows` of columns n to n + `columns`, where the scales of 16 columns lie side by side or are one; rows one
    // after the other, so that a line of the cache is written at once.
    template <class Accumulator>
    static void store_rows(const Result& r, const Accumulator* sums, int64_t stride, ZeroPoints zero, int64_t m,
                           int64_t step, int64_t rows, int64_t n, int64_t columns, const int32_t* lhs_sums,
                           const int32_t* rhs_sums) {
        __m512i column[2];
        __m512 scale[2], bias[2];
        __mmask16 mask[2];
        for (int64_t half = 0; half < 2; half++) {
            const int64_t count = std::clamp<int64_t>(columns - half * 16, 0, 16), at = n + half * 16;
            mask[half] = static_cast<__mmask16>((1u << count) - 1);
            column[half] = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(zero.lhs)),
                                              _mm512_loadu_si512(rhs_sums + half * 16));
            scale[half] = r.column_scales == 1
                              ? _mm512_set1_ps(r.column_scale[0])
                              : _mm512_maskz_loadu_ps(mask[half], r.column_scale + at % r.column_scales);
            bias[half] = r.bias ? _mm512_maskz_loadu_ps(mask[half], r.bias + at) : _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < rows; i++) {
            const uint32_t row = zero.of_row(lhs_sums[i]);
            const __m512 row_scale = _mm512_set1_ps(r.row_scale[r.row_scales == 1 ? 0 : m + i * step]);
            const int64_t to = (m + i * step) * r.stride + n;
            for (int64_t half = 0; half < (columns > 16 ? 2 : 1); half++) {
                __m512 y = _mm512_mul_ps(without_zero_points(sums + i * stride + half * 16, column[half], row),
                                         _mm512_mul_ps(row_scale, scale[half]));
                if (r.bias) y = _mm512_add_ps(y, bias[half]);
                if (r.type == Type::f32)
                    _mm512_mask_storeu_ps(static_cast<float*>(r.data) + to + half * 16, mask[half], y);
                else
                    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(r.data) + to + half * 16, mask[half], to_bf16(y));
            }
        }
    }

  private:
    // `subtract_zero_points` and `float_to_bf16` of 16 numbers.
    static __m512 without_zero_points(const int32_t* sum, __m512i column, uint32_t row) {
        const __m512i s = _mm512_sub_epi32(_mm512_loadu_si512(sum), column);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(static_cast<int>(row))));
    }
    static __m512 without_zero_points(const float* sum, __m512i, uint32_t) { return _mm512_loadu_ps(sum); }
    static __m256i to_bf16(__m512 y) {
        const __m512i bits = _mm512_castps_si512(y);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
    }
};

}  // namespace
}  // namespace lowbit
