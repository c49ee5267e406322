// Products of codes for AArch64 with dot products (FEAT_DotProd).

#include "block_kernels.h"
#include "dispatch.h"
#include "neon_kernels.h"
#include "vector_kernels.h"

namespace lowbit {
namespace {

struct Sdot {
    static constexpr int kLanes = 4;
    using Accumulator = int32_t;
    using Vector = int32x4_t;
    using Groups = int8x16_t;
    static Groups groups(const uint8_t* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }
    static Groups repeat(const uint8_t* from) {
        uint32_t group;
        std::memcpy(&group, from, 4);
        return vreinterpretq_s8_u32(vdupq_n_u32(group));
    }
    static void add(Vector& sum, Groups lhs, Groups rhs) { sum = vdotq_s32(sum, lhs, rhs); }
    static void load(Vector& sum, const int32_t* c) { sum = vld1q_s32(c); }
    static void save(int32_t* c, Vector sum) { vst1q_s32(c, sum); }

    static constexpr uint32_t kBias = 0;
    using Floats = float32x4_t;
    static Floats scaled(Vector sum, float scale) { return vmulq_n_f32(vcvtq_f32_s32(sum), scale); }
    static Floats add_scaled(Floats total, Floats x, const float* scales) {
        return vfmaq_f32(total, x, vld1q_f32(scales));
    }
    static void save(float* c, Floats total) { vst1q_f32(c, total); }
};

struct Dotprod : Neon {
    template <class Kind, LhsLayout lhs_layout, bool rhs_packed>
    static MicroKernel<int32_t> kernel(int64_t columns, int64_t) {
        return columns > 16 ? micro_kernel<Sdot, 4, 4, 32, lhs_layout, rhs_packed>
                            : micro_kernel<Sdot, 4, 4, 16, lhs_layout, rhs_packed>;
    }
};

}  // namespace

constexpr Products dotprod_products =
    Products().with_codes(multiply<Dotprod, S8S8>).with_blocks(multiply_blocks<Dotprod, S8S8, BlockKernel<Sdot, 4>>);

}  // namespace lowbit
