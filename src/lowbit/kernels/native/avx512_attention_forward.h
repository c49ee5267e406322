// The forward of attention for AVX-512: a tile of queries by all tiles of keys.
#pragma once

#include "avx512_attention.h"

namespace lowbit {
namespace {

// A tile of keys and values as the forward takes it.
struct ForwardKeys {
    KeyRows k;
    ChannelRows v;

    ForwardKeys(Pieces& in, const Sizes& n) : k(in, n.size), v(in, n.width) {}
};

// What one thread has for a tile of queries.
struct ForwardQueries {
    Buffers by;
    QueryLanes q;
    float *bias, *s, *o;
    uint8_t* p;
    float *peak, *top, *total, *old, *now;

    ForwardQueries(Pieces& in, const Sizes& n)
        : by(in, n.widest),
          q(in, n.size),
          bias(in.take<float>(kTile * kTile)),
          s(in.take<float>(kTile * kTile)),
          o(in.take<float>(kTile * n.width)),
          p(in.take<uint8_t>(kTile * kTile)),
          peak(in.take<float>(kTile)),
          top(in.take<float>(kTile)),
          total(in.take<float>(kTile)),
          old(in.take<float>(kTile)),
          now(in.take<float>(kTile)) {}
};

// A tile of shares: scores, their maximum, codes as lanes of queries, and the running maximum and sum.
inline void share_tile(const Attention& a, const Sizes& n, const ForwardKeys& keys, const ForwardQueries& w,
                       const Place& at, const Dropping& dropping) {
    const int64_t rows = round_up(at.keys, 4);
    const __m512 none = _mm512_set1_ps(-kInfinity), zero = _mm512_setzero_ps();
    __m512 peak[4] = {none, none, none, none};
    for (int64_t j = 0; j < rows; j += 4) {
        __m512 t[4][4];
        score_rows(keys.k, w.q, n.size, at, j, t);
        for (int r = 0; r < 4; r++)
            for (int v = 0; v < 4; v++) {
                _mm512_store_ps(w.s + (j + r) * kTile + 16 * v, t[r][v]);
                peak[v] = _mm512_max_ps(peak[v], t[r][v]);
            }
    }
    const __m512 levels = _mm512_set1_ps(a.levels.p);
    for (int v = 0; v < 4; v++) {
        // Where nothing is seen, everything counts from 0.
        const __m512 from = _mm512_mask_mov_ps(peak[v], _mm512_cmp_ps_mask(peak[v], none, _CMP_EQ_OQ), zero);
        __m512 sum = zero;
        for (int64_t j = 0; j < rows; j += 4) {
            __m512i code[4];
            for (int r = 0; r < 4; r++) {
                const __m512 p = exp2_of(_mm512_sub_ps(_mm512_load_ps(w.s + (j + r) * kTile + 16 * v), from));
                sum = _mm512_add_ps(sum, p);
                code[r] = _mm512_cvtps_epi32(_mm512_mul_ps(p, levels));
                if (a.dropout > 0) code[r] = _mm512_maskz_mov_epi32(dropping.kept(at, 16 * v, j + r), code[r]);
            }
            _mm512_store_si512(w.p + (j / 4 * kTile + 16 * v) * 4, group_of(code[0], code[1], code[2], code[3]));
        }
        const __m512 top = _mm512_load_ps(w.top + 16 * v), new_top = _mm512_max_ps(top, peak[v]);
        const __m512 base = _mm512_mask_mov_ps(new_top, _mm512_cmp_ps_mask(new_top, none, _CMP_EQ_OQ), zero);
        const __m512 old = exp2_of(_mm512_sub_ps(top, base)), now = exp2_of(_mm512_sub_ps(peak[v], base));
        const __m512 total = _mm512_mul_ps(_mm512_load_ps(w.total + 16 * v), old);
        _mm512_store_ps(w.total + 16 * v, _mm512_add_ps(total, _mm512_mul_ps(sum, now)));
        _mm512_store_ps(w.top + 16 * v, new_top);
        _mm512_store_ps(w.old + 16 * v, old);
        _mm512_store_ps(w.now + 16 * v, _mm512_div_ps(now, levels));
    }
}

// Output and log-sum-exp of a tile of queries.
inline void finish_queries(const Attention& a, const Sizes& n, const ForwardQueries& w, int64_t sample, int64_t head,
                           int64_t row) {
    const __m512 keep = _mm512_set1_ps(1 - a.dropout);
    for (int v = 0; v < 4; v++) {
        const __m512 total = _mm512_load_ps(w.total + 16 * v);
        const __mmask16 seen = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        for (int64_t f = 0; f < n.width; f++) {
            float* o = w.o + f * kTile + 16 * v;
            _mm512_store_ps(o, _mm512_maskz_div_ps(seen, _mm512_load_ps(o), _mm512_mul_ps(total, keep)));
        }
    }
    store_queries(w.o, a.out, sample, head, row, a.queries, a.width);
    float* lse = a.lse + (sample * a.heads + head) * a.queries + row;
    for (int64_t i = 0; i < std::min(kTile, a.queries - row); i++)
        lse[i] = w.total[i] == 0 ? -kInfinity : w.top[i] * kLn2 + std::log(w.total[i]);
}

inline void attend(const Attention& a, const Sizes& n, const ForwardKeys* keys, const ForwardQueries& w,
                   const Dropping& dropping, int64_t sample, int64_t head, int64_t row) {
    load_tile(a.q, sample, head, row, a.queries, a.size, w.by.numbers, n.size);
    w.q.encode(w.by.numbers, n.size, a, w.by);
    std::fill_n(w.o, kTile * n.width, 0.0f);
    std::fill_n(w.top, kTile, -kInfinity);
    std::fill_n(w.total, kTile, 0.0f);
    for (int64_t c = 0; c < n.key_tiles; c++) {
        if (skips(a, row, c * kTile)) break;
        const Place at = place_of(a, sample, head, row, c * kTile, w.bias);
        share_tile(a, n, keys[c], w, at, dropping);
        add_queries(keys[c].v.rows, w.p, ceil_div(at.keys, 4), n.width, nullptr, keys[c].v.scale, w.now, w.old, w.o);
    }
    finish_queries(a, n, w, sample, head, row);
}

inline void attention_forward(const Attention& a) {
    const Sizes n(a);
    const auto encode = [&a, &n](int64_t sample, int64_t group, const std::vector<ForwardKeys>& keys) {
        Pieces counted{nullptr};
        Buffers{counted, n.widest};
        counted.take<float>(n.size);
        Pieces in{workspace<uint8_t>(Slot::attention, counted.bytes)};
        const Buffers by(in, n.widest);
        auto* mean = in.take<float>(n.size);
        mean_of_keys(a, sample, group, n.size, mean);
        for (int64_t c = 0; c < n.key_tiles; c++) {
            load_keys(a, sample, group, c * kTile, mean, by.numbers, n.size);
            keys[c].k.encode(by.numbers, n.size, a.levels.k);
            load_tile(a.v, sample, group, c * kTile, a.keys, a.width, by.numbers, n.width);
            keys[c].v.encode(by.numbers, n.width, a.levels.v, by);
        }
    };
    Pieces of_tile{nullptr}, of_queries{nullptr};
    ForwardKeys{of_tile, n};
    ForwardQueries{of_queries, n};
    const int64_t heads_of_keys = a.batch * a.groups;
    Pieces shared{workspace<uint8_t>(Slot::attention_keys, heads_of_keys * n.key_tiles * of_tile.bytes)};
    std::vector<std::vector<ForwardKeys>> keys(heads_of_keys);
    for (auto& tiles : keys)
        for (int64_t c = 0; c < n.key_tiles; c++) tiles.emplace_back(shared, n);
    const Dropping dropping(a);
    const int64_t heads = a.batch * a.heads;
    Guard guard;
#pragma omp parallel if (worth_attention_threads(a))
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < heads_of_keys; t++) guard([&] { encode(t / a.groups, t % a.groups, keys[t]); });
        // The longest rows of causal attention come first.
#pragma omp for schedule(dynamic) nowait
        for (int64_t t = 0; t < heads * n.query_tiles; t++)
            guard([&] {
                Pieces in{workspace<uint8_t>(Slot::attention, of_queries.bytes)};
                const ForwardQueries w(in, n);
                const int64_t tile = n.query_tiles - 1 - t / heads, sample = t % heads / a.heads, head = t % a.heads;
                attend(a, n, keys[sample * a.groups + head / n.sharing].data(), w, dropping, sample, head,
                       tile * kTile);
            });
    }
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
