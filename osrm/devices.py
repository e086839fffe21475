"""The device that merges and scores."""

from __future__ import annotations

import torch

from osrm.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that --device names; "auto" is the GPU if there is one."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device cuda: torch sees no GPU; install torch for CUDA, or use auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
