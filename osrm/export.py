"""Merged models in the formats of others: PEFT adapters, and whole transformers checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor

from osrm.adapters import WEIGHTS
from osrm.backbones import find_backbone, load_tokenizer
from osrm.errors import UserError
from osrm.merged import MergedUpdate, load_merged
from osrm.merging import row
from osrm.merging._factors import product_svd
from osrm.task_vectors import LoraPair

_PREFIX = "base_model.model."


def export_adapter(
    merged: MergedUpdate, directory: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write what one task receives as an ordinary PEFT LoRA adapter with the task's head.

    Each layer has the rank that its update has, or `rank` if that is less: then it is the nearest
    one of this rank (Eckart and Young). Factors are balanced, their scaling is 1.

    Returns:
        {"rank": the largest, "error": ‖lost‖ / ‖ΔW‖ over all layers, "errors": {layer: the same}}

    Raises:
        UserError: the update is dense, or differs between the tasks.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost, whole = {}, {}
    for module in merged:
        part = merged.part(module)
        if module.endswith(".bias"):
            tensors[_PREFIX + module.removesuffix("bias") + "lora_B.bias"] = row(part, 0).flatten()
            continue
        if not isinstance(part, LoraPair):
            raise UserError(
                f"{merged.directory}: {merged.recipe['method']} gives no update of low rank, so no"
                " adapter holds it; use --export model"
            )
        U, values, Vh = product_svd(part.scaling * part.B.double(), part.A.double())
        ranks[module] = max(1, min(len(values), rank or len(values)))
        whole[module] = float(values.square().sum())
        lost[module] = float(values[ranks[module] :].square().sum())
        root = values[: ranks[module]].sqrt()
        A = part.A.new_zeros(ranks[module], part.A.shape[1])
        B = part.B.new_zeros(len(part.B), ranks[module])
        kept = len(root)  # none of a zero update, for which PEFT needs a rank of 1 all the same
        A[:kept], B[:, :kept] = root[:, None] * Vh[:kept], U[:, :kept] * root
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": A, f"{_PREFIX}{module}.lora_B.weight": B}
    biased = any(name.endswith(".bias") for name in tensors)
    for module in ranks if biased else ():
        zero = tensors[f"{_PREFIX}{module}.lora_B.weight"][:, 0] * 0
        tensors.setdefault(f"{_PREFIX}{module}.lora_B.bias", zero)
    head = merged.head
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if head else None,
        base_model_name_or_path=merged.recipe["base"],
        r=largest,
        lora_alpha=largest,
        rank_pattern={name: each for name, each in ranks.items() if each != largest},
        alpha_pattern={name: each for name, each in ranks.items() if each != largest},
        target_modules=list(ranks),
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        lora_bias=biased,
        inference_mode=True,
    )
    directory.mkdir(parents=True)
    save_file(
        {**tensors, **{_PREFIX + name: each for name, each in head.items()}}, directory / WEIGHTS
    )
    config.save_pretrained(str(directory))
    total = sum(whole.values())
    return {
        "rank": largest,
        "error": (sum(lost.values()) / total) ** 0.5 if total else 0.0,
        "errors": {
            name: (lost[name] / whole[name]) ** 0.5 if whole[name] else 0.0 for name in lost
        },
    }


def export_model(merged: MergedUpdate, directory: Path) -> None:
    """Write the whole model of one task with its tokenizer, in shards, for `from_pretrained`."""
    load_merged(merged.directory, merged.task).save_pretrained(directory)
    load_tokenizer(find_backbone(merged.recipe["backbone"])).save_pretrained(directory)
