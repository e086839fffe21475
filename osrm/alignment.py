"""Fit a task's head to the features that a merged model gives it, without labels.

What Representation Surgery (Yang et al., 2024, arXiv 2402.02705) learns by gradients as a module
after the body is here a least-squares problem, and its solution becomes part of the head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def head_change(
    V: Float[Tensor, "out in"],
    own: Float[Tensor, "n in"],
    merged: Float[Tensor, "n in"],
    bias: bool = True,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """(ΔV, Δc): what makes a layer V x + c give on features x̂ what it gave on the task's own x.

    argmin Σ_i ‖(V + ΔV) x̂_i + Δc - V x_i‖² + τ ‖ΔV‖², with Δc = 0 if the layer has no `bias`. The
    examples i are the same in `own` and `merged`. τ is the mean of ‖x̂_i - mean‖², so n examples
    weigh against as many pseudo-examples of no change as there are features.
    """
    change = (own - merged) @ V.T
    middle = [x.mean(0) if bias else x.new_zeros(x.shape[1]) for x in (merged, change)]
    X, Y = merged - middle[0], change - middle[1]
    gram = X.T @ X
    gram.diagonal().add_(float(gram.trace()) / len(X) or 1.0)
    delta = torch.cholesky_solve(X.T @ Y, torch.linalg.cholesky(gram)).T
    return delta, middle[1] - delta @ middle[0]
