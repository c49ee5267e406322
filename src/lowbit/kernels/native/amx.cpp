// Products for AMX: a block in a tile register, a panel by a panel in four accumulator tiles.
//
//   tile 4: lhs rows 0-15    tile 6: rhs columns 0-15     C: | tile 0 | tile 1 |
//   tile 5: lhs rows 16-31   tile 7: rhs columns 16-31       | tile 2 | tile 3 |

#include <immintrin.h>

#include "all_products.h"
#include "avx512_vectors.h"
#include "dispatch.h"

namespace lowbit {
namespace {

// The dot products of a step, `wide` for both halves of the columns. The intrinsics take literals only.
template <bool wide>
inline void multiply_tiles(const U8S8*) {
    _tile_dpbusd(0, 4, 6);
    if constexpr (wide) _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    if constexpr (wide) _tile_dpbusd(3, 5, 7);
}
template <bool wide>
inline void multiply_tiles(const S8S8*) {
    _tile_dpbssd(0, 4, 6);
    if constexpr (wide) _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    if constexpr (wide) _tile_dpbssd(3, 5, 7);
}
template <bool wide>
inline void multiply_tiles(const Bf16*) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (wide) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (wide) _tile_dpbf16ps(3, 5, 7);
}

template <class Kind, bool wide>
void micro_kernel(const uint8_t* lhs, const Extent& extent, const uint8_t* rhs, typename Kind::Accumulator* c,
                  int64_t c_stride, bool add) {
    const int64_t bytes = c_stride * 4;
    if (add) {
        _tile_loadd(0, c, bytes);
        if constexpr (wide) _tile_loadd(1, c + 16, bytes);
        _tile_loadd(2, c + 16 * c_stride, bytes);
        if constexpr (wide) _tile_loadd(3, c + 16 * c_stride + 16, bytes);
    } else {
        _tile_zero(0);
        if constexpr (wide) _tile_zero(1);
        _tile_zero(2);
        if constexpr (wide) _tile_zero(3);
    }
    const int64_t steps = extent.steps + (extent.quarters > 0);
    for (int64_t l = 0; l < extent.lines; l++) {
        const uint8_t* row = lhs + l * extent.lhs.line;
        for (int64_t s = 0; s < steps; s++, rhs += extent.rhs.step) {
            _tile_loadd(4, row + s * extent.lhs.step, extent.lhs.row);
            _tile_loadd(6, rhs, extent.rhs.row);
            _tile_loadd(5, row + extent.lhs.half + s * extent.lhs.step, extent.lhs.row);
            if constexpr (wide) _tile_loadd(7, rhs + extent.rhs.half, extent.rhs.row);
            multiply_tiles<wide>(static_cast<const Kind*>(nullptr));
        }
    }
    _tile_stored(0, c, bytes);
    if constexpr (wide) _tile_stored(1, c + 16, bytes);
    _tile_stored(2, c + 16 * c_stride, bytes);
    if constexpr (wide) _tile_stored(3, c + 16 * c_stride + 16, bytes);
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Amx : Avx512 {
    static constexpr bool kTiles = true;
    static constexpr int64_t kLeastRows = kMr;

    // Keeps the tile registers of a thread configured while it lives.
    struct Session {
        Session() {
            // Not a local: the compiler does not see that the instruction reads all of it.
            static const TileShapes shapes;
            _tile_loadconfig(&shapes);
        }
        ~Session() { _tile_release(); }
    };

    template <class Kind, LhsLayout, bool rhs_packed>
    static MicroKernel<typename Kind::Accumulator> kernel(int64_t columns, int64_t) {
        return columns <= 16 ? micro_kernel<Kind, false> : micro_kernel<Kind, true>;
    }
};

void multiply_codes(const Product& p) {
    if (convolve<Amx, U8S8>(p)) return;
    if (S8S8::fits(p) ? convolve_weight<Amx, S8S8>(p) : convolve_weight<Amx, U8S8>(p)) return;
    gemm<Amx, U8S8>(p);
}

}  // namespace

constexpr Products amx_products = Products().with_codes(multiply_codes).with_bf16(multiply<Amx, Bf16>);

}  // namespace lowbit
