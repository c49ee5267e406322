// Attention as functions of Python, whose arguments are those of the schemas in `operators.py`.

#include "call.h"
#include "product.h"

namespace lowbit {
namespace {

using Steps = std::array<int64_t, 3>;  // numbers from one sample, head, position to the next
using MaskSteps = std::array<int64_t, 4>;
using AttentionSizes = std::array<int64_t, 7>;  // samples, heads, heads of keys, queries, keys, E, F
using Levels = std::array<float, 6>;            // of q, k, p, v, g, ds
using Key = std::array<uint32_t, 2>;

// What a tensor whose axes have these lengths and steps reaches from its first number.
template <size_t axes>
int64_t reach_of(const Call& call, const std::array<int64_t, axes>& lengths, const std::array<int64_t, axes>& steps) {
    int64_t last = 0;
    for (size_t i = 0; i < axes; i++) {
        call.need(lengths[i] >= 0 && steps[i] >= 0, "sizes are less than 0");
        if (!lengths[i]) return 0;
        last = call.plus(last, call.times(lengths[i] - 1, steps[i]));
    }
    return call.plus(last, 1);
}

Heads heads_of(Call& call, const char* name, const Memory& data, const Steps& steps, int64_t batch, int64_t heads,
               int64_t positions, int64_t size, bool written) {
    const int64_t reach = reach_of<4>(call, {batch, heads, positions, size}, {steps[0], steps[1], steps[2], 1});
    const void* from = call.take(name, data, kFloats, reach, std::numeric_limits<int64_t>::max(), written);
    return {const_cast<void*>(from), type_of(data), steps[0], steps[1], steps[2]};
}

struct Inputs {
    const Memory &q, &k, &v, &mask;
    const Steps &q_at, &k_at, &v_at;
    const MaskSteps& mask_at;
};

Attention attention_of(Call& call, const Inputs& in, const AttentionSizes& sizes, const Levels& levels, float scale,
                       bool causal, bool smooth_k, float dropout, const std::optional<Key>& key) {
    const auto [batch, heads, groups, queries, keys, size, width] = sizes;
    call.need(groups > 0 ? heads % groups == 0 : heads == groups, "heads are not whole groups of those of the keys");
    call.need(dropout >= 0 && dropout < 1 && (dropout == 0 || key), "dropout is not in [0, 1), or lacks a key");
    for (const float level : levels) call.need(level >= 1 && level <= 255, "levels are not those of 8-bit codes");
    Attention a{};
    a.batch = batch, a.heads = heads, a.groups = groups, a.queries = queries, a.keys = keys;
    a.size = size, a.width = width;
    a.q = heads_of(call, "q", in.q, in.q_at, batch, heads, queries, size, false);
    a.k = heads_of(call, "k", in.k, in.k_at, batch, groups, keys, size, false);
    a.v = heads_of(call, "v", in.v, in.v_at, batch, groups, keys, width, false);
    if (std::get<1>(in.mask) != -1) {
        const int64_t reach = reach_of<4>(call, {batch, heads, queries, keys}, in.mask_at);
        a.mask = {call.take("mask", in.mask, kFloats | kUint8, reach, std::numeric_limits<int64_t>::max(), false),
                  type_of(in.mask),
                  in.mask_at[0],
                  in.mask_at[1],
                  in.mask_at[2],
                  in.mask_at[3]};
    }
    a.levels = {levels[0], levels[1], levels[2], levels[3], levels[4], levels[5]};
    a.scale = scale, a.causal = causal, a.smooth_k = smooth_k, a.dropout = dropout;
    a.key0 = key.value_or(Key{})[0], a.key1 = key.value_or(Key{})[1];
    return a;
}

void need_units(const void* kernel) {
    if (!kernel)
        throw std::runtime_error("attention: this processor lacks avx512bf16: compute it on the reference engine");
}

void attention_forward(const Memory& q, const Steps& q_at, const Memory& k, const Steps& k_at, const Memory& v,
                       const Steps& v_at, const Memory& mask, const MaskSteps& mask_at, const AttentionSizes& sizes,
                       const Levels& levels, float scale, bool causal, bool smooth_k, float dropout,
                       const std::optional<Key>& key, const Memory& out, const Steps& out_at, const Memory& lse) {
    Call call("attention_forward");
    Attention a = attention_of(call, {q, k, v, mask, q_at, k_at, v_at, mask_at}, sizes, levels, scale, causal, smooth_k,
                               dropout, key);
    a.out = heads_of(call, "out", out, out_at, a.batch, a.heads, a.queries, a.width, true);
    a.lse = call.writes<float>("lse", lse, call.times(call.times(a.batch, a.heads), a.queries));
    call.check_disjoint();
    const auto attend = products().attend;
    need_units(reinterpret_cast<const void*>(attend));
    const nb::gil_scoped_release release;
    attend(a);
}

void attention_backward(const Memory& g, const Steps& g_at, const Memory& q, const Steps& q_at, const Memory& k,
                        const Steps& k_at, const Memory& v, const Steps& v_at, const Memory& mask,
                        const MaskSteps& mask_at, const AttentionSizes& sizes, const Levels& levels, float scale,
                        bool causal, bool smooth_k, float dropout, const std::optional<Key>& key, const Memory& out,
                        const Steps& out_at, const Memory& lse, const Memory& dq, const Steps& dq_at, const Memory& dk,
                        const Steps& dk_at, const Memory& dv, const Steps& dv_at) {
    Call call("attention_backward");
    Attention a = attention_of(call, {q, k, v, mask, q_at, k_at, v_at, mask_at}, sizes, levels, scale, causal, smooth_k,
                               dropout, key);
    a.out = heads_of(call, "out", out, out_at, a.batch, a.heads, a.queries, a.width, false);
    a.lse = const_cast<float*>(call.reads<float>("lse", lse, call.times(call.times(a.batch, a.heads), a.queries)));
    const AttentionGradients of{heads_of(call, "g", g, g_at, a.batch, a.heads, a.queries, a.width, false),
                                heads_of(call, "dq", dq, dq_at, a.batch, a.heads, a.queries, a.size, true),
                                heads_of(call, "dk", dk, dk_at, a.batch, a.groups, a.keys, a.size, true),
                                heads_of(call, "dv", dv, dv_at, a.batch, a.groups, a.keys, a.width, true)};
    call.check_disjoint();
    const auto differentiate = products().differentiate;
    need_units(reinterpret_cast<const void*>(differentiate));
    const nb::gil_scoped_release release;
    differentiate(a, of);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention_forward", &attention_forward);
    m.def("attention_backward", &attention_backward);
}

}  // namespace lowbit
