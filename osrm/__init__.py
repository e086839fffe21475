"""OSRM: train LoRA adapters that survive merging, and merge them.

Merging task 2's update B2 A2 into a model shifts the outputs of task 1 by B2 A2 h1. OSRM starts
A where the other tasks' features have no energy,

    A_i = argmin ||A Hᵀ||_F  subject to  A Aᵀ = I,   B_i = 0,

so that A h ≈ 0 for their features h (the rows of H) before a single step is taken.
docs/architecture.md has the map of the modules.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "collect_osrm_features": "osrm.plugin",
    "get_osrm_state_dict": "osrm.plugin",
    "initialize_lora_osrm_weights": "osrm.plugin",
    "load_adapters": "osrm.checkpoints",
    "load_merged": "osrm.merged",
    "merge": "osrm.merging",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    # Late, so that `train_glue.py --help` need not wait for torch and transformers.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'osrm' has no attribute '{name}'")
