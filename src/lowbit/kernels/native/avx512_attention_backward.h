// The backward of attention for AVX-512: a tile of keys by all tiles of queries that see it.
#pragma once

#include "avx512_attention.h"

namespace lowbit {
namespace {

// A tile of queries of one head as the backward takes it.
struct BackwardQueries {
    QueryLanes q;
    ChannelLanes q_channels, g_channels;
    uint8_t* g_halves;
    float *lse, *d, *dq;  // lse in powers of two

    BackwardQueries(Pieces& in, const Sizes& n)
        : q(in, n.size),
          q_channels(in, n.size),
          g_channels(in, n.width),
          g_halves(in.take<uint8_t>(kTile * n.width * 2)),
          lse(in.take<float>(kTile)),
          d(in.take<float>(kTile)),
          dq(in.take<float>(kTile * n.size)) {}

    void load(const Attention& a, const AttentionGradients& of, const Sizes& n, const Buffers& by, float* out,
              int64_t sample, int64_t head, int64_t row) const {
        load_tile(a.q, sample, head, row, a.queries, a.size, by.numbers, n.size);
        q.encode(by.numbers, n.size, a, by);
        q_channels.encode(by.numbers, n.size, a.levels.q, by);
        load_tile(of.g, sample, head, row, a.queries, a.width, by.numbers, n.width);
        g_channels.encode(by.numbers, n.width, a.levels.g, by);
        half_rows(by.numbers, n.width, by.halves);
        half_lanes(by.halves, n.width, g_halves);
        load_tile(a.out, sample, head, row, a.queries, a.width, out, n.width);
        const float* of_rows = a.lse + (sample * a.heads + head) * a.queries + row;
        for (int64_t i = 0; i < kTile; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t f = 0; f < n.width; f += 16)
                sum = _mm512_fmadd_ps(_mm512_load_ps(by.numbers + i * n.width + f),
                                      _mm512_load_ps(out + i * n.width + f), sum);
            d[i] = _mm512_reduce_add_ps(sum);
            // Beyond the last query, and where a query sees no key, every share is 0.
            const float own = row + i < a.queries ? of_rows[i] : -kInfinity;
            lse[i] = own == -kInfinity ? kInfinity : own * kLog2e;
        }
        std::fill_n(dq, kTile * n.size, 0.0f);
    }
};

// A tile of keys and values, its gradients, and what one thread has for a tile of scores.
struct BackwardKeys {
    KeyRows k;
    ChannelRows k_channels;
    uint16_t* v_halves;
    float *dk, *dv;
    float *bias, *ds;
    uint8_t* lanes;
    float* now;

    BackwardKeys(Pieces& in, const Sizes& n)
        : k(in, n.size),
          k_channels(in, n.size),
          v_halves(in.take<uint16_t>(kTile * n.width)),
          dk(in.take<float>(kTile * n.size)),
          dv(in.take<float>(kTile * n.width)),
          bias(in.take<float>(kTile * kTile)),
          ds(in.take<float>(kTile * kTile)),
          lanes(in.take<uint8_t>(kTile * kTile)),
          now(in.take<float>(kTile)) {}

    void load(const Attention& a, const Sizes& n, const Buffers& by, const float* mean, int64_t sample, int64_t group,
              int64_t column) const {
        load_keys(a, sample, group, column, mean, by.numbers, n.size);
        k.encode(by.numbers, n.size, a.levels.k);
        k_channels.encode(by.numbers, n.size, a.levels.k, by);
        load_tile(a.v, sample, group, column, a.keys, a.width, by.numbers, n.width);
        half_rows(by.numbers, n.width, v_halves);
        std::fill_n(dk, kTile * n.size, 0.0f);
        std::fill_n(dv, kTile * n.width, 0.0f);
    }
};

// The scale of a row of 64 numbers, and its codes as bytes, `zero` being that of 0.
inline float encode_row(const __m512 (&x)[4], float levels, int zero, const __mmask16 (&kept)[4], uint8_t* bytes) {
    const __m512i largest = _mm512_max_epu32(_mm512_max_epu32(magnitude(x[0]), magnitude(x[1])),
                                             _mm512_max_epu32(magnitude(x[2]), magnitude(x[3])));
    const float scale = scale_of(_mm512_reduce_max_epu32(largest), levels);
    const __m512 reciprocal = _mm512_set1_ps(1 / scale);
    for (int v = 0; v < 4; v++) {
        const __m512i code = _mm512_maskz_cvtps_epi32(kept[v], _mm512_mul_ps(x[v], reciprocal));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * v),
                        _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(zero))));
    }
    return scale;
}

// Keys j to j + 3 by all queries of a tile: shares and gradients of scores; dV and dK are added, dS is kept.
inline void gradient_rows(const Attention& a, const Sizes& n, const BackwardKeys& keys, const BackwardQueries& w,
                          const Place& at, const Dropping& dropping, int64_t j, __m512i (&largest)[4]) {
    alignas(64) uint8_t shares[4 * kTile], slopes[4 * kTile];
    float share_scale[4], slope_scale[4];
    const float keep = 1 / (1 - a.dropout);
    __m512 p[4][4];
    score_rows(keys.k, w.q, n.size, at, j, p);
    alignas(64) float kept_p[4][kTile];
    for (int r = 0; r < 4; r++) {
        for (int v = 0; v < 4; v++) {
            p[r][v] = exp2_of(_mm512_sub_ps(p[r][v], _mm512_load_ps(w.lse + 16 * v)));
            _mm512_store_ps(kept_p[r] + 16 * v, p[r][v]);
        }
        __mmask16 kept[4] = {0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF};
        if (a.dropout > 0)
            for (int v = 0; v < 4; v++) kept[v] = dropping.kept(at, 16 * v, j + r);
        share_scale[r] = encode_row(p[r], a.levels.p, 0, kept, shares + r * kTile) * keep;
    }
    add_columns(shares, w.g_channels.lanes, n.width, nullptr, share_scale, w.g_channels.scale, keys.dv + j * n.width);
    __m512 dp[4][4] = {};
    multiply_4<Halves, 4>(dp, reinterpret_cast<const uint8_t*>(keys.v_halves + j * n.width), n.width * 2, w.g_halves,
                          kTile * 4, n.width / 2);
    const __mmask16 all[4] = {0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF};
    for (int r = 0; r < 4; r++) {
        __m512 ds[4];
        for (int v = 0; v < 4; v++) {
            if (a.dropout > 0)
                dp[r][v] = _mm512_maskz_mul_ps(dropping.kept(at, 16 * v, j + r), dp[r][v], _mm512_set1_ps(keep));
            ds[v] = _mm512_mul_ps(_mm512_load_ps(kept_p[r] + 16 * v),
                                  _mm512_sub_ps(dp[r][v], _mm512_load_ps(w.d + 16 * v)));
            if (j + r >= at.keys) ds[v] = _mm512_setzero_ps();
            largest[v] = _mm512_max_epu32(largest[v], magnitude(ds[v]));
            _mm512_store_ps(keys.ds + (j + r) * kTile + 16 * v, ds[v]);
        }
        slope_scale[r] = encode_row(ds, a.levels.ds, 128, all, slopes + r * kTile) * a.scale;
    }
    add_columns(slopes, w.q_channels.lanes, n.size, w.q_channels.start, slope_scale, w.q_channels.scale,
                keys.dk + j * n.size);
}

// A tile of scores: what it adds to dV, dK and dQ.
inline void gradient_tile(const Attention& a, const Sizes& n, const BackwardKeys& keys, const BackwardQueries& w,
                          const Place& at, const Dropping& dropping) {
    const int64_t rows = round_up(at.keys, 4);
    __m512i largest[4] = {};
    for (int64_t j = 0; j < rows; j += 4) gradient_rows(a, n, keys, w, at, dropping, j, largest);
    for (int v = 0; v < 4; v++) {
        const __m512 scale = scale_of(largest[v], a.levels.ds);
        const __m512 reciprocal = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
        _mm512_store_ps(keys.now + 16 * v, _mm512_mul_ps(scale, _mm512_set1_ps(a.scale)));
        for (int64_t j = 0; j < rows; j += 4) {
            __m512i code[4];
            for (int r = 0; r < 4; r++) {
                const __m512 ds = _mm512_load_ps(keys.ds + (j + r) * kTile + 16 * v);
                code[r] = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(ds, reciprocal)), _mm512_set1_epi32(128));
            }
            _mm512_store_si512(keys.lanes + (j / 4 * kTile + 16 * v) * 4, group_of(code[0], code[1], code[2], code[3]));
        }
    }
    add_queries(keys.k_channels.rows, keys.lanes, rows / 4, n.size, keys.k_channels.start, keys.k_channels.scale,
                keys.now, nullptr, w.dq);
}

inline void store_rows_of(const float* y, int64_t stride, const Heads& of, int64_t sample, int64_t head, int64_t first,
                          int64_t length, int64_t size) {
    const int64_t base = sample * of.sample + head * of.head;
    for (int64_t j = 0; j < std::min(kTile, length - first); j++)
        for (int64_t e = 0; e < size; e += 16)
            store_numbers(of.data, of.type, base + (first + j) * of.position + e, first_lanes(size - e),
                          _mm512_load_ps(y + j * stride + e));
}

// A head of keys with all its heads of queries.
inline void differentiate(const Attention& a, const AttentionGradients& of, const Sizes& n, Pieces in,
                          const Dropping& dropping, int64_t sample, int64_t group) {
    const Buffers by(in, n.widest);
    auto *mean = in.take<float>(n.size), *out = in.take<float>(kTile * n.width);
    const BackwardKeys keys(in, n);
    std::vector<BackwardQueries> queries;
    const int64_t first = group * n.sharing;
    for (int64_t h = 0; h < n.sharing; h++)
        for (int64_t r = 0; r < n.query_tiles; r++) {
            queries.emplace_back(in, n);
            queries.back().load(a, of, n, by, out, sample, first + h, r * kTile);
        }
    mean_of_keys(a, sample, group, n.size, mean);
    for (int64_t c = 0; c < n.key_tiles; c++) {
        keys.load(a, n, by, mean, sample, group, c * kTile);
        for (int64_t h = 0; h < n.sharing; h++)
            for (int64_t r = 0; r < n.query_tiles; r++) {
                if (skips(a, r * kTile, c * kTile)) continue;
                const Place at = place_of(a, sample, first + h, r * kTile, c * kTile, keys.bias);
                gradient_tile(a, n, keys, queries[h * n.query_tiles + r], at, dropping);
            }
        store_rows_of(keys.dk, n.size, of.dk, sample, group, c * kTile, a.keys, a.size);
        store_rows_of(keys.dv, n.width, of.dv, sample, group, c * kTile, a.keys, a.width);
    }
    for (int64_t h = 0; h < n.sharing; h++)
        for (int64_t r = 0; r < n.query_tiles; r++)
            store_queries(queries[h * n.query_tiles + r].dq, of.dq, sample, first + h, r * kTile, a.queries, a.size);
}

inline void attention_backward(const Attention& a, const AttentionGradients& of) {
    const Sizes n(a);
    Pieces counted{nullptr};
    Buffers{counted, n.widest};
    counted.take<float>(n.size);
    counted.take<float>(kTile * n.width);
    BackwardKeys{counted, n};
    for (int64_t t = 0; t < n.sharing * n.query_tiles; t++) BackwardQueries{counted, n};
    const Dropping dropping(a);
    Guard guard;
#pragma omp parallel if (worth_attention_threads(a))
    {
#pragma omp for schedule(dynamic) nowait
        for (int64_t t = 0; t < a.batch * a.groups; t++)
            guard([&] {
                const Pieces in{workspace<uint8_t>(Slot::attention, counted.bytes)};
                differentiate(a, of, n, in, dropping, t / a.groups, t % a.groups);
            });
    }
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
