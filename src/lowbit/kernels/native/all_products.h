// Every product of one kind on one instruction set.
//
// An instruction set is a struct `Isa`:
//
//   kTiles             whether units read tiles: a packed lhs is blocked whatever its order, and rows are always whole
//   kLeastRows         rows that a micro-kernel computes at least
//   Session            what a thread keeps while it multiplies, such as the configuration of its tiles
//   kernel<Kind, lhs_layout, rhs_packed>(columns, rows)    the micro-kernel, see layout.h
//   transpose, interleave, add_lhs_sums, add_rhs_sums      for packing, see avx512_vectors.h
//   store_rows                                             for the epilogue, see epilogue.h
//
// The drivers are templates over it and are compiled with its file, so that the compiler turns their plain loops into
// its vectors.
#pragma once

#include "gemm.h"
#include "implicit_gemm.h"
#include "implicit_weight_gemm.h"

namespace lowbit {
namespace {

template <class Isa, class Kind>
void multiply(const Product& p) {
    if (!convolve<Isa, Kind>(p) && !convolve_weight<Isa, Kind>(p)) gemm<Isa, Kind>(p);
}

}  // namespace
}  // namespace lowbit
