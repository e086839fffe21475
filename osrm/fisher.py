"""The diagonal of a task's Fisher information, as MergeLM estimates it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from osrm.features import evaluating
from osrm.lending import linear_weight


def fisher_information(
    model: Any, modules: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Float[Tensor, "out in"]]:
    """E[(∂ℓ/∂W)²] of each layer's weight W, ℓ = Σ_class √p log p with √p held fixed, float32.

    The square of this gradient has a term for each pair of classes. The terms of equal classes add
    up to the expectation over the model's predictions (Matena and Raffel, 2022). Those of
    different classes are an error of the formula: they cancel an example whose two classes are
    equally likely, which counts most in the expectation. We keep it, since the published numbers
    have it. For a regression ℓ is the squared error.

    A batch has one example and its `labels`: of more, the summed gradients would be squared.
    """
    weights = [linear_weight(model, name) for name in modules]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count = 0
    with evaluating(model):
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            inputs = dict(send_to_device(batch, model.device, non_blocking=True))
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
    return {name: (total / max(count, 1)).cpu() for name, total in zip(modules, sums, strict=True)}
