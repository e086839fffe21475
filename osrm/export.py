"""Merged models in the formats of others: PEFT adapters, and whole transformers checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from osrm.adapters import Adapter, write_adapter
from osrm.backbones import find_backbone, load_tokenizer
from osrm.checkpoints import DENSE, INDEX, base_tensor_files, read_tensor
from osrm.errors import UserError
from osrm.files import write_json
from osrm.lending import load_head
from osrm.merged import MergedUpdate, load_merged
from osrm.merging import row
from osrm.merging._factors import product_svd
from osrm.task_vectors import LoraPair, Update

EXTRAS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
"""What a base may have beside its weights, config and tokenizer."""
SHARD = 2**30  # bytes of an exported model's file at most, but for a larger single tensor


def export_adapters(
    tasks: Sequence[MergedUpdate], directory: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write what tasks of one merge receive as PEFT LoRA adapters, <directory>/<task>.

    All share one update, and each has its task's head. A layer has the rank of its update, or the
    nearest update of `rank`, if that is less (Eckart and Young). Returns {"rank": the largest,
    "error": ‖lost‖ / ‖ΔW‖ over all layers, "errors": {layer: the same}}. Raises UserError, before
    it writes, if the update is dense or not shared.
    """
    updates: dict[str, Update] = {}
    ranks, lost, whole = {}, {}, {}
    for module in tasks[0]:
        part = tasks[0].part(module)
        if module.endswith(".bias"):
            updates[module] = row(part, 0)
            continue
        if not isinstance(part, LoraPair):
            problem = f"{tasks[0].recipe.method} gives no update of low rank"
            raise UserError(f"{problem}, so no adapter holds it; use --export model")
        pair, values = _truncated(part, rank)
        updates[module], ranks[module] = pair, len(pair.A)
        whole[module] = float(values.square().sum())
        lost[module] = float(values[len(pair.A) :].square().sum())
    for update in tasks:
        recipe = update.recipe
        saved = tuple(recipe.tasks[update.task].saved)
        adapter = Adapter(updates, update.head, saved, recipe.base, recipe.kind)
        write_adapter(directory / update.task, adapter)
    return {
        "rank": max(ranks.values()),
        # Of a zero update nothing is lost.
        "error": (sum(lost.values()) / (sum(whole.values()) or 1.0)) ** 0.5,
        "errors": {module: (lost[module] / (whole[module] or 1.0)) ** 0.5 for module in lost},
    }


def _truncated(pair: LoraPair, rank: int | None) -> tuple[LoraPair, Tensor]:
    """The nearest pair of at most this rank, its factors balanced, and all singular values."""
    U, values, Vh = product_svd(*pair.factors(torch.float64))
    kept = min(len(values), rank or len(values))
    # PEFT wants a rank of at least 1, even of a zero update.
    A = pair.A.new_zeros(max(1, kept), pair.A.shape[1])
    B = pair.B.new_zeros(len(pair.B), len(A))
    root = values[:kept].sqrt()
    A[:kept], B[:, :kept] = root[:, None] * Vh[:kept], U[:, :kept] * root
    return LoraPair(A, B, 1.0), values


def export_model(merged: MergedUpdate, directory: Path) -> None:
    """Write one task's whole model, of the base's precision, for `from_pretrained`.

    The base's tokenizer and `EXTRAS` stand beside it, if it has them. One shard is in memory at a
    time, unless the base's safetensors files lack some of its tensors.
    """
    backbone, kind = find_backbone(merged.backbone), merged.recipe.kind
    model, new = kind.load(backbone, merged.labels, "auto", "meta")
    head = merged.head
    load_head(model, head, new)
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    # Tied tensors once, as `from_pretrained` wants them.
    wanted = {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}
    stored = base_tensor_files(model, backbone)
    modules = {name if name.endswith(".bias") else f"{name}.weight": name for name in merged}

    def read(name: str) -> Tensor:
        dtype = wanted[name].dtype
        if name in head:
            return head[name].to(dtype)
        weight = read_tensor(*stored[name]).to(dtype)
        if name in modules:
            layer = modules[name]
            delta = merged[layer]
            if name.endswith("weight") and isinstance(model.get_submodule(layer), Conv1D):
                delta = delta.T
            weight = (weight + delta.reshape(weight.shape)).to(dtype)
        return weight

    if wanted.keys() - head.keys() <= stored.keys() and modules.keys() <= wanted.keys():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        _write_shards(directory, {k: tensor.nbytes for k, tensor in wanted.items()}, read)
    else:
        logger = logging.getLogger(__name__)
        logger.info("%s: no safetensors of the whole model; it is loaded at once", backbone.path)
        load_merged(merged.directory, merged.task, dtype="auto").save_pretrained(directory)
    try:
        load_tokenizer(backbone).save_pretrained(directory)
    except UserError:
        if kind.classifies_text:
            raise
    for name in EXTRAS:
        with suppress(OSError):
            shutil.copy(cached_file(backbone.path, name), directory)


def _write_shards(directory: Path, sizes: dict[str, int], read: Callable[[str], Tensor]) -> None:
    """Write tensors of these bytes, each read once, into files of `SHARD` bytes and an index."""
    pattern = DENSE.replace(".", "{suffix}.")
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, directory / file, {"format": "pt"})
    if split.is_sharded:
        files = split.tensor_to_filename
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": files})
