"""Give a model an update and a head: W0 + ΔW inside `with`, the model's own weights after it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from osrm.backbones import head_tensors


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
            parameter, delta = _linear_parameter(model, name), update[name]
            own = parameter.data
            matrix = own.view(len(own), -1)
            if matrix.shape != delta.shape:
                raise ValueError(f"{name}: update {tuple(delta.shape)} on {tuple(own.shape)}")
            if name not in memory:
                memory[name] = torch.empty_like(own)
            # Added as float32, whatever the weights are, and rounded once.
            delta = delta.to(own.device, torch.float32)
            torch.add(matrix, delta, out=memory[name].view(matrix.shape))
            stack.callback(setattr, parameter, "data", own)
            parameter.data = memory[name]
        yield


def linear_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of the linear layer `name`, or, for "X.bias", the bias of X as a column (out, 1).

    It is the model's own memory, not a copy. Raises ValueError if the model lacks it.
    """
    parameter = _linear_parameter(model, name)
    return parameter if parameter.ndim == 2 else parameter[:, None]


def _linear_parameter(model: nn.Module, name: str) -> Tensor:
    layer = name.removesuffix(".bias")
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer {layer}")
    parameter = module.weight if layer == name else module.bias
    if parameter is None:
        raise ValueError(f"the linear layer {layer} of {type(model).__name__} has no bias")
    return parameter


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
