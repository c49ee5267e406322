"""Compile every variant of every Triton kernel for every architecture, without a GPU: the table of docs/gpu.md.

    python benchmarks/triton_proofs.py                   # some minutes
    python benchmarks/triton_proofs.py --kernels ranges  # the rows of these kernels alone

It fails if a variant spills registers, or if a product does not run on the integer matrix units.
"""

import argparse
import re
import sys
from pathlib import Path

import triton

from lowbit.kernels.triton import proofs, variants

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- benchmarks/triton_proofs.py writes what follows -->\n", "<!-- until here -->\n"


def main() -> None:
    """Compile, check, write."""
    every = variants.all_variants()
    kernels = list(dict.fromkeys(variant.kernel.__name__ for variant in every))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernels", nargs="*", choices=kernels, default=kernels, help="whose rows are made again")
    chosen = parser.parse_args().kernels
    found = []
    for capability in proofs.CAPABILITIES:
        for variant in every:
            if variant.kernel.__name__ in chosen:
                found.append(proofs.compiled(variant, capability))
        print(f"compute capability {capability / 10}: {len(found)} compiled", file=sys.stderr, flush=True)
    header, rule, *rows = proofs.table(found).splitlines()
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    kept, after = rest.split(END)
    rows += [row for row in re.findall(r"^\| `.*", kept, re.MULTILINE) if row.split("`")[1] not in chosen]
    rows.sort(key=lambda row: kernels.index(row.split("`")[1]))  # and by capability, as they were
    table = "\n".join((header, rule, *rows))
    PAGE.write_text(f"{before}{BEGIN}\nWith Triton {triton.__version__}:\n\n{table}\n\n{END}{after}", encoding="utf-8")
    if faults := proofs.faults(found):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
