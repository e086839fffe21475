"""Peak memory of a process, and the versions that a run used."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of Python and installed packages, and this code's git commit (None outside git)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    python, commit = platform.python_version(), git.stdout.strip() or None
    versions = {name: each.version for name in PACKAGES for each in [*distributions(name=name)][:1]}
    return {"python": python, **versions, "git_commit": commit}


def reset_peak_memory() -> None:
    """Start the measurement of the peaks anew; resident memory allows it on Linux only."""
    switch = Path("/proc/self/clear_refs")
    if os.access(switch, os.W_OK):
        switch.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str = "cpu") -> float:
    """Peak memory of this process in GiB: on the GPU ("cuda"), or resident in main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
