"""LoRA adapters of PEFT: beside `plugin` the only file that knows PEFT's names."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osrm.backbones import head_names
from osrm.config import read_json
from osrm.errors import UserError, first_line
from osrm.task_vectors import LoraPair

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A\.weight|B\.weight|B\.bias)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    # Updates are float32; NaN is not <= anything.
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_pattern(value: Any, holds: Callable[[Any], bool]) -> bool:
    try:
        # In brackets, as PEFT compiles them.
        return isinstance(value, dict) and all(
            re.compile(f".({pattern})") and holds(value[pattern]) for pattern in value
        )
    except (re.error, OverflowError, RecursionError):
        return False


# Option of adapter_config.json -> its default, what it must be, in words and as a test.
_OPTIONS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "r": (None, "a whole number above 0", _is_rank),
    "lora_alpha": (None, "a finite number", _is_alpha),
    "rank_pattern": ({}, "{pattern: rank}", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ({}, "{pattern: number}", lambda value: _is_pattern(value, _is_alpha)),
    "use_rslora": (False, "true or false", _is_flag),
    "lora_bias": (False, "true or false", _is_flag),
    "modules_to_save": (
        [],
        "a list of names",
        lambda value: isinstance(value, list) and all(type(n) is str and n for n in value),
    ),
    "base_model_name_or_path": ("", "a name or path", lambda value: type(value) is str),
}

# Options with which an adapter is more than scaling B A on top of the base weights.
_OTHER_UPDATES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
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
# What an ordinary adapter says beside that. PEFT, slow to load, is asked about the rest alone.
_USUAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "lora_dropout", "bias", "megatron_core", "qalora_group_size"),
}
_ONLY_LORA = (
    "only plain LoRA adapters can be merged; make it one, or give its dense model"
    " (merge_and_unload)"
)


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
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, {_PREFIX + name: head[name] for name in head})
    if result.unexpected_keys:
        raise ValueError(f"the model has no {result.unexpected_keys}")


def save_adapter(
    model: PeftModel, directory: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the trained head in it.

    Args:
        state: the tensors, where those of `model` itself are only shards of them.
    """
    # "auto" would ask the hub about the embeddings' size; LoRA does not touch them here.
    model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=state)


def write_adapter(
    directory: Path,
    updates: Mapping[str, LoraPair | Tensor],
    head: Mapping[str, Tensor],
    base: str | None,
) -> None:
    """Write updates, whoever made them, as an ordinary adapter of scaling 1 with a head.

    Args:
        updates: as `read_adapter` gives them: layers as pairs, of any ranks above 0, and biases
            as "X.bias", dense, for layers X that have a pair.
        head: its tensors by name; the modules that they are in are saved whole.
        base: the base model's name or path.
    """
    from peft import LoraConfig, TaskType

    pairs = {name: each for name, each in updates.items() if isinstance(each, LoraPair)}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, pair in pairs.items():
        key, ranks[name] = f"{_PREFIX}{name}.lora_", len(pair.A)
        tensors |= {f"{key}A.weight": pair.A, f"{key}B.weight": pair.scaling * pair.B}
        if len(pairs) < len(updates):
            bias = updates.get(f"{name}.bias", torch.zeros(len(pair.B), 1))
            assert isinstance(bias, Tensor)
            tensors[f"{key}B.bias"] = bias.flatten()
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if head else None,
        base_model_name_or_path=base,
        r=largest,
        lora_alpha=largest,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        target_modules=list(ranks),
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        lora_bias=len(pairs) < len(updates),
        inference_mode=True,
    )
    directory.mkdir(parents=True)
    tensors |= {_PREFIX + name: tensor for name, tensor in head.items()}
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / WEIGHTS)
    config.save_pretrained(str(directory))


def read_adapter(
    directory: Path,
) -> tuple[dict[str, LoraPair | Tensor], dict[str, Tensor], str | None]:
    """The updates by layer, the head's tensors, and the base model's name or path.

    A layer X whose lora_B has a bias (PEFT's lora_bias) has a second update, that of its own bias:
    "X.bias", dense, float32, of shape (out, 1), scaling included.

    Raises:
        UserError: no LoRA adapter, a damaged one, or one whose update is not scaling · B A.
    """
    config = _read_config(directory / CONFIG)
    file, saved = directory / WEIGHTS, config["modules_to_save"]
    factors: dict[str, dict[str, Tensor]] = {"A.weight": {}, "B.weight": {}, "B.bias": {}}
    head = {}
    for key, tensor in _read_tensors(directory).items():
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(key):
            factors[match[2]][match[1]] = tensor
        elif name != key and any(f"{module}." in name for module in saved):
            head[name] = tensor.float()
        else:
            raise UserError(
                f"{file}: '{key}' is neither a factor of LoRA nor of modules_to_save"
                f" {sorted({*saved})}; {_ONLY_LORA}"
            )
    A, B, bias = factors.values()
    if not A or set(A) != set(B):
        odd = sorted(set(A) ^ set(B))
        raise UserError(
            f"{file}: expected lora_A and lora_B of each layer,"
            f" {f'alone: {odd[:3]}' if odd else 'found neither'}; save it again"
        )
    if set(bias) != (set(A) if config["lora_bias"] else set()):
        raise UserError(
            f"{file}: lora_B has a bias in {len(bias)} of {len(A)} layers, but {CONFIG} says"
            f" lora_bias {config['lora_bias']}; save it again"
        )
    updates: dict[str, LoraPair | Tensor] = {}
    for name in A:
        rank = _of_layer(name, config["rank_pattern"], config["r"])
        alpha = _of_layer(name, config["alpha_pattern"], config["lora_alpha"])
        _check_shapes(f"{file}: '{name}'", rank, A[name], B[name], bias.get(name))
        scaling = alpha / (rank**0.5 if config["use_rslora"] else rank)
        updates[name] = LoraPair(A[name], B[name], scaling)
        if name in bias:
            updates[f"{name}.bias"] = scaling * bias[name].float()[:, None]
    return updates, head, config["base_model_name_or_path"] or None


def _read_config(path: Path) -> dict[str, Any]:
    """The options of `_OPTIONS`, by PEFT's names.

    Not through PEFT: it asks the hub about a directory that lacks the file, and has defaults for
    what every adapter that it wrote says.
    """
    content = read_json(path, "PEFT adapter")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected PEFT's object {{option: value}}; save it again")
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {content.get('peft_type')!r}: {_ONLY_LORA}")
    options = {
        name: default if content.get(name) is None else content[name]
        for name, (default, _, _) in _OPTIONS.items()
    }
    problems = [
        f"{name}: expected {wanted}, found {reprlib.repr(options[name])}"
        for name, (_, wanted, holds) in _OPTIONS.items()
        if not holds(options[name])
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; mend it, or save it again")
    extras = [name for name in _OTHER_UPDATES if content.get(name)]
    if content.get("bias", "none") != "none":
        extras.append(f"bias={content['bias']}")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        extras.append(f"init_lora_weights={start} (changes the base weights)")
    if extras:
        raise UserError(f"{path}: {', '.join(extras)}: {_ONLY_LORA}")
    unknown = {name for name in content.keys() - _OPTIONS.keys() - _USUAL if content[name]}
    if unknown:
        from peft import LoraConfig

        unknown -= {field.name for field in fields(LoraConfig)}
    if unknown:
        logger.warning(
            "%s: options that this PEFT does not know are ignored: %s", path, sorted(unknown)
        )
    return options


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The adapter's tensors: of float types, not empty, finite in float32."""
    file, pickled = directory / WEIGHTS, directory / "adapter_model.bin"
    try:
        if not file.is_file():
            if pickled.is_file():
                raise UserError(
                    f"{pickled}: a pickle can run code when it is read, so it is not; save the"
                    f" adapter as {WEIGHTS}"
                )
            raise FileNotFoundError("no such file")
        file.open("rb").close()  # safetensors says "No such file" whatever the reason
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable ({first_line(error)}); save it again") from None
    for key, tensor in tensors.items():
        problem = None
        if tensor.dtype not in _FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            problem = f"is {str(tensor.dtype).removeprefix('torch.')}; save it as one of {kinds}"
        elif tensor.numel() == 0:
            problem = f"is empty, of shape {tuple(tensor.shape)}; save it again"
        elif not tensor.float().isfinite().all():
            problem = "holds NaN or infinity; train it again"
        if problem:
            raise UserError(f"{file}: '{key}' {problem}")
    return tensors


def _check_shapes(where: str, rank: int, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Refuse factors that do not multiply, or of another rank than the configuration's."""
    problem = None
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
        problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply"
    elif len(A) != rank:
        problem = f"rank {len(A)}, but {CONFIG} (r, rank_pattern) says {reprlib.repr(rank)}"
    elif rank > max(A.shape[1], len(B)):
        problem = f"rank {rank} is more than its widths, {A.shape[1]} and {len(B)}"
    elif bias is not None and bias.shape != (len(B),):
        problem = f"the bias of lora_B is {tuple(bias.shape)}, expected ({len(B)},)"
    if problem:
        raise UserError(f"{where}: {problem}; save it again")


def _of_layer(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """What PEFT takes for a layer: the value of the first pattern that its name ends with."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern.keys(), name), default)


@contextmanager
def applied(
    model: nn.Module,
    update: Mapping[str, Float[Tensor, "out in"]],
    memory: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    """Lend a model (without LoRA) the update ΔW of its linear layers: W0 + ΔW inside `with`.

    An update named "X.bias", of shape (out, 1), is that of the bias of the layer X. On exit, even
    after an error, weights and biases are as before, bit for bit.

    Args:
        memory: {name: where W0 + ΔW is written}, kept for the model's next update: to write to
            memory that is new takes longer than all the rest. At first it is empty.

    Raises:
        ValueError: the update names a layer that the model lacks, or of another shape.
    """
    memory = {} if memory is None else memory
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name in update:
            parameter, delta = linear_parameter(model, name), update[name]
            own = parameter.data
            if _matrix(own).shape != delta.shape:
                raise ValueError(f"{name}: update {tuple(delta.shape)} on {tuple(own.shape)}")
            if name not in memory:
                memory[name] = torch.empty_like(own)
            # Added as float32, whatever the weights are, and rounded once.
            delta = delta.to(own.device, torch.float32)
            torch.add(_matrix(own), delta, out=_matrix(memory[name]))
            # Another tensor takes the place of the model's own, which nobody writes to.
            kept.append((parameter, own))
            parameter.data = memory[name]
        yield
    finally:
        for parameter, own in reversed(kept):
            parameter.data = own


def linear_weight(model: nn.Module, name: str) -> Tensor:
    """What an update of this name is added to, to be changed in place.

    That is the weight (out, in) of the linear layer `name`, or, for "X.bias", the bias of the
    linear layer X, seen as a matrix (out, 1). Raises like `linear_parameter`.
    """
    return _matrix(linear_parameter(model, name))


def _matrix(parameter: Tensor) -> Tensor:
    """A weight as it is, a bias as a column."""
    return parameter if parameter.ndim == 2 else parameter[:, None]


def linear_parameter(model: nn.Module, name: str) -> Tensor:
    """The weight of the linear layer `name`, or, for "X.bias", the bias of the linear layer X.

    Raises:
        ValueError: the model has no such layer, or it has no bias.
    """
    layer = name.removesuffix(".bias")
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer {layer}")
    if layer == name:
        return module.weight
    if module.bias is None:
        raise ValueError(f"the linear layer {layer} of {type(model).__name__} has no bias")
    return module.bias


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
