"""Random numbers as a function of (key, index), for compiled loops: no state, so no order of execution can change what
is drawn.

`mix64` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators");
element i of the stream with key k is mix64(k + i * golden), which is that generator's own sequence read at position i.
"""

from __future__ import annotations

import numpy as np

from gnn.core.compiled import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S11 = (np.uint64(s) for s in (27, 30, 31, 32, 11))
_LOW = np.uint64(0xFFFFFFFF)


@compiled(nogil=True, inline="always")
def mix64(z: int) -> int:
    """A bijection of uint64 whose output looks random."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@compiled(nogil=True, inline="always")
def below(z: int, n: int) -> int:
    """The upper 32 bits of uint64 z as an int64 in 0 .. n - 1 (Lemire 2019; the bias is n / 2^32)."""
    return np.int64(((z >> _S32) * np.uint64(n)) >> _S32)


@compiled(nogil=True, inline="always")
def low_unit(z: int) -> float:
    """The lower 32 bits of uint64 z as a float in [0, 1)."""
    return (z & _LOW) * 2.0**-32


@compiled(nogil=True, inline="always")
def unit(z: int) -> float:
    """The upper 53 bits of uint64 z as a float64 in [0, 1)."""
    return (z >> _S11) * 2.0**-53


def make_key(*parts: int) -> np.uint64:
    """One uint64 key for a tuple of integers, such as (seed, step, layer): every part and its position count."""
    mask = 2**64 - 1
    key = 0
    for part in parts:
        key = _mix_python(((key * 0x9E3779B97F4A7C15) + (part & mask) + 0x632BE59BD9B4E019) & mask)
    return np.uint64(key)


def _mix_python(z: int) -> int:
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
