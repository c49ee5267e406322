"""What the kernels share: the grid of a scale, rounding to codes, and the noise of `lowbit.numerics.rounding`.

Notation: x real value, S scale, t = x / S, q code, u noise in [0, 1), h a 32-bit hash. Largest magnitudes travel as the
bits of non-negative floats, whose order as whole numbers is that of the floats, with inf and then nan above all.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """The bits of ``|x|``, int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, levels, floor):
    """``S = max(m / levels, floor)``; a scale of 0 becomes 1, nan stays nan."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), levels)
    scale = tl.where(scale < floor, floor, scale)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def power_scale_of(bits, levels):
    """``2**(floor(log2 m) - floor(log2 levels))``, 2**-127 at least; 1 for m = 0; inf and nan stay what they are."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), levels)
    most = (tl.zeros(bits.shape, tl.float32) + levels).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - (most >> 23)  # that of a subnormal m ends below -127 anyway
    power = tl.where(exponent >= -126, (exponent + 127) << 23, 0x00400000).to(tl.float32, bitcast=True)
    return tl.where(bits == 0, 1.0, tl.where(bits < 0x7F800000, power, scale))


@triton.jit
def noise_of(index, key_0, key_1):
    """U of the elements with these row-major numbers, as `lowbit.numerics.rounding.uniform_noise` makes it."""
    h = index.to(tl.uint32) * 0x9E3779B1 + key_0.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ key_1.to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return (h >> 8).to(tl.float32) * 0.000000059604644775390625  # 2**-24


@triton.jit
def round_nearest(t):
    """Whole numbers, halves to even, of ``|t| < 2**22``: adding 1.5 * 2**23 leaves no bit for the fraction."""
    return (t + 12582912.0) - 12582912.0


@triton.jit
def round_stochastic(t, u):
    """Up iff u is less than the fraction of t."""
    down = tl.floor(t)
    return down + tl.ceil((t - down) - u)


@triton.jit
def codes_of(x, scale, zero, low, high, index, key_0, key_1, noisy: tl.constexpr):
    """``q = clamp(round(x / S) + z, low, high)``; 0 where ``x / S`` is nan."""
    t = tl.div_rn(x, scale)
    t = tl.minimum(tl.maximum(t, -1048576.0), 1048576.0)  # far beyond every code, and within what can be rounded
    if noisy:
        q = round_stochastic(t, noise_of(index, key_0, key_1))
    else:
        q = round_nearest(t)
    q = tl.minimum(tl.maximum(q + zero, low), high)
    bad = tl.div_rn(x, scale) != tl.div_rn(x, scale)
    return tl.where(bad, 0.0, q)


@triton.jit
def in_type(y, dtype: tl.constexpr):
    """float32 as it is, or as the nearest bfloat16, halves to even, whatever a cast rounds to; nan stays nan."""
    if dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        even = tl.where(y != y, 0x7FC00000, bits + (0x7FFF + ((bits >> 16) & 1)))
        found = (even >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = y
    return found
