"""Merged models in the formats of others: PEFT adapters, and whole transformers checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, cached_file

from osrm.adapters import load_head, write_adapter
from osrm.backbones import find_backbone, load_model, load_tokenizer
from osrm.checkpoints import DENSE, INDEX, read_tensor, tensor_files
from osrm.errors import UserError
from osrm.merged import MergedUpdate, load_merged
from osrm.merging import Lazy, row
from osrm.merging._factors import product_svd
from osrm.runs import write_json
from osrm.task_vectors import LoraPair

logger = logging.getLogger(__name__)

SHARD = 2**30
"""The bytes of an exported model's file at most, but for a larger single tensor."""


def export_adapters(
    tasks: Sequence[MergedUpdate], directory: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write what tasks of one merge receive as ordinary PEFT LoRA adapters, <directory>/<task>.

    All share one update, and each has its task's head. A layer has the rank that its update has,
    or `rank` if that is less: then it is the nearest one of this rank (Eckart and Young).

    Returns:
        {"rank": the largest, "error": ‖lost‖ / ‖ΔW‖ over all layers, "errors": {layer: the same}}

    Raises:
        UserError: the update is dense, or differs between the tasks.
    """
    updates: dict[str, LoraPair | Tensor] = {}
    ranks, lost, whole = {}, {}, {}
    merged = tasks[0]
    for module in merged:
        part = merged.part(module)
        if module.endswith(".bias"):
            updates[module] = row(part, 0)
            continue
        if not isinstance(part, LoraPair):
            raise UserError(
                f"{merged.directory}: {merged.recipe['method']} gives no update of low rank, so no"
                " adapter holds it; use --export model"
            )
        pair, values = truncated(part, rank)
        updates[module], ranks[module] = pair, len(pair.A)
        whole[module] = float(values.square().sum())
        lost[module] = float(values[ranks[module] :].square().sum())
    for each in tasks:
        write_adapter(directory / each.task, updates, each.head, each.recipe["base"])
    return {
        "rank": max(ranks.values()),
        "error": _share(sum(lost.values()), sum(whole.values())),
        "errors": {module: _share(lost[module], whole[module]) for module in lost},
    }


def truncated(pair: LoraPair, rank: int | None) -> tuple[LoraPair, Tensor]:
    """The nearest pair of at most this rank, its factors balanced, and all singular values.

    Its rank is 1 at least, as PEFT wants it, even of a zero update.
    """
    U, values, Vh = product_svd(pair.scaling * pair.B.double(), pair.A.double())
    kept = min(len(values), rank or len(values))
    A = pair.A.new_zeros(max(1, kept), pair.A.shape[1])
    B = pair.B.new_zeros(len(pair.B), len(A))
    root = values[:kept].sqrt()
    A[:kept], B[:, :kept] = root[:, None] * Vh[:kept], U[:, :kept] * root
    return LoraPair(A, B, 1.0), values


def _share(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


def export_model(merged: MergedUpdate, directory: Path) -> None:
    """Write the whole model of one task with its tokenizer, in shards, for `from_pretrained`.

    It has the base's precision. One shard is in memory at a time; only a base whose safetensors
    files lack some of the model's tensors, or that has no such files, is loaded whole.
    """
    backbone = find_backbone(merged.recipe["backbone"])
    tokenizer = load_tokenizer(backbone)
    model = load_model(backbone, merged.labels, tokenizer, "auto", device="meta")
    head = merged.head
    load_head(model, head)
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    # Tied tensors once, as `from_pretrained` wants them.
    wanted = {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}
    stored = find_tensors(model, Path(cached_file(backbone.path, CONFIG_NAME)).parent)
    modules = {name if name.endswith(".bias") else f"{name}.weight": name for name in merged}

    def tensor(name: str) -> Tensor:
        dtype = wanted[name].dtype
        if name in head:
            return head[name].to(dtype)
        weight = read_tensor(*stored[name]).to(dtype)
        if name in modules:
            delta = merged[modules[name]]
            weight = (weight + (delta if weight.ndim == 2 else delta[:, 0])).to(dtype)
        return weight

    if wanted.keys() - head.keys() <= stored.keys() and modules.keys() <= wanted.keys():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        write_shards(directory, Lazy(wanted, tensor), {k: v.nbytes for k, v in wanted.items()})
    else:
        logger.info("%s: no safetensors of the whole model; it is loaded at once", backbone.path)
        load_merged(merged.directory, merged.task, dtype="auto").save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def find_tensors(model: Any, base: Path) -> dict[str, tuple[Path, str]]:
    """{tensor as the model calls it: (file, its name there)} of what is in the base's directory.

    A base's names may lack the prefix of the model's body, and call the weight and bias of a norm
    gamma and beta. Empty if it has no safetensors.
    """
    if not any((base / name).exists() for name in (DENSE, INDEX)):
        return {}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for stored, file in tensor_files(base).items():
        name = stored.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        found[prefix + name.removeprefix(prefix)] = file, stored
    return found


def write_shards(directory: Path, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Write tensors into model.safetensors, or, if larger than `SHARD`, several files and an index.

    Args:
        tensors: each is looked up once, when its file is written.
        sizes: their bytes.
    """
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[each] for each in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append(name)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else DENSE
        save_file({name: tensors[name] for name in shard}, directory / file, {"format": "pt"})
        files |= dict.fromkeys(shard, file)
    if shards[1:]:
        metadata = {"total_size": sum(sizes.values())}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": files})
