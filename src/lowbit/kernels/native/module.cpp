// The module of native kernels: its functions, by their names in Python.

#include "call.h"
#include "machine.h"

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", &lowbit::instruction_sets,
          "Instruction sets that the kernels use here, by their usual names, lowest first.");
    lowbit::bind_attention(m);
    lowbit::bind_passes(m);
    lowbit::bind_products(m);
}
