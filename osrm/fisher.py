"""The diagonal of a task's Fisher information, as MergeLM estimates it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from osrm.adapters import linear_weight


def fisher_information(
    model: Any, modules: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Float[Tensor, "out in"]]:
    """E[(∂ℓ/∂W)²] of each layer's weight W, ℓ = Σ_class √p log p with √p held fixed, float32.

    ℓ is weighted by √p because the gradient is squared: but for products of different classes that
    is the expectation over the model's own predictions (Matena and Raffel, 2022). Those products
    matter: an example of two equally likely classes counts for nothing here, and most in the
    expectation. The published numbers were made so. Of a regression ℓ is the squared error. What
    needed a gradient before needs one afterwards.

    Args:
        batches: the model's arguments with `labels`, one example each: the squares of a larger
            batch's gradients would be those of their sum.
    """
    weights = [linear_weight(model, name) for name in modules]
    needed = {each: each.requires_grad for each in model.parameters()}
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count, training = 0, model.training
    model.eval()
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            inputs = {name: each.to(model.device) for name, each in batch.items()}
            labels = inputs.pop("labels")
            with torch.enable_grad():
                logits = model(**inputs).logits.float()
                if logits.shape[1] == 1:
                    loss = (logits.flatten() - labels.float()).square().sum()
                else:
                    log_p = logits.log_softmax(1)
                    loss = ((log_p.detach() / 2).exp() * log_p).sum()
                gradients = torch.autograd.grad(loss, weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.float().square()
            count += 1
    finally:
        model.train(training)
        for parameter, flag in needed.items():
            parameter.requires_grad_(flag)
    return {name: (total / max(count, 1)).cpu() for name, total in zip(modules, sums, strict=True)}
