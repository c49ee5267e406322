// Attention for AVX-512 with VNNI and BF16: the drivers. Tiles and products are those of avx512_attention_tiles.h.
//
// Scores are kept as powers of two, log2(e) times those of the definition. A task of the forward is a tile of queries;
// one of the backward is a head of keys with all its heads of queries, so that sums have one order for any number of
// threads.
#pragma once

#include <omp.h>

#include <cmath>
#include <limits>
#include <vector>

#include "avx512_attention_tiles.h"
#include "parallel.h"
#include "workspace.h"

namespace lowbit {
namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Pieces of a block of memory, each aligned to 64 bytes; without a block it only counts.
struct Pieces {
    uint8_t* block;
    int64_t bytes = 0;

    template <class T>
    T* take(int64_t count) {
        T* piece = block ? reinterpret_cast<T*>(block + bytes) : nullptr;
        bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }
};

// What follows from the sizes of a call.
struct Sizes {
    int64_t size, width, widest;  // E and F, rounded up to vectors
    int64_t query_tiles, key_tiles, sharing;

    explicit Sizes(const Attention& a)
        : size(round_up(a.size, 16)),
          width(round_up(a.width, 16)),
          widest(std::max(size, width)),
          query_tiles(ceil_div(a.queries, kTile)),
          key_tiles(ceil_div(a.keys, kTile)),
          sharing(a.groups ? a.heads / a.groups : 0) {}
};

inline bool worth_attention_threads(const Attention& a) {
    return static_cast<double>(a.batch * a.heads) * static_cast<double>(a.queries) * static_cast<double>(a.keys) *
               static_cast<double>(a.size + a.width) >
           1 << 21;
}

// A tile as numbers and as bytes, before bytes are in their order.
struct Buffers {
    float* numbers;
    int8_t* bytes;
    uint16_t* halves;
    uint8_t* lanes;

    Buffers(Pieces& in, int64_t stride)
        : numbers(in.take<float>(kTile * stride)),
          bytes(in.take<int8_t>(kTile * stride)),
          halves(in.take<uint16_t>(kTile * stride)),
          lanes(in.take<uint8_t>(kTile * stride)) {}
};

// Keys as rows, for the scores.
struct KeyRows {
    int8_t* rows;
    float* scale;
    int32_t* start;

    KeyRows(Pieces& in, int64_t stride)
        : rows(in.take<int8_t>(kTile * stride)), scale(in.take<float>(kTile)), start(in.take<int32_t>(kTile)) {}
    void encode(const float* x, int64_t stride, float levels) const {
        encode_rows(x, stride, levels, rows, scale);
        starts_of_rows(rows, kTile, stride, start);
    }
};
// Keys or values as rows of channels, for sums over keys.
struct ChannelRows {
    uint8_t* rows;
    float* scale;
    int32_t* start;

    ChannelRows(Pieces& in, int64_t stride)
        : rows(in.take<uint8_t>(kTile * stride)), scale(in.take<float>(stride)), start(in.take<int32_t>(stride)) {}
    void encode(const float* x, int64_t stride, float levels, const Buffers& by) const {
        encode_columns(x, stride, levels, by.bytes, scale);
        lanes_of_columns(by.bytes, stride, by.lanes);
        starts_of_lanes(by.lanes, stride, start);
        rows_of_lanes(by.lanes, stride, rows);
    }
};
// Queries as lanes, for the scores; `factor` has the scale of the scores in it.
struct QueryLanes {
    uint8_t* lanes;
    float* factor;

    QueryLanes(Pieces& in, int64_t stride) : lanes(in.take<uint8_t>(kTile * stride)), factor(in.take<float>(kTile)) {}
    void encode(const float* x, int64_t stride, const Attention& a, const Buffers& by) const {
        encode_rows(x, stride, a.levels.q, by.bytes, factor);
        for (int64_t i = 0; i < kTile; i++) factor[i] *= a.scale * kLog2e;
        lanes_of_rows(by.bytes, stride, lanes);
    }
};
// Queries or gradients as lanes of channels, for sums over queries.
struct ChannelLanes {
    uint8_t* lanes;
    float* scale;
    int32_t* start;

    ChannelLanes(Pieces& in, int64_t stride)
        : lanes(in.take<uint8_t>(kTile * stride)), scale(in.take<float>(stride)), start(in.take<int32_t>(stride)) {}
    void encode(const float* x, int64_t stride, float levels, const Buffers& by) const {
        encode_columns(x, stride, levels, by.bytes, scale);
        lanes_of_columns(by.bytes, stride, lanes);
        starts_of_lanes(lanes, stride, start);
    }
};

// The mean of a head's keys over all positions, summed in double.
inline void mean_of_keys(const Attention& a, int64_t sample, int64_t group, int64_t stride, float* mean) {
    const int64_t base = sample * a.k.sample + group * a.k.head;
    for (int64_t e = 0; e < stride; e += 16) {
        __m512d low = _mm512_setzero_pd(), high = low;
        for (int64_t j = 0; a.smooth_k && j < a.keys; j++) {
            const __m512 x = load_numbers(a.k.data, a.k.type, base + j * a.k.position + e, first_lanes(a.size - e));
            low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
            high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
        }
        const __m512d count = _mm512_set1_pd(static_cast<double>(std::max<int64_t>(a.keys, 1)));
        _mm256_storeu_ps(mean + e, _mm512_cvtpd_ps(_mm512_div_pd(low, count)));
        _mm256_storeu_ps(mean + e + 8, _mm512_cvtpd_ps(_mm512_div_pd(high, count)));
    }
}
inline void load_keys(const Attention& a, int64_t sample, int64_t group, int64_t first, const float* mean, float* to,
                      int64_t stride) {
    load_tile(a.k, sample, group, first, a.keys, a.size, to, stride);
    if (!a.smooth_k) return;
    for (int64_t j = 0; j < std::min(kTile, a.keys - first); j++)
        for (int64_t e = 0; e < stride; e += 16)
            _mm512_store_ps(to + j * stride + e,
                            _mm512_sub_ps(_mm512_load_ps(to + j * stride + e), _mm512_load_ps(mean + e)));
}

// ---- scores ----

// Where a tile of scores lies, and what is added to it.
struct Place {
    int64_t sample, head, row, column;  // of the first query and the first key
    int64_t keys;                       // of this tile
    bool diagonal;                      // some of its keys come after some of its queries, and `causal` holds
    const float* bias;                  // [64 keys][64 queries], or null
};

inline Place place_of(const Attention& a, int64_t sample, int64_t head, int64_t row, int64_t column, float* bias) {
    Place at{sample, head, row, column, std::min(kTile, a.keys - column), a.causal && column + kTile - 1 > row,
             nullptr};
    const ScoreMask& m = a.mask;
    if (!m.data) return at;
    const int64_t base = sample * m.sample + head * m.head, rows = std::min(kTile, a.queries - row);
    for (int64_t j = 0; j < kTile; j++)
        for (int64_t i = 0; i < kTile; i++) {
            const bool inside = i < rows && j < at.keys;
            const int64_t from = inside ? base + (row + i) * m.row + (column + j) * m.column : 0;
            float value = 0;
            if (inside && m.type == Type::u8)
                value = static_cast<const uint8_t*>(m.data)[from] ? 0.0f : -kInfinity;
            else if (inside)
                value = kLog2e * (m.type == Type::f32 ? static_cast<const float*>(m.data)[from]
                                                      : bf16_to_float(static_cast<const uint16_t*>(m.data)[from]));
            bias[j * kTile + i] = value;
        }
    at.bias = bias;
    return at;
}

// Whether no query from `row` on in a tile sees a key from `column` on.
inline bool skips(const Attention& a, int64_t row, int64_t column) {
    return a.causal && column >= std::min(row + kTile, a.queries);
}

// Scores of keys j to j + 3 of a tile and all its queries; -inf where they are not seen.
inline void score_rows(const KeyRows& k, const QueryLanes& q, int64_t stride, const Place& at, int64_t j,
                       __m512 (&t)[4][4]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 hidden = _mm512_set1_ps(-kInfinity);
    __m512i sum[4][4];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < 4; v++) sum[r][v] = _mm512_set1_epi32(k.start[j + r]);
    multiply_4<LanesUnsigned, 4>(sum, reinterpret_cast<const uint8_t*>(k.rows) + j * stride, stride, q.lanes, kTile * 4,
                                 stride / 4);
    for (int r = 0; r < 4; r++) {
        const __m512 scale = _mm512_set1_ps(k.scale[j + r]);
        const __m512i first = _mm512_set1_epi32(static_cast<int>(at.column + j + r - at.row));
        for (int v = 0; v < 4; v++) {
            __m512 s =
                _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), _mm512_mul_ps(scale, _mm512_load_ps(q.factor + 16 * v)));
            if (at.bias) {
                const __m512 bias = _mm512_load_ps(at.bias + (j + r) * kTile + 16 * v);
                s = _mm512_mask_mov_ps(_mm512_add_ps(s, bias), _mm512_cmp_ps_mask(bias, hidden, _CMP_EQ_OQ), hidden);
            }
            if (at.diagonal) {
                const __m512i i = _mm512_add_epi32(lane, _mm512_set1_epi32(16 * v));
                s = _mm512_mask_mov_ps(s, _mm512_cmplt_epi32_mask(i, first), hidden);
            }
            t[r][v] = j + r < at.keys ? s : hidden;
        }
    }
}

// Which shares are kept, of key `column` and 16 queries from `row` on.
struct Dropping {
    __m512i key0, key1, step;
    __m512i least;
    int64_t heads, queries, keys;

    explicit Dropping(const Attention& a)
        : key0(_mm512_set1_epi32(static_cast<int>(a.key0))),
          key1(_mm512_set1_epi32(static_cast<int>(a.key1))),
          step(_mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                  _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(a.keys) * kGolden)))),
          least(_mm512_set1_epi32(static_cast<int>(std::ceil(a.dropout * 0x1p24f)))),
          heads(a.heads),
          queries(a.queries),
          keys(a.keys) {}
    __mmask16 kept(const Place& at, int64_t i, int64_t j) const {
        const int64_t number = ((at.sample * heads + at.head) * queries + at.row + i) * keys + at.column + j;
        const auto first = static_cast<int>(static_cast<uint32_t>(number) * kGolden);
        __m512i h = _mm512_add_epi32(_mm512_add_epi32(_mm512_set1_epi32(first), step), key0);
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        h = _mm512_xor_si512(_mm512_mullo_epi32(h, _mm512_set1_epi32(0x7FEB352D)), key1);
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 15));
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x846CA68Bu)));
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        return _mm512_cmpge_epi32_mask(_mm512_srli_epi32(h, 8), least);
    }
};

}  // namespace
}  // namespace lowbit
