// What the file of each instruction set brings to the tables of `dispatch.cpp`.
#pragma once

#include "passes.h"
#include "product.h"

namespace lowbit {

// Constants, so that no code of an instruction set runs before it is chosen.
extern const Passes plain_passes, avx2_passes, avx512_passes;
extern const Products avx2_products, avxvnni_products, avx512vnni_products, avx512bf16_products, amx_products;
extern const Products dotprod_products, i8mm_products;

}  // namespace lowbit
