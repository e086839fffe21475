"""Every purpose has a seed of its own, so that tasks do not share random numbers."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str) -> int:
    """The seed of 32 bits for one purpose, derived from the seed of the run."""
    digest = hashlib.sha256("/".join([str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:4], "big")
