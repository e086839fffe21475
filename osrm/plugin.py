"""OSRM's start for any PeftModel with LoRA on linear layers; the API has the form of PEFT's EVA.

    model = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    initialize_lora_osrm_weights(model, {"mine": loader, "theirs": other}, task="mine")

Only what enters a layer matters, not how the layer keeps its weights: tested on nn.Linear, GPT-2's
Conv1D, DoRA, and bitsandbytes' 8-bit and 4-bit layers (0.50, on a CPU).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from osrm.config import EPSILON
from osrm.errors import UserError
from osrm.features import FeatureFile, check_comparable, starts, task_features
from osrm.starts import STARTS

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
    """Write OSRM's start into A of every layer of one adapter; the model's outputs stay the same.

    Args:
        osrm_state_dict: what `get_osrm_state_dict` has given; by default it is called here, with
            `sources` and `options`: task, method, features, ..., which it explains.

    Raises:
        UserError: as there; B is not zero; `osrm_state_dict` is not for this adapter.
    """
    factors = _factors(peft_model, adapter_name)
    for name, (_, B) in factors.items():
        if B.any():
            raise UserError(
                f"{name}: B of adapter '{adapter_name}' is not zero: it is already trained, or"
                " init_lora_weights set it; a new A would change the outputs, so add a new adapter"
            )
    if osrm_state_dict is None:
        osrm_state_dict = get_osrm_state_dict(
            peft_model, sources, adapter_name=adapter_name, **options
        )
    found = {name: tuple(A.shape) for name, A in osrm_state_dict.items()}
    wanted = {name: tuple(A.shape) for name, (A, _) in factors.items()}
    if found != wanted:
        odd = min(name for name, _ in found.items() ^ wanted.items())
        raise UserError(
            f"osrm_state_dict: {odd}: A is {found.get(odd)} there, {wanted.get(odd)} in adapter"
            f" '{adapter_name}'; compute it for this adapter"
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
    epsilon: float = EPSILON,
    norm: float | None = None,
    seed: int = 0,
) -> dict[str, Float[Tensor, "rank in"]]:
    """{module: A, float32 on the CPU}, the modules named as in the model without PEFT.

    A has orthonormal rows, along which the features of all tasks but `task` have the least energy
    E‖A h‖² (Zhang and Zhou, ACL 2025, Sec. 4). Features h are a layer's inputs in the pre-trained
    model: the adapters are off meanwhile, and the model comes back as it was. Ranks are the
    adapter's own, layer by layer; layers of one rank that read one input share one A. Where
    torch.distributed has started every process must call this, each with its own share of the
    batches, and gets the start of all batches together.

    Args:
        sources: {task: batches or bank file}, with or without the own task. The random starts
            need none, and only "contrastive" looks at the own one.
        task: the name of the own task, which A does not avoid.
        method: a start of `osrm.starts.STARTS`: analytical, contrastive, or a random one.
        features: the vectors that count, "token", "sample" or "mean", as in
            `osrm.features.collect`. Padding never does: what `attention_mask` and, in a decoder,
            `decoder_attention_mask` hide; without a mask all positions count.
        epsilon: of the contrastive start: what is little energy, relative to the mean eigenvalue.
        norm: of every row of A; by default the start's own.
        seed: of all that is random, together with the task's name.

    Raises:
        UserError: an unknown task, method or adapter; a source that is damaged, empty, or of
            another model; a layer that is not linear, is narrower than its rank, or does not run
            just once in a forward pass.
    """
    factors = _factors(peft_model, adapter_name)
    if task is None:
        raise UserError("task: not given; name the task of this adapter, which A must not avoid")
    if method not in STARTS:
        raise UserError(f"method '{method}': unknown; there are {list(STARTS)}")
    for field, value in {"epsilon": epsilon, "norm": norm}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{field} {value}: expected a finite number above 0")
    needed: dict[str, Any] = dict(sources or {}) if STARTS[method].needs_features else {}
    own = needed.pop(task, None)
    others = list(needed)
    if STARTS[method].needs_features and not others:
        raise UserError(f"sources: no task but '{task}'; '{method}' needs others to avoid")
    if method == "contrastive":
        if own is None:
            raise UserError(f"sources: lack '{task}', the own task, which '{method}' looks at")
        needed[task] = own
    settings = _settings(peft_model, features)
    # Files first: what is wrong with them shows before any forward pass.
    found = {name: file for name, source in needed.items() if (file := _opened(source))}
    for file in found.values():
        check_comparable(file, settings, list(factors))
    with TemporaryDirectory() as folder:
        for i, (name, source) in enumerate(needed.items()):
            if name not in found:
                path = Path(folder) / str(i)
                found[name] = collect_osrm_features(
                    peft_model, source, path, name, adapter_name, features
                )
        A = starts(
            method,
            [task],
            {name: A.shape[1] for name, (A, _) in factors.items()},
            {name: A.shape[0] for name, (A, _) in factors.items()},
            seed,
            found,
            found[others[0]].leaders if others else {},
            others,
            epsilon,
            norm,
        )
    return A[task]


def collect_osrm_features(
    peft_model: PeftModel,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    task: str | None = None,
    adapter_name: str = "default",
    features: str = "token",
) -> FeatureFile:
    """Write one task's feature statistics to the bank file `path`, by custom <task>.safetensors.

    It serves in place of the task's batches for every adapter of the same pre-trained body on
    these layers or some of them, and in train_glue.py --feature-bank, whose files serve here too.
    It holds no text. Arguments and errors are those of `get_osrm_state_dict`; `task` is but a
    name, by default the file's.
    """
    modules = list(_factors(peft_model, adapter_name))
    settings = {**_settings(peft_model, features), "task": task or Path(path).stem}
    with _pretrained(peft_model) as model:
        ready = _prepared(batches, model, settings["task"])
        return task_features(settings, model, modules, ready, Path(path))


def _settings(peft_model: PeftModel, features: str) -> dict[str, Any]:
    """What statistics must agree in to be added: `osrm.features.COMPARABLE`."""
    if features not in ("token", "sample", "mean"):
        raise UserError(f"features '{features}': unknown; there are token, sample and mean")
    return {
        "body_fingerprint": fingerprint_tensors(_pretrained_body(peft_model)),
        "features": features,
        "count_padding": False,
    }


def _opened(source: Source) -> FeatureFile | None:
    """The bank file, if the source is one and no batches."""
    if not isinstance(source, str | os.PathLike):
        return source if isinstance(source, FeatureFile) else None
    try:
        return FeatureFile(Path(source))
    except ValueError as error:
        raise UserError(f"{source}: {error}; get it again, or compute it again") from None


def _factors(peft_model: PeftModel, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} of the adapter; refuses layers whose update is not B A h of their input h.

    DoRA's is not either, but with B = 0 its outputs do not depend on A.
    """
    if not isinstance(peft_model, PeftModel):
        raise UserError(f"peft_model: a {type(peft_model).__name__}; wrap it with get_peft_model")
    if not isinstance(peft_model.peft_config.get(adapter_name), LoraConfig):
        names = list(peft_model.peft_config)
        raise UserError(f"adapter_name '{adapter_name}': no LoRA adapter among {names}; add it")
    found = {}
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise UserError(f"{name}: an adapter is merged into it; call unmerge_adapter() first")
        if not isinstance(layer, LoraLayer):
            continue
        if adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        A = dict(layer.lora_A).get(adapter_name)
        odd = isinstance(layer, MultiheadAttention | ParamWrapper)
        if odd or not isinstance(A, nn.Linear) or A.in_features != layer.in_features:
            raise UserError(
                f"{name}: LoRA on this {type(layer.get_base_layer()).__name__} has no A that maps"
                " the layer's input linearly; take it out of target_modules"
            )
        if A.out_features > A.in_features:
            raise UserError(
                f"{name}: rank {A.out_features} is above its {A.in_features} input features; lower"
                " r or rank_pattern"
            )
        found[name] = A.weight, layer.lora_B[adapter_name].weight
    return found


@contextmanager
def _pretrained(peft_model: PeftModel) -> Iterator[nn.Module]:
    """Lend the base model without its adapters; modes and requires_grad come back as they were."""
    modes = {module: module.training for module in peft_model.modules()}
    # PEFT makes the whole active adapter trainable again, also what the user has frozen in it.
    trained = {each: each.requires_grad for each in peft_model.parameters()}
    try:
        with peft_model.disable_adapter():
            yield peft_model.get_base_model()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)


def _pretrained_body(peft_model: PeftModel) -> dict[str, Tensor]:
    """The body's parameters under their names without PEFT; what PEFT added, and a head, left out.

    The body is transformers' `base_model`; of any other module all but `modules_to_save`.
    """
    base = peft_model.get_base_model()
    body = getattr(base, "base_model", base)
    inner = "base_layer|original_module" if hasattr(base, "base_model") else "base_layer"
    wrapped = "|".join(
        re.escape(name)
        for name, module in body.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    added = re.compile(rf"({wrapped})\.(?!({inner})\.)")
    return {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", key): tensor
        for key, tensor in body.named_parameters(remove_duplicate=False)
        if not added.match(key)
    }


def _prepared(batches: Iterable[Any], model: Any, task: str) -> Iterator[Any]:
    """The batches as a transformers model and `osrm.features.token_mask` need them.

    Labels go, since another task's may not fit this head, unless a decoder reads them. A decoder
    input as long as the encoder's would get its mask: the encoder's is padded by one more then.
    """
    hub = isinstance(model, PreTrainedModel)
    decodes = hub and model.config.is_encoder_decoder and model.can_generate()
    for batch in batches:
        if not isinstance(batch, Mapping | Tensor):
            raise UserError(
                f"'{task}': a batch is a {type(batch).__name__}; expected a mapping of the model's"
                " arguments, or one tensor"
            )
        if hub and isinstance(batch, Mapping):
            batch = {name: batch[name] for name in batch if decodes or name != "labels"}
            ids = batch.get("input_ids")
            decoded = batch.get("decoder_input_ids", batch.get("labels"))
            if decodes and ids is not None and decoded is not None and ids.shape == decoded.shape:
                mask = batch.get("attention_mask", torch.ones_like(ids))
                batch |= {"input_ids": pad(ids, (0, 1)), "attention_mask": pad(mask, (0, 1))}
        yield batch
