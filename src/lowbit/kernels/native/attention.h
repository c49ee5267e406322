// Quantised attention: what its kernels take. `lowbit.attention.definition` says what they compute.
//
// Notation: B samples, H heads of queries, G of keys, L queries, S keys, E size of a head, F of its values; P the
// shares, g the gradient of the output.
#pragma once

#include <cstdint>

#include "number.h"

namespace lowbit {

// Positions of queries, and of keys, in a tile.
constexpr int64_t kTile = 64;

// A tensor (samples, heads, positions, size) of float32 or bfloat16, whose last axis has no gaps.
struct Heads {
    void* data;
    Type type;
    int64_t sample, head, position;  // numbers from one to the next
};

// What is added to the scores, or which of them count: (B, H, L, S), with steps of 0 along what is broadcast.
struct ScoreMask {
    const void* data;  // null for none
    Type type;         // u8: a byte that is not 0 where a query sees a key; else float
    int64_t sample, head, row, column;
};

// The largest codes of the operands; those of `p` have no sign where it is more than 127.
struct AttentionLevels {
    float q, k, p, v, g, ds;
};

struct Attention {
    int64_t batch, heads, groups, queries, keys, size, width;
    Heads q, k, v;
    ScoreMask mask;
    AttentionLevels levels;
    float scale;
    bool causal, smooth_k;
    float dropout;
    uint32_t key0, key1;  // of the noise that drops shares
    Heads out;            // written by the forward, read by the backward
    float* lse;           // (B, H, L) without gaps, likewise
};

struct AttentionGradients {
    Heads g, dq, dk, dv;
};

}  // namespace lowbit
