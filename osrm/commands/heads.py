"""--align-heads: each task's head is fitted to its features in each merged model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from osrm.alignment import head_change
from osrm.backbones import head_names
from osrm.commands.merger import Merger
from osrm.evaluation import class_logits, predict
from osrm.lending import applied
from osrm.merged import MergedUpdate, head_file
from osrm.session import Session
from osrm.task_vectors import deltas

logger = logging.getLogger(__name__)


def align_heads(session: Session, merger: Merger, count: int) -> None:
    """Fit the first layer of every head by `count` training texts, and save it with the merges.

    See `head_change`. The later layers of a head then get what they were trained with.
    """
    for name in merger.inputs.checkpoints:
        _align(session, merger, name, count)


def _align(session: Session, merger: Merger, name: str, count: int) -> None:
    task, checkpoint = session.tasks[name], merger.inputs.checkpoints[name]
    model, memory = session.model(task, checkpoint.head), dict[str, Tensor]()
    layer = first_layer(model)
    encoded = session.encoded(task, session.data[name].train.head(count))

    def features(update: Mapping[str, Tensor], whose: str) -> Tensor:
        with applied(model, update, memory):
            inputs, _ = predict(
                model,
                encoded,
                session.tokenizer,
                session.batch_size,
                title=f"{name}: features, {whose}",
                outputs=lambda model, batch: head_inputs(model, layer, batch),
            )
        return torch.from_numpy(inputs).to(session.device, torch.float64)

    own = features(deltas(checkpoint.updates, session.device), "own")
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    V = checkpoint.head[weight].to(own)
    for method in merger.methods:
        merged = MergedUpdate(merger.directory / method, name, device=session.device)
        change = head_change(V, own, features(merged, method), bias in checkpoint.head)
        head = dict(checkpoint.head)
        for tensor, delta in zip((weight, bias), change):
            if tensor in head:
                head[tensor] = (head[tensor].double() + delta.cpu()).float()
        save_file(head, head_file(merged.directory, name))
    logger.info("%s: its head fits each merge, by %d texts", name, len(encoded))


def first_layer(model: Any) -> str:
    """The linear layer that reads the body's features: the first of the head."""
    tops = head_names(model)
    return next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in tops
    )


def head_inputs(model: Any, layer: str, batch: dict[str, Tensor]) -> Tensor:
    """What enters a layer of the head in a forward pass, (n, in).

    A head that reads all tokens classifies the last one of each example.
    """
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        class_logits(model, batch)
    finally:
        hook.remove()
    (x,) = seen
    if x.ndim == 3:
        mask = batch["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        x = x[torch.arange(len(x), device=x.device), last]
    return x.float()
