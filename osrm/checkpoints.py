"""Fine-tuned checkpoints of any form: adapters and dense models, read as updates and heads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, cached_file

from osrm import checks
from osrm.adapters import CONFIG, WEIGHTS, Adapter, read_adapter
from osrm.backbones import CLASSIFIER, Backbone, Kind, head_names
from osrm.errors import UserError
from osrm.lending import LINEAR, check_not_tied, linear_weight, load_head
from osrm.runs import ARGS
from osrm.task_vectors import LoraPair, TaskVectors, Update
from osrm.tensor_file import opened

DENSE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What is used of args.json.
_ARGS = {
    **dict.fromkeys(("task", "backbone", "base_model", "body_fingerprint", "init"), checks.text),
    "data_dir": checks.optional(checks.text),
    "seed": checks.whole(0),
    "max_seq_len": checks.whole(8),
    "max_test_samples": checks.Check(
        "a whole number other than 0", lambda count: checks.whole().holds(count) and count != 0
    ),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Adapter):
    """One task's fine-tuning: the update of each layer, and the head."""

    path: Path
    args: dict[str, Any] = field(default_factory=dict)
    """The args.json of the run; empty if it was not ours."""


def named_directories(path: str | Path, tasks: Iterable[str] | None) -> dict[str, Path]:
    """The directories of a load_model_path.json, for `tasks` or for all that it names.

    `<run directory>/merged_model` means the run directory itself where no dense model was saved:
    the adapter in it is the same update, exactly. Raises UserError if a directory has no model.
    """
    where = f"--load-model-path {path}"
    if tasks is None:
        tasks = checks.read_object(path, "--load-model-path", "{task: directory}")
        if not tasks:
            raise UserError(f"{where}: it names no task; add one")
    directories, wrong = {}, []
    for task, name in checks.per_task(path, "--load-model-path", tasks, checks.nonempty).items():
        directory = Path(name)
        try:
            if directory.name == "merged_model" and not directory.exists():
                directory = directory.parent
            if not directory.is_dir():
                wrong.append(f"'{task}': no directory {name}")
            elif not any((directory / file).exists() for file in (CONFIG, DENSE, INDEX)):
                wrong.append(f"'{task}': {name} holds neither {CONFIG} nor {DENSE}")
        except OSError as error:
            wrong.append(f"'{task}': {name}: {error.strerror}")
        directories[task] = directory
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}; train it first, or correct the path")
    return directories


LoadBase = Callable[[str | None, Kind], tuple[Any, Collection[str]]]


def read_checkpoint(path: Path, load_base: LoadBase) -> Checkpoint:
    """Read an adapter or a dense checkpoint; raises UserError if it is damaged or of another kind.

    For a dense one `load_base` gives what `Kind.load` returns, of the backbone that args.json
    names, or of None.
    """
    args: dict[str, Any] = {}
    for file in (path / ARGS, path.parent / ARGS):
        if not args and file.exists():
            args = checks.read_object(file, "run directory", "{setting: value}")
            if wrong := checks.problems(args, _ARGS):
                raise UserError(f"{file}: {'; '.join(wrong)}; train it again")
    if (path / CONFIG).exists():
        return Checkpoint(**vars(read_adapter(path)), path=path, args=args)
    kind = dense_kind(path)
    base, new = load_base(args.get("backbone"), kind)
    updates, head = _read_dense(path, base, new)
    saved = tuple(name for name in head_names(base) if any(n.startswith(f"{name}.") for n in head))
    return Checkpoint(updates, head, saved, args.get("base_model"), kind, path=path, args=args)


def dense_kind(path: Path) -> Kind:
    """The kind of a whole model, by its config.json; without one, text classification."""
    file = path / "config.json"
    config = checks.read_object(file, "checkpoint", "{setting: value}") if file.exists() else {}
    match config.get("architectures"):
        case [str(architecture)]:
            return Kind.of(architecture)
    return CLASSIFIER


def load_adapters(directories: Mapping[str, str | Path]) -> TaskVectors:
    """The stacked updates of {task: directory of a PEFT LoRA adapter}, for `osrm.merge`."""
    adapters = {task: read_adapter(Path(directory)) for task, directory in directories.items()}
    for task, adapter in adapters.items():
        if adapter.base_tensors:
            raise UserError(
                f"{directories[task]}: it holds {', '.join(adapter.base_tensors)} of its base"
                " model; merge it with merge.py, which compares them"
            )
    return TaskVectors.stack({task: adapter.updates for task, adapter in adapters.items()})


def check_task(checkpoint: Checkpoint, task: str) -> None:
    """Refuse, with a UserError, a run of another task."""
    own = checkpoint.args.get("task", task)
    if own != task:
        raise UserError(f"{checkpoint.path}: listed as '{task}', but a run of '{own}'")


def check_fits(checkpoint: Checkpoint, model: Any, new: Collection[str] | None = None) -> None:
    """Refuse, with a UserError, an update or head that does not fit `model`, the task's.

    `new` as in `load_head`.
    """
    fix = "name its base model with --backbone"
    try:
        for name, update in checkpoint.updates.items():
            wanted = tuple(linear_weight(model, name).shape)
            # The shape of a dense difference was compared when it was read.
            if isinstance(update, LoraPair | Tensor) and update.shape != wanted:
                where = f"the layer of {model.name_or_path} {wanted}"
                raise ValueError(f"the update of {name} is {tuple(update.shape)}, {where}")
        check_not_tied(model, checkpoint.updates, checkpoint.path)
        fix = "train the head with the adapter"
        load_head(model, checkpoint.head, new)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}; {fix}") from None


def check_base_tensors(checkpoint: Checkpoint, backbone: Backbone, labels: tuple[str, ...]) -> None:
    """Refuse, with a UserError, an adapter that saved a layer of another base beside its LoRA.

    The two are compared in the adapter's precision, one layer at a time.
    """
    model, _ = checkpoint.kind.load(backbone, labels, "auto", "meta")
    files = base_tensor_files(model, backbone)
    for name, key in checkpoint.base_tensors.items():
        if name not in files:
            raise UserError(
                f"{checkpoint.path}: it holds the base model's {name}, which {backbone.path} has in"
                " no safetensors file to compare with; save the base again"
            )
        own, base = read_tensor(checkpoint.path / WEIGHTS, key), read_tensor(*files[name])
        if not torch.equal(base.to(own.dtype), own):
            raise UserError(
                f"{checkpoint.path}: its {name} is not that of the base model {backbone.path}: only"
                " updates of one base can be merged; name the right one with --backbone, or give"
                " the dense model (merge_and_unload)"
            )


def checksum(path: Path) -> str:
    """sha256 of what a checkpoint directory's update depends on: weights, and LoRA's settings."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob(CONFIG)]):
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; remove or fix it") from None
    return digest.hexdigest()


@torch.no_grad()
def _read_dense(
    path: Path, base: Any, new: Collection[str]
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Dense minus base: one update a linear layer that changed; each is read when it is needed.

    The tensors that are `new`, since the base has none, are the head.
    """
    files, own = tensor_files(path), base.state_dict()
    linear = {f"{name}.weight": m for name, m in base.named_modules() if isinstance(m, LINEAR)}
    # A file holds tied tensors once.
    stored = {own[name].data_ptr() for name in own.keys() & files.keys()}
    absent = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in stored)
    if lacking := [name for name in absent if name not in new]:
        lacks = f"lacks {len(lacking)} tensors of the base model ({lacking[0]}, ...)"
        raise UserError(f"{path}: {lacks}; it is a checkpoint of another backbone")
    updates: dict[str, Update] = {}
    head, others = {}, []
    for name, (file, there) in sorted(files.items()):
        tensor = read_tensor(file, there)
        if tensor.is_complex() or not (tensor := tensor.float()).isfinite().all():
            raise UserError(f"{file}: '{there}' has NaN, infinity or complex numbers; train again")
        if name in new:
            head[name] = tensor
        elif name in own and torch.equal(own[name].float().cpu(), tensor):
            continue
        elif name in linear and own[name].shape == tensor.shape:
            transposed = isinstance(linear[name], Conv1D)
            layer = name.removesuffix(".weight")
            updates[layer] = _difference(file, there, own[name], transposed)
        else:
            others.append(name)
    if others:
        what = f"{len(others)} tensors of the base, no linear layer's weight ({others[0]}, ...)"
        raise UserError(f"{path}: differs in {what}; only updates of linear layers can be merged")
    return updates, head


def _difference(file: Path, name: str, base: Tensor, transposed: bool) -> Callable[[], Tensor]:
    def read() -> Tensor:
        delta = read_tensor(file, name).float() - base.float().cpu()
        return delta.T if transposed else delta

    return read


def tensor_files(path: Path) -> dict[str, tuple[Path, str]]:
    """{tensor: (file, its name there)} of a model's directory; one file of all comes first.

    The file may have the old names of a norm's parameters: gamma and beta.
    """
    if (path / INDEX).exists() and not (path / DENSE).exists():
        index = checks.read_json(path / INDEX, "checkpoint")
        try:
            files = {name: path / Path(file).name for name, file in index["weight_map"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path / INDEX}: no weight_map in it; save the model again") from None
    else:
        with opened(path / DENSE) as file:
            files = dict.fromkeys(file.keys(), path / DENSE)
    return {
        name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): (file, name)
        for name, file in files.items()
    }


def base_tensor_files(model: Any, backbone: Backbone) -> dict[str, tuple[Path, str]]:
    """{tensor of the model: (file, its name there)} of a base; empty if it has no safetensors.

    Of tensors that are tied a file may have one.
    """
    base = Path(cached_file(backbone.path, CONFIG_NAME)).parent
    if not any((base / name).exists() for name in (DENSE, INDEX)):
        return {}
    own, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."
    tensors = {}
    for stored, file in tensor_files(base).items():  # of a model with another head, or with none
        names = stored, prefix + stored, stored.removeprefix(prefix)
        tensors[next((name for name in names if name in own), stored)] = file
    tied = {id(own[name]): file for name, file in tensors.items() if name in own}
    return {name: tied[id(tensor)] for name, tensor in own.items() if id(tensor) in tied} | tensors


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor as it is stored; raises UserError if the file is damaged."""
    with opened(path) as file:
        return file.get_tensor(name)
