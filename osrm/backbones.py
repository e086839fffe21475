"""The models: where their weights come from and what their projections are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from osrm import embedded
from osrm.config import MINI_GLUE
from osrm.errors import UserError


@dataclass(frozen=True)
class Backbone:
    """A name on the command line: a hub id or local path, or a function that builds one."""

    name: str
    source: str | Callable[[], Path]
    data_dir: str | None = None

    @property
    def path(self) -> str:
        """What `from_pretrained` takes; fetches and builds an embedded model at its first use."""
        return self.source if isinstance(self.source, str) else str(self.source())


BACKBONES = {
    row.name: row
    for row in (
        Backbone("roberta-large", "FacebookAI/roberta-large"),
        Backbone("t5-large", "google-t5/t5-large"),
        Backbone("llama3.2-1b", "meta-llama/Llama-3.2-1B"),
        Backbone("llama3.2-3b", "meta-llama/Llama-3.2-3B"),
        Backbone("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
        Backbone("minilm", embedded.minilm, data_dir=MINI_GLUE),
    )
}

# What model families call their query, key and value projections.
PROJECTIONS = (
    {"q": "query", "k": "key", "v": "value"},  # BERT, RoBERTa
    {"q": "q_proj", "k": "k_proj", "v": "v_proj"},  # Llama and its family
    {"q": "q_lin", "k": "k_lin", "v": "v_lin"},  # DistilBERT
    {"q": "q", "k": "k", "v": "v"},  # T5, MPNet
)


def find_backbone(name: str) -> Backbone:
    """The row of that name; any other name is a local path or a hub id."""
    return BACKBONES.get(name) or Backbone(name, name)


def load_tokenizer(backbone: Backbone) -> Any:
    """The backbone's tokenizer: left truncation, right padding.

    A tokenizer keeps its own padding token; only one without gets its end token for it (Llama).
    """
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, backbone)
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    backbone: Backbone,
    labels: tuple[str, ...],
    tokenizer: Any,
    dtype: torch.dtype | str,
    device: str | None = None,
) -> Any:
    """The pre-trained model with a new head, drawn from torch's global generator.

    Args:
        labels: the classes; none of them means a regression.
        device: "meta" for names, shapes and precisions without the weights.
    """
    config = _from_hub(AutoConfig.from_pretrained, backbone)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.num_labels = len(labels) or 1
    config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    load = AutoModelForSequenceClassification.from_pretrained
    return _from_hub(load, backbone, config=config, dtype=dtype, device_map=device)


def _from_hub(load: Callable[..., Any], backbone: Backbone, **options: Any) -> Any:
    try:
        return load(backbone.path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--backbone {backbone.name}: {backbone.path} is no local model, not cached here and"
            f" not to be had from the hub ({reason}); give the path of a model, or use the"
            " embedded one: --backbone minilm"
        ) from None


def projections(model: nn.Module, block: str, rank: int) -> list[str]:
    """The names of the model's projections of `block`, e.g. of all queries and values for "qv".

    Raises:
        UserError: a model without separate q, k and v projections, or one too narrow for `rank`.
    """
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    leaves = {name.rpartition(".")[2] for name in linear}
    naming = next((names for names in PROJECTIONS if leaves.issuperset(names.values())), None)
    if naming is None:
        raise UserError(
            f"--block {block}: {type(model).__name__} has no separate q, k and v projections among"
            f" its linear layers {sorted(leaves)}; use a RoBERTa, BERT, MPNet, DistilBERT, T5 or"
            " Llama-family model"
        )
    chosen = {naming[letter] for letter in block}
    found = [name for name in linear if name.rpartition(".")[2] in chosen]
    for name in found:
        if min(linear[name].weight.shape) < rank:
            raise UserError(
                f"--rank {rank}: the layer {name} is {tuple(linear[name].weight.shape)}; the rank"
                f" can be {min(linear[name].weight.shape)} at most"
            )
    return found


def head_names(model: Any) -> list[str]:
    """The modules on top of the pre-trained body that hold weights: what each task keeps."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def body_fingerprint(model: Any) -> str:
    """A hash of the pre-trained body's parameters, not of the head's."""
    return fingerprint_tensors(dict(model.base_model.named_parameters(remove_duplicate=False)))


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, shapes, precisions, and a sample of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
