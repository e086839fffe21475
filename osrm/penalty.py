"""A penalty that keeps an update away from the other tasks' features while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from osrm.lending import linear_weight
from osrm.moments import Moment, own_and_others

# Added to each layer's own shift, which is zero before the first step: outputs shifted by 1 %.
_FLOOR = 1e-4


class ShiftPenalty:
    """X · Σ_l s_l(others) / Σ_l s_l(own), where s_l = E‖ΔW_l h‖² / E‖W_l h‖² of layer l.

    OSRM's objective, little A h of the other tasks, asked of the whole update in each step instead
    of the start alone. Own features divide it, so it does not ask for a small update. A step costs
    order rank · d² a layer, and each layer input keeps 2 d² float32 on the device.
    """

    def __init__(
        self,
        weight: float,
        model: Any,
        features: Mapping[str, Mapping[str, Moment]],
        leaders: Mapping[str, str],
        *,
        task: str,
        others: Iterable[str],
    ) -> None:
        """`model` is the PeftModel of `task`, `features` {task: {module: moment of its inputs}}.

        Args:
            weight: X.
            leaders: {module: the first module that reads the same input}.
            others: the tasks whose features count; a task never avoids itself.
        """
        base, others = model.get_base_model(), [*others]
        self.weight, self.layers = weight, []
        moments: dict[str, Tensor] = {}  # {leader: of the others and own (2, d, d)}
        for name, layer in base.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            W = linear_weight(base, f"{name}.base_layer").float()
            if (first := leaders[name]) not in moments:
                inputs = {each: file[first] for each, file in features.items()}
                ((_, own, other),) = own_and_others(inputs, [task], others)
                assert own is not None and other is not None  # a plan without them is refused
                sides = [side.gram / side.count for side in (other, own)]
                moments[first] = torch.stack(sides).to(W)
            S = moments[first]
            self.layers.append((layer, S, ((W @ S) * W).sum((1, 2))))

    def __call__(self) -> Tensor:
        """The penalty of the present factors."""
        shifts: Any = 0
        for layer, S, outputs in self.layers:
            A, B = (getattr(layer, f"lora_{x}")["default"].weight.float() for x in "AB")
            with torch.autocast(A.device.type, enabled=False):
                squared = ((A @ S @ A.T) * (B.T @ B)).sum((1, 2))  # tr(B A S Aᵀ Bᵀ)
            shifts = shifts + layer.scaling["default"] ** 2 * squared / outputs
        others, own = shifts
        return self.weight * others / (own + _FLOOR * len(self.layers))
