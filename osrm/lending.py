"""Give a model an update and a head: W0 + ΔW inside `with`, the model's own weights after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from osrm.backbones import head_tensors
from osrm.errors import UserError

LINEAR = nn.Linear, Conv1D
"""The layers that may have an update. GPT-2's Conv1D holds its weight as (in, out)."""


@contextmanager
def applied(
    model: nn.Module, update: Mapping[str, Tensor], memory: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Add the update ΔW, (out, in), to the linear layers of a model without LoRA, inside `with`.

    An update named "X.bias", of shape (out, 1), is that of the bias of the layer X. On exit, even
    after an error, weights and biases are as before, bit for bit. `memory`, empty at first, is
    {name: where W0 + ΔW is written}. Keep it for the model's next update: to allocate it takes
    longer than all the rest. Raises ValueError if the model lacks a layer of this name and shape.
    """
    memory = {} if memory is None else memory
    with ExitStack() as stack:
        for name in update:
            (parameter, layout), delta = _linear_parameter(model, name), update[name]
            own = parameter.data
            matrix = layout(own)
            if matrix.shape != delta.shape:
                raise ValueError(f"{name}: update {tuple(delta.shape)} on {tuple(own.shape)}")
            if name not in memory:
                memory[name] = torch.empty_like(own)
            # Added as float32, whatever the weights are, and rounded once.
            delta = delta.to(own.device, torch.float32)
            torch.add(matrix, delta, out=layout(memory[name]))
            stack.callback(setattr, parameter, "data", own)
            parameter.data = memory[name]
        yield


def linear_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) of the layer `name`, or, for "X.bias", the bias of X as a column.

    It is the model's own memory, not a copy. Raises ValueError if the model lacks it.
    """
    parameter, layout = _linear_parameter(model, name)
    return layout(parameter)


def check_not_tied(model: nn.Module, names: Collection[str], where: Path) -> None:
    """Refuse, with a UserError, an update of a layer that shares its weight with an embedding."""
    modules = dict(model.named_modules())
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    for name in names:
        if id(getattr(modules.get(name), "weight", None)) in embeddings:
            raise UserError(
                f"{where}: {name} shares its weight with the base's embedding, and W0 + ΔW would"
                " change both; use adapters: --no-eval --export adapter"
            )


def _linear_parameter(model: nn.Module, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The parameter, and what views a tensor of its shape as (out, in)."""
    layer = name.removesuffix(".bias")
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, LINEAR):
        raise ValueError(f"{type(model).__name__} has no linear layer {layer}")
    parameter = module.weight if layer == name else module.bias
    if parameter is None:
        raise ValueError(f"the linear layer {layer} of {type(model).__name__} has no bias")
    if parameter.ndim == 1:
        return parameter, lambda bias: bias[:, None]
    return parameter, torch.t if isinstance(module, Conv1D) else lambda weight: weight


@torch.no_grad()
def load_head(model: Any, head: Mapping[str, Tensor], new: Collection[str] | None = None) -> None:
    """Put what was trained and saved beside the update on the model: its head, and other modules.

    `new` are the tensors that must be among it, since the base has none; by default all on top of
    the body. Raises ValueError if one lacks, or one does not fit.
    """
    own, needed = model.state_dict(), head_tensors(model) if new is None else {*new}
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    wanted = {name: tuple(own[name].shape) for name in own if name in needed | head.keys()}
    if wanted != shapes:
        raise ValueError(f"the head has {shapes}, the model wants {wanted}")
    for name, tensor in head.items():
        own[name].copy_(tensor)
