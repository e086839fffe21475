"""The models: where their weights come from and what their projections are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from osrm import embedded
from osrm.config import MINI_GLUE
from osrm.errors import UserError, first_line


@dataclass(frozen=True)
class Backbone:
    """What a name on the command line means: a hub id, a local path, or a function."""

    name: str
    source: str | Callable[[], Path]
    data_dir: str | None = None

    @property
    def path(self) -> str:
        """What `from_pretrained` takes; an embedded model is built at its first use."""
        return self.source if isinstance(self.source, str) else str(self.source())


BACKBONES = (
    Backbone("roberta-large", "FacebookAI/roberta-large"),
    Backbone("t5-large", "google-t5/t5-large"),
    Backbone("llama3.2-1b", "meta-llama/Llama-3.2-1B"),
    Backbone("llama3.2-3b", "meta-llama/Llama-3.2-3B"),
    Backbone("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
    Backbone("minilm", embedded.minilm, data_dir=MINI_GLUE),
    Backbone("mpnet", embedded.mpnet, data_dir=MINI_GLUE),
    Backbone("smollm2", embedded.smollm2, data_dir=MINI_GLUE),
)

# What model families call their query, key and value projections.
PROJECTIONS = (
    {"q": "query", "k": "key", "v": "value"},  # BERT, RoBERTa
    {"q": "q_proj", "k": "k_proj", "v": "v_proj"},  # Llama and its family
    {"q": "q_lin", "k": "k_lin", "v": "v_lin"},  # DistilBERT
    {"q": "q", "k": "k", "v": "v"},  # T5, MPNet
)


def find_backbone(name: str) -> Backbone:
    """The row of that name; any other name is a local path or a hub id."""
    return next((row for row in BACKBONES if row.name == name), Backbone(name, name))


TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModel",
}
"""PEFT's task types, and the classes of transformers that PEFT loads for them."""
ENDINGS = {
    "CAUSAL_LM": "LMHeadModel",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}
"""Other endings of the names of such classes."""


@dataclass(frozen=True)
class Kind:
    """What a model is for, as PEFT's adapter_config.json says it."""

    task_type: str | None = None
    model_class: str | None = None
    """The class, where no task type says it."""
    library: str | None = None
    """The module of this class."""

    @classmethod
    def of(cls, architecture: str) -> Kind:
        """The kind of a whole model of this class of transformers."""
        for task_type, auto in TASK_CLASSES.items():
            endings = auto.removeprefix("AutoModel"), ENDINGS.get(task_type or "")
            if any(ending and architecture.endswith(ending) for ending in endings):
                return cls(task_type)
        return cls(None, architecture, "transformers")

    def __str__(self) -> str:
        return self.task_type or self.model_class or "without a task_type"

    @property
    def class_name(self) -> str:
        """The class of transformers that loads such a model."""
        return self.model_class or TASK_CLASSES[self.task_type]

    @property
    def classifies_text(self) -> bool:
        """Whether it is what train_glue.py trains, and merge.py scores."""
        return self.class_name.endswith("ForSequenceClassification")

    @property
    def models_language(self) -> bool:
        """Whether it predicts the next token, so that texts have a loss."""
        return self.class_name.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def has_classes(self) -> bool:
        """Whether the head has an output for each class."""
        return "Classification" in self.class_name

    def load(
        self,
        backbone: Backbone,
        labels: tuple[str, ...],
        dtype: torch.dtype | str,
        device: str | None = None,
    ) -> tuple[Any, set[str]]:
        """The base model as this kind, and the tensors that are new because the base lacks them.

        `labels` are the classes, if the kind has some.
        """
        if self.classifies_text:
            model = load_model(backbone, labels, load_tokenizer(backbone), dtype, device=device)
            return model, head_tensors(model)
        cls: Any = getattr(transformers, self.class_name, None)
        if not hasattr(cls, "from_pretrained"):
            raise UserError(f"the adapters are of a {self}, which transformers does not have")
        options: dict[str, Any] = {"dtype": dtype, "device_map": device}
        if labels:
            options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
        model, info = _from_hub(cls.from_pretrained, backbone, output_loading_info=True, **options)
        new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        return model.eval(), new


CLASSIFIER = Kind("SEQ_CLS")
"""Text classification: the kind of all that train_glue.py makes."""
LANGUAGE = Kind("CAUSAL_LM")
"""Language models: what --eval-text scores."""


def load_tokenizer(backbone: Backbone) -> Any:
    """The tokenizer: left truncation, right padding; without a padding token its end token."""
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
    *,
    device: str | None = None,
) -> Any:
    """The pre-trained model with a new head, drawn from torch's global generator.

    A head that the base has makes no difference. No labels mean a regression. The device "meta"
    gives names, shapes and precisions without the weights.
    """
    config = _from_hub(AutoConfig.from_pretrained, backbone)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.num_labels = len(labels) or 1
    config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    random = torch.get_rng_state()
    model, info = _from_hub(
        AutoModelForSequenceClassification.from_pretrained,
        backbone,
        config=config,
        dtype=dtype,
        device_map=device,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    state, head = model.state_dict(), head_tensors(model)
    if other := sorted({name for name, *_ in info["mismatched_keys"]} - head):
        where = f"--backbone {backbone.name}: {backbone.path}"
        raise UserError(f"{where}: config.json gives {other[0]} another shape; get the model again")
    if head <= info["missing_keys"] or device == "meta":
        return model
    # The base has a head: load again, from the random state of before, as if it had none.
    torch.set_rng_state(random)
    body = {name: state[name] for name in state.keys() - head - info["missing_keys"]}
    model = type(model).from_pretrained(None, config=model.config, state_dict=body, dtype=dtype)
    model.name_or_path = model.config.name_or_path = backbone.path
    return model


def _from_hub(load: Callable[..., Any], backbone: Backbone, **options: Any) -> Any:
    try:
        return load(backbone.path, **options)
    except (OSError, ValueError, KeyError) as error:
        where = f"{backbone.path} on this disk, in the cache or on the hub ({first_line(error)})"
        fix = "give the path of a model, or use the embedded one: --backbone minilm"
        raise UserError(f"--backbone {backbone.name}: no model {where}; {fix}") from None


def projections(model: nn.Module, block: str, rank: int) -> list[str]:
    """The names of the model's projections of `block`, e.g. of all queries and values for "qv".

    Raises UserError if the model has no separate ones, or is too narrow for `rank`.
    """
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    leaves = {name.rpartition(".")[2] for name in linear}
    naming = next((names for names in PROJECTIONS if leaves.issuperset(names.values())), None)
    if naming is None:
        problem = f"no separate q, k and v projections among its linear layers {sorted(leaves)}"
        fix = "use a RoBERTa, BERT, MPNet, DistilBERT, T5 or Llama-family model"
        raise UserError(f"--block {block}: {type(model).__name__} has {problem}; {fix}")
    chosen = {naming[letter] for letter in block}
    names = [name for name in linear if name.rpartition(".")[2] in chosen]
    for name in names:
        shape = tuple(linear[name].weight.shape)
        if min(shape) < rank:
            raise UserError(f"--rank {rank}: {name} is {shape}; choose {min(shape)} at most")
    return names


def head_names(model: Any) -> list[str]:
    """The modules on top of the pre-trained body that hold weights: what each task keeps."""
    parts = {name: part for name, part in model.named_children() if [*part.parameters()]}
    return [name for name in parts if name != model.base_model_prefix]


def head_tensors(model: Any) -> set[str]:
    """The names of the tensors in `head_names`."""
    tops = tuple(f"{name}." for name in head_names(model))
    return {name for name in model.state_dict() if name.startswith(tops)}


def body_fingerprint(model: Any) -> str:
    """A hash of the pre-trained body's parameters, not of the head's."""
    return fingerprint_tensors(dict(model.base_model.named_parameters(remove_duplicate=False)))


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, shapes, precisions, and a sample of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
