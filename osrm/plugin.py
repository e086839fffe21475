"""OSRM's start for any PeftModel with LoRA on linear layers; the API has the form of PEFT's EVA.

    model = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    initialize_lora_osrm_weights(model, {"mine": loader, "theirs": other}, task="mine")

The start depends on the inputs of a layer alone, not on the form of its weights: tested on
nn.Linear, GPT-2's Conv1D, DoRA, and bitsandbytes' 8-bit and 4-bit layers (0.50, on a CPU).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from osrm.backbones import fingerprint_tensors
from osrm.bank import FeatureFile, check_comparable, open_features, task_features
from osrm.errors import UserError
from osrm.features import evaluating
from osrm.moments import Moment
from osrm.starts import STARTS, StartConfig, starts
from osrm.task_vectors import Lazy

Source: TypeAlias = "FeatureFile | str | os.PathLike[str] | Iterable[Any]"
"""A task's batches (mappings of the model's arguments, or its one tensor), or its bank file."""


@torch.no_grad()
def initialize_lora_osrm_weights(
    peft_model: PeftModel,
    sources: Mapping[str, Source] | None = None,
    osrm_state_dict: Mapping[str, Float[Tensor, "rank in"]] | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> None:
    """Write OSRM's start into A of every layer of one adapter; the model's outputs do not change.

    `osrm_state_dict` is a result of `get_osrm_state_dict`; by default it is computed here, with
    these options. Raises UserError as there, if B is not zero, or on another adapter's dict.
    """
    factors = _factors(peft_model, adapter_name)
    if trained := [name for name, (_, B) in factors.items() if B.any()]:
        raise UserError(
            f"{trained[0]}: B of adapter '{adapter_name}' is not zero: it is already trained, or"
            " init_lora_weights set it; a new A would change the outputs, so add a new adapter"
        )
    if osrm_state_dict is None:
        options["adapter_name"] = adapter_name
        osrm_state_dict = get_osrm_state_dict(peft_model, sources, **options)
    given = {name: tuple(A.shape) for name, A in osrm_state_dict.items()}
    wanted = {name: tuple(A.shape) for name, (A, _) in factors.items()}
    for name in sorted({*given, *wanted}):
        if given.get(name) != wanted.get(name):
            raise UserError(
                f"osrm_state_dict: {name}: A is {given.get(name)} there, {wanted.get(name)} in"
                f" adapter '{adapter_name}'; compute it for this adapter"
            )
    for name, (A, _) in factors.items():
        A.copy_(osrm_state_dict[name])


def get_osrm_state_dict(
    peft_model: PeftModel,
    sources: Mapping[str, Source] | None = None,
    *,
    task: str | None = None,
    method: str = "analytical",
    features: str = "token",
    adapter_name: str = "default",
    **options: Any,
) -> dict[str, Float[Tensor, "rank d"]]:
    """{module: A, float32 on the CPU}, the modules named as in the model without PEFT.

    A has orthonormal rows, along which the features of all tasks but `task` have the least energy
    E‖A h‖² (Zhang and Zhou, ACL 2025, Sec. 4). Features h are a layer's inputs in the pre-trained
    model: its adapters are off meanwhile. Layers of one rank that read one input share one A. If
    torch.distributed has started, `osrm.features.collect` says what each process must pass.

    Args:
        sources: {task: batches or bank file}, with or without `task`. The random starts need
            none; only "contrastive" looks at that of `task`.
        task: the name of the own task, which A does not avoid.
        method: a start of `osrm.starts.STARTS`.
        features: the vectors that count, as in `osrm.features.collect`. Padding never counts:
            `attention_mask` and, in a decoder, `decoder_attention_mask` name it.
        options: `epsilon`, `norm` and `seed`, as in `osrm.starts.StartConfig`.

    Raises UserError on an unknown task, method or adapter, a source that is damaged, empty or of
    another model, or a layer that is not linear or does not run just once in a forward pass.
    """
    factors = _factors(peft_model, adapter_name)
    if task is None:
        raise UserError("task: not given; name the task of this adapter, which A must not avoid")
    if method not in STARTS:
        raise UserError(f"method '{method}': unknown; there are {list(STARTS)}")
    for field in ("epsilon", "norm"):
        value = options.get(field)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{field} {value}: expected a finite number above 0")
    needed: dict[str, Any] = dict(sources or {}) if STARTS[method].needs_features else {}
    others = [name for name in needed if name != task]
    if STARTS[method].needs_features and not others:
        raise UserError(f"sources: no task but '{task}'; '{method}' needs others to avoid")
    if method != "contrastive":
        needed.pop(task, None)
    elif task not in needed:
        raise UserError(f"sources: lack '{task}', the own task, which '{method}' looks at")
    settings = _settings(peft_model, features)
    # Files first: their errors show before any forward pass.
    for name, source in needed.items():
        if isinstance(source, str | os.PathLike):
            needed[name] = open_features(Path(source))
        if isinstance(needed[name], FeatureFile):
            check_comparable(needed[name], settings, list(factors))
    with TemporaryDirectory() as folder:
        common = {"adapter_name": adapter_name, "features": features}
        for i, (name, source) in enumerate(needed.items()):
            if not isinstance(source, FeatureFile):
                path = Path(folder) / str(i)
                needed[name] = collect_osrm_features(peft_model, source, path, task=name, **common)
        layers = {name: (len(A), A.shape[1]) for name, (A, _) in factors.items()}
        leaders = needed[others[0]].leaders if others else {}
        device = next(iter(factors.values()))[0].device

        def on_device(file: FeatureFile) -> Lazy[Moment]:
            return Lazy(file, lambda module: file[module].to(device))

        read = {name: on_device(file) for name, file in needed.items()}
        config = StartConfig(method, **options)
        return starts(config, layers, [task], features=read, leaders=leaders, others=others)[task]


def collect_osrm_features(
    peft_model: PeftModel,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    adapter_name: str = "default",
    features: str = "token",
) -> FeatureFile:
    """Write one task's feature statistics to the bank file `path`, by custom <task>.safetensors.

    The file replaces the task's batches for every adapter of the same pre-trained body on these
    layers or some of them, here and in train_glue.py --feature-bank, whose files also serve here.
    Arguments and errors are those of `get_osrm_state_dict`; `task` is only noted in the file, by
    default the file's name.
    """
    modules = list(_factors(peft_model, adapter_name))
    settings = {**_settings(peft_model, features), "task": task or Path(path).stem}
    # `evaluating` as well: PEFT makes all of the active adapter trainable again, frozen or not.
    with evaluating(peft_model), peft_model.disable_adapter():
        model = peft_model.get_base_model()
        ready = _prepared(batches, model, settings["task"])
        return task_features(settings, model, modules, ready, path=Path(path))


def _settings(peft_model: PeftModel, features: str) -> dict[str, Any]:
    """The settings in which statistics must agree: `osrm.bank.COMPARABLE`.

    The body is transformers' `base_model`, or any other module without `modules_to_save`. Its
    parameters have their names without PEFT; PEFT's own and the head's do not count.
    """
    if features not in ("token", "sample", "mean"):
        raise UserError(f"features '{features}': unknown; there are token, sample and mean")
    base = peft_model.get_base_model()
    body = getattr(base, "base_model", base)
    inner = "base_layer|original_module" if hasattr(base, "base_model") else "base_layer"
    wrappers = BaseTunerLayer | AuxiliaryTrainingWrapper
    names = [re.escape(name) for name, x in body.named_modules() if isinstance(x, wrappers)]
    added = re.compile(rf"({'|'.join(names)})\.(?!({inner})\.)")
    own = {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): parameter
        for name, parameter in body.named_parameters(remove_duplicate=False)
        if not added.match(name)
    }
    fingerprint = fingerprint_tensors(own)
    return {"body_fingerprint": fingerprint, "features": features, "count_padding": False}


def _factors(peft_model: PeftModel, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)}; refuses a layer whose update is not B A h. DoRA's is, as long as B = 0."""
    if not isinstance(peft_model, PeftModel):
        raise UserError(f"peft_model: a {type(peft_model).__name__}; wrap it with get_peft_model")
    if not isinstance(peft_model.peft_config.get(adapter_name), LoraConfig):
        names = list(peft_model.peft_config)
        raise UserError(f"adapter_name '{adapter_name}': no LoRA adapter among {names}; add it")
    factors = {}
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise UserError(f"{name}: an adapter is merged into it; call unmerge_adapter() first")
        if not isinstance(layer, LoraLayer):
            continue
        if adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        A = dict(layer.lora_A).get(adapter_name)
        unlike_linear = isinstance(layer, MultiheadAttention | ParamWrapper)
        if unlike_linear or not isinstance(A, nn.Linear) or A.in_features != layer.in_features:
            raise UserError(
                f"{name}: LoRA on this {type(layer.get_base_layer()).__name__} has no A that maps"
                " the layer's input linearly; take it out of target_modules"
            )
        if A.out_features > A.in_features:
            wide = f"rank {A.out_features} is above its {A.in_features} input features"
            raise UserError(f"{name}: {wide}; lower r or rank_pattern")
        factors[name] = A.weight, layer.lora_B[adapter_name].weight
    return factors


def _prepared(batches: Iterable[Any], model: Any, task: str) -> Iterator[Any]:
    """The batches as a transformers model and `osrm.features.pool` need them.

    Labels are removed, since another task's may not fit this head, unless a decoder reads them.
    Encoder inputs as long as the decoder's are padded by one: `pool` tells them by length.
    """
    hub = isinstance(model, PreTrainedModel)
    decodes = hub and model.config.is_encoder_decoder and model.can_generate()
    for batch in batches:
        if not isinstance(batch, Mapping | Tensor):
            wanted = "expected a mapping of the model's arguments, or one tensor"
            raise UserError(f"'{task}': a batch is a {type(batch).__name__}; {wanted}")
        if hub and isinstance(batch, Mapping):
            batch = {name: batch[name] for name in batch if decodes or name != "labels"}
            ids = batch.get("input_ids")
            decoded = batch.get("decoder_input_ids", batch.get("labels"))
            if decodes and ids is not None and decoded is not None and ids.shape == decoded.shape:
                mask = batch.get("attention_mask", torch.ones_like(ids))
                batch |= {"input_ids": pad(ids, (0, 1)), "attention_mask": pad(mask, (0, 1))}
        yield batch
