"""OSRM: train LoRA adapters that survive merging, and merge them.

Merging task 2's update B2 A2 into a model shifts the outputs of task 1 by B2 A2 h1. OSRM starts
A where the other tasks' features have no energy,

    A_i = argmin ||A Hᵀ||_F  subject to  A Aᵀ = I,   B_i = 0,

so that A h ≈ 0 for their features h (the rows of H) before a single step is taken.

    covariance, subspace, merging    the numbers; torch alone
    task_vectors                     updates as values
    glue, backbones, embedded        tasks, models, and what comes along for both
    features, adapters, training, evaluation
    config, runs, checkpoints, merged, report, commands
"""

from typing import Any

__all__ = ["load_merged", "merge"]


def __getattr__(name: str) -> Any:
    # Late, so that `train_glue.py --help` need not wait for torch and transformers.
    if name == "load_merged":
        from osrm.merged import load_merged

        return load_merged
    if name == "merge":
        from osrm.merging import merge

        return merge
    raise AttributeError(f"module 'osrm' has no attribute '{name}'")
