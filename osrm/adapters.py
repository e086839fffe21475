"""PEFT's LoRA adapters, on a model and on disk: only here and in `plugin` PEFT's names occur."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from osrm import checks
from osrm.backbones import CLASSIFIER, TASK_CLASSES, Kind, head_names
from osrm.errors import UserError
from osrm.task_vectors import LoraPair, Update
from osrm.tensor_file import opened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ONLY_LORA = (
    "only plain LoRA on unchanged base weights can be merged; give the dense model"
    " (merge_and_unload) instead, or an adapter without this"
)
_ALPHA = checks.number(-3.4e38, 3.4e38)  # updates are float32
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A\.weight|B\.weight|B\.bias)")
_BASE_LAYER = re.compile(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)")
_FLOATS = ("float32", "float16", "bfloat16", "float64")


def add_lora(model: Any, modules: list[str], rank: int, alpha: int, *, freeze: str = "N") -> Any:
    """The `PeftModel` of `model`, whose head is trained and saved too, in float32 as LoRA is.

    All layers that share their last name with one of `modules` get LoRA. A starts as PEFT's
    gaussian, drawn from torch's global generator, and B at zero; `freeze` keeps "A" or "B" so.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
        modules_to_save=head_names(model),
        init_lora_weights="gaussian",
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad &= f".lora_{freeze}." not in name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


@torch.no_grad()
def write_factors(model: Any, A: dict[str, Tensor], B: dict[str, Tensor] | None = None) -> None:
    """Set A (rank, in), and B (out, rank) if given, of all layers of a PeftModel that have LoRA."""
    modules = model.get_base_model().named_modules()
    layers = {name: module for name, module in modules if hasattr(module, "lora_A")}
    if A.keys() != layers.keys():
        raise ValueError(f"A is for {sorted(A)}, LoRA on {sorted(layers)}")
    for name, layer in layers.items():
        layer.lora_A["default"].weight.copy_(A[name])
        if B is not None:
            layer.lora_B["default"].weight.copy_(B[name])


def write_head(model: Any, head: Mapping[str, Tensor]) -> None:
    """Put a trained head that fits on a PeftModel, where it is trained and saved from."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, {_PREFIX + name: head[name] for name in head})


def save_adapter(model: Any, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a PeftModel's LoRA and head; `state` has the tensors where `model` has only shards."""
    config = model.peft_config["default"]
    # A list in place of PEFT's set: its order, and so the file's bytes, would differ by process.
    config.target_modules = sorted(config.target_modules)
    # "auto" would ask the hub about the embeddings' size; LoRA does not touch them here.
    model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=state)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as values."""

    updates: Mapping[str, Update]
    """By layer. A layer X whose lora_B has a bias (PEFT's lora_bias) has a second update, that of
    its own bias: "X.bias", dense, float32, of shape (out, 1), scaling included."""
    head: Mapping[str, Tensor]
    """The tensors of the modules that were trained and saved whole."""
    saved: tuple[str, ...] = ()
    """The names of these modules: PEFT's modules_to_save."""
    base: str | None = None
    """The base model's name or path."""
    kind: Kind = CLASSIFIER
    base_tensors: Mapping[str, str] = field(default_factory=dict)
    """{tensor of the base model: its key in the file}: PEFT saves the layer, too, if it has LoRA
    and reads or writes tokens. It is not read: see `checkpoints.check_base_tensors`."""


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write what `read_adapter` reads: pairs of any ranks above 0, here with scaling 1."""
    from peft import LoraConfig

    biased = any(isinstance(update, Tensor) for update in adapter.updates.values())
    tensors, ranks = dict(adapter.head), {}
    for name, update in adapter.updates.items():
        if isinstance(update, Tensor):
            tensors[f"{name.removesuffix('.bias')}.lora_B.bias"] = update.flatten()
            continue
        assert isinstance(update, LoraPair)
        ranks[name] = len(update.A)
        A, B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[B], tensors[A] = update.factors(update.A.dtype)
        if biased:
            tensors.setdefault(f"{name}.lora_B.bias", torch.zeros(len(update.B)))
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type=adapter.kind.task_type,
        base_model_name_or_path=adapter.base,
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        lora_bias=biased,
        inference_mode=True,
        modules_to_save=list(adapter.saved) or None,
    )
    config.target_modules = sorted(ranks)  # as in `save_adapter`
    kind = adapter.kind
    if kind.model_class:
        mapping = {"base_model_class": kind.model_class, "parent_library": kind.library}
        config.auto_mapping = mapping
    config.save_pretrained(str(path))
    named = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, path / WEIGHTS)


def _patterns(check: checks.Check) -> checks.Check:
    def holds(value: Any) -> bool:
        try:
            # In brackets, as PEFT compiles them.
            return isinstance(value, dict) and all(
                re.compile(f".({pattern})") and check.holds(value[pattern]) for pattern in value
            )
        except (re.error, OverflowError, RecursionError):
            return False

    return checks.Check(f"{{pattern: {check.words}}}", holds)


# What `read_adapter` uses of adapter_config.json.
_OPTIONS = {
    "r": checks.whole(1),
    "lora_alpha": _ALPHA,
    "rank_pattern": checks.optional(_patterns(checks.whole(1))),
    "alpha_pattern": checks.optional(_patterns(_ALPHA)),
    "use_rslora": checks.optional(checks.flag),
    "lora_bias": checks.optional(checks.flag),
    "modules_to_save": checks.optional(checks.list_of(checks.nonempty)),
    "base_model_name_or_path": checks.optional(checks.text),
    "task_type": checks.one_of(*TASK_CLASSES),
    "auto_mapping": checks.optional(
        checks.Check(
            '{"base_model_class": name, ...}',
            lambda value: isinstance(value, dict) and {*map(type, value.values())} <= {str},
        )
    ),
}
# What must have one of these values.
_REQUIRED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# What changes nothing in scaling · B A.
_HARMLESS = {
    *("peft_version", "revision", "inference_mode", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("megatron_core", "fan_in_fan_out"),
}


def _read_config(path: Path) -> dict[str, Any]:
    """The options of `_OPTIONS`, not through PEFT: it asks the hub where the file is missing."""
    content = checks.read_object(path, "PEFT adapter", "{option: value}")
    known = _OPTIONS.keys() | _REQUIRED.keys() | _HARMLESS
    others = {name: value for name, value in content.items() if value and name not in known}
    wrong = [name for name, values in _REQUIRED.items() if content.get(name) not in values]
    extras = [f"{name}={reprlib.repr(content.get(name))}" for name in wrong]
    if others:
        import peft

        defaults = peft.LoraConfig().to_dict()
        for name, value in others.items():
            if name not in defaults:
                extras.append(f"{name}, which PEFT {peft.__version__} does not know")
            elif value != defaults[name]:
                extras.append(f"{name}={reprlib.repr(value)}")
    if extras:
        raise UserError(f"{path}: {', '.join(extras)}: {ONLY_LORA}")
    options = {name: content.get(name) for name in _OPTIONS}
    if wrong := checks.problems(options, _OPTIONS):
        raise UserError(f"{path}: {'; '.join(wrong)}; fix it, or save it again")
    return options


def read_adapter(directory: Path) -> Adapter:
    """Read a directory that PEFT saved.

    Raises UserError if this is no LoRA adapter, a damaged one, or one whose update is not
    scaling · B A.
    """
    config = _read_config(directory / CONFIG)
    file, saved = directory / WEIGHTS, config["modules_to_save"] or []
    factors: dict[str, dict[str, Tensor]] = {"A.weight": {}, "B.weight": {}, "B.bias": {}}
    head = {}
    tensors, base_tensors = _read_tensors(directory)
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(key):
            factors[match[2]][match[1]] = tensor
        elif name != key and any(f"{module}." in name for module in saved):
            head[name] = tensor.float()
        else:
            where = f"modules_to_save {sorted({*saved})}"
            raise UserError(f"{file}: '{key}' is neither of LoRA nor in {where}; {ONLY_LORA}")
    A, B, bias = factors.values()
    odd = sorted(A.keys() ^ B.keys())
    if odd or not A:
        found = f"only one of them: {odd[:3]}" if odd else "neither"
        raise UserError(f"{file}: a layer has lora_A and lora_B, found {found}; save it again")
    biased = config["lora_bias"]
    if bias.keys() != (A.keys() if biased else set()):
        found = f"lora_B has a bias in {len(bias)} of {len(A)} layers"
        raise UserError(f"{file}: {found}, but {CONFIG} says lora_bias {biased}; save it again")
    updates: dict[str, Update] = {}
    for name in A:
        rank = _of_layer(name, config["rank_pattern"], config["r"])
        alpha = _of_layer(name, config["alpha_pattern"], config["lora_alpha"])
        if problem := _misfit(rank, A[name], B[name], bias.get(name)):
            raise UserError(f"{file}: '{name}': {problem}; save it again")
        scaling = alpha / (rank**0.5 if config["use_rslora"] else rank)
        updates[name] = LoraPair(A[name], B[name], scaling)
        if name in bias:
            updates[f"{name}.bias"] = scaling * bias[name].float()[:, None]
    mapping = config["auto_mapping"] or {}
    names = (mapping.get(name) for name in ("base_model_class", "parent_library"))
    kind = Kind(config["task_type"], *names)
    base = config["base_model_name_or_path"] or None
    return Adapter(updates, head, tuple(saved), base, kind, base_tensors)


def _read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapter's tensors: of float types, not empty, finite in float32; its `base_tensors`."""
    path, pickled = directory / WEIGHTS, directory / "adapter_model.bin"
    if pickled.is_file() and not path.is_file():
        raise UserError(f"{pickled}: a pickle can run code; save the adapter as {WEIGHTS}")
    with opened(path) as file:
        matches = {key: _BASE_LAYER.fullmatch(key) for key in file.keys()}  # noqa: SIM118
        tensors = {key: file.get_tensor(key) for key, match in matches.items() if not match}
    for key, tensor in tensors.items():
        problem, dtype = "", str(tensor.dtype).removeprefix("torch.")
        if dtype not in _FLOATS:
            problem = f"is {dtype}; save it as one of {', '.join(_FLOATS)}"
        elif tensor.numel() == 0:
            problem = f"is empty, of shape {tuple(tensor.shape)}; save it again"
        elif not tensor.float().isfinite().all():
            problem = "holds NaN or infinity; train it again"
        if problem:
            raise UserError(f"{path}: '{key}' {problem}")
    return tensors, {f"{match[1]}.{match[2]}": key for key, match in matches.items() if match}


def _misfit(rank: int, A: Tensor, B: Tensor, bias: Tensor | None) -> str | None:
    """Why these factors are not those of a layer of this rank, if they are not."""
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply"
    if len(A) != rank:
        return f"rank {len(A)}, but {CONFIG} (r, rank_pattern) says {rank}"
    if rank > max(A.shape[1], len(B)):
        return f"rank {rank} is more than its widths, {A.shape[1]} and {len(B)}"
    if bias is not None and bias.shape != (len(B),):
        return f"the bias of lora_B is {tuple(bias.shape)}, expected ({len(B)},)"
    return None


def _of_layer(name: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """What PEFT takes for a layer: the value of the first pattern that its name ends with."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern.keys(), name), default)
