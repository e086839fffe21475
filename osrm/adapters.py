"""LoRA adapters of PEFT: beside `plugin` the only file that knows PEFT's names."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from osrm.backbones import head_names
from osrm.errors import UserError, first_line
from osrm.task_vectors import LoraPair

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# Options with which an adapter is more than scaling B A on top of the base weights.
_OTHER_UPDATES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_lora(
    model: Any, modules: Sequence[str], rank: int, alpha: int, freeze: str = "N"
) -> PeftModel:
    """Wrap `model` with LoRA on the named layers; the head is trained and saved too.

    A starts as PEFT's gaussian, drawn from torch's global generator, and B at zero. What is
    trained is float32, whatever the frozen weights are.

    Args:
        modules: all layers of the model that share their last name with one of them.
        freeze: "A" or "B" keeps that factor as it starts.
    """
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
        if f".lora_{freeze}." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def adapted_modules(model: PeftModel) -> list[str]:
    """The names of the adapted layers, as in the model without LoRA."""
    named = model.get_base_model().named_modules()
    return [name for name, module in named if hasattr(module, "lora_A")]


@torch.no_grad()
def write_factors(
    model: PeftModel,
    A: Mapping[str, Float[Tensor, "rank in"]],
    B: Mapping[str, Float[Tensor, "out rank"]] | None = None,
) -> None:
    """Set A (and B) of every adapted layer; without `B`, B stays as it is: zero at the start."""
    if set(A) != set(adapted_modules(model)):
        raise ValueError(f"A is for {sorted(A)}, LoRA on {sorted(adapted_modules(model))}")
    for name, factor in A.items():
        layer = model.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.copy_(factor)
        if B is not None:
            layer.lora_B["default"].weight.copy_(B[name])


def write_head(model: PeftModel, head: Mapping[str, Tensor]) -> None:
    """Put a trained head on a model with LoRA, where it is trained and saved from."""
    result = set_peft_model_state_dict(model, {_PREFIX + name: head[name] for name in head})
    if result.unexpected_keys:
        raise ValueError(f"the model has no {result.unexpected_keys}")


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the trained head in it."""
    # "auto" would ask the hub about the embeddings' size; LoRA does not touch them here.
    model.save_pretrained(str(directory), save_embedding_layers=False)


def read_adapter(
    directory: Path,
) -> tuple[dict[str, LoraPair], dict[str, Tensor], str | None]:
    """The updates by layer, the head's tensors, and the base model's name or path.

    Raises:
        UserError: no LoRA adapter, a damaged one, or one whose update is not scaling · B A.
    """
    config = _read_config(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS}: not readable ({error}); save it again") from None
    A, B, head = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if not tensor.isfinite().all():
            raise UserError(f"{directory / WEIGHTS}: '{key}' holds NaN or infinity; train it again")
        if name.endswith(_A):
            A[name.removesuffix(_A)] = tensor
        elif name.endswith(_B):
            B[name.removesuffix(_B)] = tensor
        else:
            head[name] = tensor.float()
    if not A or set(A) != set(B):
        odd = sorted(set(A) ^ set(B))
        raise UserError(
            f"{directory / WEIGHTS}: expected lora_A and lora_B of each layer; "
            + (f"alone: {odd[:3]}" if odd else "found neither")
        )
    pairs = {}
    for name in A:
        if A[name].ndim != 2 or B[name].ndim != 2 or len(A[name]) != B[name].shape[1]:
            raise UserError(
                f"{directory / WEIGHTS}: '{name}': A {tuple(A[name].shape)} and"
                f" B {tuple(B[name].shape)} do not multiply"
            )
        pairs[name] = LoraPair(A[name], B[name], _scaling(config, name, len(A[name])))
    return pairs, head, config.base_model_name_or_path


def _read_config(directory: Path) -> LoraConfig:
    path = directory / CONFIG
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a PEFT adapter's configuration ({first_line(error)}); save it again"
        ) from None
    if not isinstance(config, LoraConfig) or str(config.peft_type) not in ("LORA", "PeftType.LORA"):
        raise UserError(f"{path}: peft_type {config.peft_type}: only LoRA adapters can be merged")
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    for name, alpha in alphas.items():
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{path}: {name}: expected a number, found {alpha!r}; mend it")
    extras = [name for name in _OTHER_UPDATES if getattr(config, name, None)]
    if config.bias != "none":
        extras.append(f"bias={config.bias}")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        extras.append(f"init_lora_weights={start} (changes the base weights)")
    if extras:
        raise UserError(f"{path}: {', '.join(extras)}: only plain LoRA adapters can be merged")
    return config


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    alpha_pattern = config.alpha_pattern or {}
    key = get_pattern_key(alpha_pattern.keys(), name)
    alpha = alpha_pattern.get(key, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


@contextmanager
def applied(model: nn.Module, update: Mapping[str, Float[Tensor, "out in"]]) -> Iterator[None]:
    """Lend a model (without LoRA) the update ΔW of its linear layers: W0 + ΔW inside `with`.

    On exit, even after an error, the weights are W0 again, bit for bit.

    Raises:
        ValueError: the update names a layer that the model lacks, or of another shape.
    """
    kept: dict[str, Tensor] = {}
    try:
        for name in update:
            weight, delta = linear_weight(model, name), update[name]
            if weight.shape != delta.shape:
                raise ValueError(f"{name}: update {tuple(delta.shape)} on {tuple(weight.shape)}")
            kept[name] = weight.detach().clone()
            merged = weight.detach().float() + delta.to(weight.device, torch.float32)
            weight.data.copy_(merged)
        yield
    finally:
        for name, original in kept.items():
            linear_weight(model, name).data.copy_(original)


def linear_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) of the named linear layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer {name}")
    return module.weight


@torch.no_grad()
def load_head(model: Any, head: Mapping[str, Tensor]) -> None:
    """Put a trained head on the model; it must fit exactly."""
    own = {
        f"{name}.{key}": tensor
        for name in head_names(model)
        for key, tensor in model.get_submodule(name).state_dict().items()
    }
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if expected != found:
        raise ValueError(f"the head has {found}, the model wants {expected}")
    for name, tensor in head.items():
        own[name].copy_(tensor)
