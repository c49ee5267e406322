#!/bin/sh
# Products of codes of one family of instruction sets, compiled apart from Python, against plain loops (products.cpp).
#
#   check.sh aarch64    cross-compiled, and run by qemu
#   check.sh avxvnni    as AVX-512 VNNI encodes the same instructions, where the processor has those
set -eu
native=src/lowbit/kernels/native
to=build/native-$1
# The flags of an instruction set are those of the module.
flags_of() { sed -n "s/^ *add_instruction_set($1 \(.*\))/\1/p" CMakeLists.txt; }
need() { command -v "$1" >/dev/null || { echo "check.sh: $1 is missing. Debian, Ubuntu: apt-get install $2" >&2; exit 1; }; }

case $1 in
aarch64)
    cxx=${CXX_AARCH64:-aarch64-linux-gnu-g++}
    need "$cxx" g++-aarch64-linux-gnu
    need qemu-aarch64 qemu-user
    sets="dotprod i8mm" define=-DLOWBIT_ARM ;;
avxvnni)
    grep -q avx512_vnni /proc/cpuinfo || { echo "check.sh: this processor lacks AVX-512 VNNI" >&2; exit 1; }
    cxx=${CXX:-g++}
    need "$cxx" g++
    sets="avxvnni" define= ;;
esac
mkdir -p "$to"
compile() { # FILE FLAGS...
    object=$to/$(basename "$1" .cpp).o
    "$cxx" -std=c++17 -O2 $define -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp -I$native -c "$1" \
        -o "$object" $2
    objects="${objects:-} $object"
}
for name in machine dispatch workspace plain; do compile $native/$name.cpp ""; done
compile tests/native/products.cpp ""
for name in $sets; do
    flags=$(flags_of "$name")
    [ "$1" = avxvnni ] && flags="-mavx2 -mfma -mavx512f -mavx512vl -mavx512vnni"
    compile $native/$name.cpp "$flags"
done
"$cxx" -static -fopenmp $objects -o "$to/products" 2>"$to/link.log" || { cat "$to/link.log" >&2; exit 1; }

if [ "$1" = aarch64 ]; then
    for name in $sets; do qemu-aarch64 -cpu max "$to/products" $name; done
    qemu-aarch64 -cpu max "$to/products" chosen "dotprod i8mm"
    qemu-aarch64 -cpu neoverse-n1 "$to/products" chosen "dotprod"
    qemu-aarch64 -cpu cortex-a72 "$to/products" chosen ""
else
    "$to/products" avxvnni
fi
