// What products of codes on vectors of AArch64 share. Codes are signed on both sides.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "all_products.h"
#include "plain_vectors.h"

namespace lowbit {
namespace {

struct NeonSquare {
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
        uint32x4_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vld1q_u32(in + i * in_stride);
        for (int i = 0; i < 2; i++) {
            const uint32x4_t low = i ? vtrn2q_u32(r[0], r[1]) : vtrn1q_u32(r[0], r[1]);
            const uint32x4_t high = i ? vtrn2q_u32(r[2], r[3]) : vtrn1q_u32(r[2], r[3]);
            vst1q_u32(out + i * out_stride, vcombine_u32(vget_low_u32(low), vget_low_u32(high)));
            vst1q_u32(out + (i + 2) * out_stride, vcombine_u32(vget_high_u32(low), vget_high_u32(high)));
        }
    }
};

using Neon = PlainVectors<NeonSquare, int8_t>;

}  // namespace
}  // namespace lowbit
