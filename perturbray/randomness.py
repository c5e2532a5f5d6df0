"""Random generators by seed and purpose, so that two uses of one seed never share a stream."""

import hashlib

import numpy as np


def derive(seed: int, *scope: str | int) -> int:
    """A 63-bit seed from a seed and the purpose it serves; equal on every machine and under every PYTHONHASHSEED."""
    text = "\x1f".join([str(int(seed)), *map(str, scope)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *scope: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, e.g. ``generator(3, "controls", epoch)``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *scope)))
