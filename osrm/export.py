"""Merged models in the formats of others: PEFT adapters, and whole transformers checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from osrm.adapters import write_adapter
from osrm.backbones import find_backbone, load_tokenizer
from osrm.errors import UserError
from osrm.merged import MergedUpdate, load_merged
from osrm.merging import row
from osrm.merging._factors import product_svd
from osrm.task_vectors import LoraPair


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

    It has the base's precision, and is in memory once.
    """
    load_merged(merged.directory, merged.task, dtype="auto").save_pretrained(directory)
    load_tokenizer(find_backbone(merged.recipe["backbone"])).save_pretrained(directory)
