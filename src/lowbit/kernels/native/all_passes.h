// The table of all passes, as the instruction set of the file that includes this compiles them.
//
// They are plain loops that the compiler turns into vectors. Everything is local to the including file, so that the
// linker keeps each instruction set's own.
#pragma once

#include "blocks.h"
#include "books.h"
#include "codes.h"
#include "hadamard.h"
#include "norm.h"
#include "passes.h"
#include "ranges.h"
#include "sums.h"

namespace lowbit {
namespace {

template <class Encoder>
constexpr Passes all_passes() {
    Passes p{};
    p.extremes = extremes;
    p.observe = observe;
    p.encode = encode<Encoder>;
    p.quantize = quantize<Encoder>;
    p.encode_blocks = encode_blocks<Encoder>;
    p.hadamard = hadamard;
    p.fake_quantize = fake_quantize;
    p.round_bf16 = round_bf16;
    p.noise = noise;
    p.encode_book = encode_book;
    p.decode_book = decode_book;
    p.sums = sums;
    p.row_sums = row_sums;
    p.add_offsets = add_offsets;
    p.code_sums = code_sums;
    p.code_statistics = code_statistics;
    p.affine = affine;
    p.normalize = normalize;
    p.rectify_backward = rectify_backward;
    p.normalize_backward = normalize_backward;
    return p;
}

}  // namespace
}  // namespace lowbit
