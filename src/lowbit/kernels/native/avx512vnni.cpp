// Products of codes for AVX-512 VNNI.

#include "all_products.h"
#include "avx512_kernels.h"
#include "block_gemm.h"
#include "dispatch.h"

namespace lowbit {
namespace {

struct Vnni {
    using Accumulator = int32_t;
    using Vector = __m512i;
    static void add(Vector& sum, __m512i lhs, __m512i rhs) { sum = _mm512_dpbusd_epi32(sum, lhs, rhs); }
    static void load(Vector& sum, const int32_t* c) { sum = _mm512_loadu_si512(c); }
    static void save(int32_t* c, Vector sum) { _mm512_storeu_si512(c, sum); }
};

// Sums of a block in int32, and of all blocks in float32, of 4 rows by 32 columns in registers.
struct VnniBlocks {
    static constexpr int kRows = 4;

    // Where group g of an rhs panel begins.
    static const uint8_t* group_of(const uint8_t* rhs, int64_t g) { return rhs + g / 16 * kPanelStep + g % 16 * 64; }

    // Minus 128 times the sum of each column's codes in each block.
    static void begin(const uint8_t* rhs, int64_t groups, int64_t in_block, int32_t* to) {
        const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
        for (int64_t first = 0; first < groups; first += in_block, to += kNr)
            for (int64_t half = 0; half < 2; half++) {
                __m512i sum = _mm512_setzero_si512();
                for (int64_t g = first; g < std::min(first + in_block, groups); g++)
                    sum = _mm512_dpbusd_epi32(sum, bias, _mm512_loadu_si512(group_of(rhs, g) + half * kBlock));
                _mm512_storeu_si512(to + half * 16, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
            }
    }

    template <LhsLayout layout>
    static void multiply(const BlockPanel& p) {
        constexpr Strides at = layout == LhsLayout::blocked ? kBlocked : kDepthMajor;
        for (int64_t first = 0; first < p.rows; first += kRows) {
            const uint8_t* lhs = p.lhs + first / 16 * at.half + first % 16 * at.row;
            const float *lhs_scale = p.lhs_scale + first, *rhs_scale = p.rhs_scale;
            const int32_t* begin = p.begin;
            __m512 total[kRows][2] = {};
            for (int64_t from = 0; from < p.groups; from += p.in_block) {
                const int64_t until = std::min(from + p.in_block, p.groups);
                __m512i sum[kRows][2];
                for (int i = 0; i < kRows; i++)
                    for (int j = 0; j < 2; j++) sum[i][j] = _mm512_loadu_si512(begin + 16 * j);
                for (int64_t g = from; g < until;) {
                    // Groups of one step lie one after the other.
                    const int64_t end = std::min(until, (g / 16 + 1) * 16);
                    const uint8_t* right = group_of(p.rhs, g);
                    const uint8_t* left = lhs + g / 16 * at.step + g % 16 * at.group;
                    for (; g < end; g++, right += 64, left += at.group) {
                        const __m512i low = _mm512_loadu_si512(right), high = _mm512_loadu_si512(right + kBlock);
                        for (int i = 0; i < kRows; i++) {
                            int32_t group;
                            std::memcpy(&group, left + i * at.row, 4);
                            const __m512i row = _mm512_set1_epi32(group);
                            sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], row, low);
                            sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], row, high);
                        }
                    }
                }
                for (int j = 0; j < 2; j++) {
                    const __m512 column = _mm512_loadu_ps(rhs_scale + 16 * j);
                    for (int i = 0; i < kRows; i++) {
                        const __m512 scaled =
                            _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), _mm512_set1_ps(lhs_scale[i]));
                        total[i][j] = _mm512_fmadd_ps(scaled, column, total[i][j]);
                    }
                }
                lhs_scale += kMr, rhs_scale += kNr, begin += kNr;
            }
            for (int i = 0; i < kRows; i++)
                for (int j = 0; j < 2; j++) _mm512_store_ps(p.c + (first + i) * kNr + 16 * j, total[i][j]);
        }
    }
};

}  // namespace

constexpr Products avx512vnni_products = Products()
                                             .with_codes(multiply<Avx512Kernels<Vnni>, U8S8>)
                                             .with_blocks(multiply_blocks<Avx512Kernels<Vnni>, VnniBlocks>);

}  // namespace lowbit
