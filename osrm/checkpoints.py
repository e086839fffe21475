"""Fine-tuned checkpoints of any form: adapters and dense models, read as updates and heads."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from osrm.adapters import CONFIG, linear_weight, load_head, read_adapter
from osrm.backbones import head_names
from osrm.config import LARGEST, per_task, read_json
from osrm.errors import UserError
from osrm.runs import ARGS
from osrm.task_vectors import LoraPair, TaskVectors, Update

DENSE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _whole(holds: Callable[[int], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and abs(value) <= LARGEST and holds(value)


def _is_text(value: Any) -> bool:
    return type(value) is str


# What is used of args.json, and what it must be if it is there, in words and as a test.
_ARGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("task", "backbone", "base_model", "body_fingerprint", "init"), ("str", _is_text)
    ),
    "data_dir": ("str or null", lambda value: value is None or _is_text(value)),
    "seed": ("int of at least 0", _whole(lambda value: value >= 0)),
    "max_seq_len": ("int of at least 8", _whole(lambda value: value >= 8)),
    "max_test_samples": ("int other than 0", _whole(bool)),
}


@dataclass(frozen=True)
class Checkpoint:
    """One task's fine-tuning: the update of each layer, and the head."""

    path: Path
    updates: dict[str, Update]
    head: dict[str, Tensor]
    base: str | None
    """What the base model is called, as far as the checkpoint knows."""
    args: dict[str, Any]
    """The args.json of the run; empty if it was not ours."""


def named_directories(path: str | Path, tasks: Iterable[str] | None) -> dict[str, Path]:
    """The directories of a load_model_path.json, for `tasks` or for all that it names.

    `<run directory>/merged_model` means the run directory itself where no dense model was saved:
    the adapter in it is the same update, exactly.

    Raises:
        UserError: broken JSON, a missing task, a directory that does not exist or holds no model.
    """
    if tasks is None:
        content = read_json(path, "--load-model-path")
        tasks = list(content) if isinstance(content, dict) else []
        if not tasks:
            raise UserError(f"--load-model-path {path}: expected an object {{task: directory}}")
    found = {}
    problems = []
    for task, name in per_task(path, "--load-model-path", tasks, str).items():
        directory = Path(name)
        try:
            if directory.name == "merged_model" and not directory.exists():
                directory = directory.parent
            if not directory.is_dir():
                problems.append(f"'{task}': no directory {name}")
            elif not any((directory / file).exists() for file in (CONFIG, DENSE, INDEX)):
                problems.append(f"'{task}': {name} holds neither {CONFIG} nor {DENSE}")
        except OSError as error:
            problems.append(f"'{task}': {name}: {error.strerror}")
        found[task] = directory
    if problems:
        raise UserError(
            f"--load-model-path {path}: {'; '.join(problems)}; train it first, or correct the path"
        )
    return found


def read_checkpoint(path: Path, load_base: Callable[[str | None], Any]) -> Checkpoint:
    """Read an adapter or a dense checkpoint.

    Args:
        load_base: gives the pre-trained model, called with the name of the backbone if the run's
            args.json is there to tell it; only a dense checkpoint needs that.

    Raises:
        UserError: unreadable files, NaN or infinity, or changes that are no linear layer's update.
    """
    args: dict[str, Any] = {}
    for directory in (path, path.parent):
        if not args and (directory / ARGS).exists():
            args = read_json(directory / ARGS, "run directory")
            if not isinstance(args, dict):
                raise UserError(f"{directory / ARGS}: expected an object; train it again")
            problems = [
                f"{name}: expected {wanted}, found {reprlib.repr(args[name])}"
                for name, (wanted, holds) in _ARGS.items()
                if name in args and not holds(args[name])
            ]
            if problems:
                raise UserError(f"{directory / ARGS}: {'; '.join(problems)}; train it again")
    if (path / CONFIG).exists():
        adapter, head, base = read_adapter(path)
        return Checkpoint(path, {**adapter}, head, base, args)
    updates, head = _read_dense(path, load_base(args.get("backbone")))
    return Checkpoint(path, updates, head, args.get("base_model"), args)


def load_adapters(directories: Mapping[str, str | Path]) -> TaskVectors:
    """The stacked updates of {task: directory of a PEFT LoRA adapter}, for `osrm.merge`.

    Raises:
        UserError: see `read_adapter` and `TaskVectors.stack`.
    """
    return TaskVectors.stack(
        {task: read_adapter(Path(directory))[0] for task, directory in directories.items()}
    )


def check_task(checkpoint: Checkpoint, task: str) -> None:
    """Refuse a run of one task that is listed under the name of another.

    Raises:
        UserError: see above; a checkpoint that does not say its task is believed.
    """
    own = checkpoint.args.get("task", task)
    if own != task:
        raise UserError(f"{checkpoint.path}: listed as '{task}', but a run of '{own}'")


def check_fits(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse an update or head that does not fit `model`, which has the head of the task.

    Raises:
        UserError: a layer that the model lacks, other shapes, another head.
    """
    for name, update in checkpoint.updates.items():
        try:
            wanted = tuple(linear_weight(model, name).shape)
        except ValueError as error:
            raise UserError(
                f"{checkpoint.path}: {error}; name its base model with --backbone"
            ) from None
        shape: tuple[int, ...] = wanted  # with which a dense difference was compared when read
        if isinstance(update, LoraPair | Tensor):
            shape = tuple(update.shape)
        if shape != wanted:
            raise UserError(
                f"{checkpoint.path}: the update of {name} is {shape}, the layer of"
                f" {model.name_or_path} {wanted}; name its base model with --backbone"
            )
    try:
        load_head(model, checkpoint.head)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}; train the head with the adapter") from None


def checksum(path: Path) -> str:
    """sha256 of what a checkpoint directory's update depends on: weights, and LoRA's settings.

    Raises:
        UserError: one of the files cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob(CONFIG)]):
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; remove or mend it") from None
    return digest.hexdigest()


@torch.no_grad()
def _read_dense(path: Path, base: Any) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Dense minus base: one update a linear layer that changed; each is read when it is needed."""
    files = tensor_files(path)
    own = base.state_dict()
    heads = tuple(f"{name}." for name in head_names(base))
    # A file holds tied tensors once.
    stored = {own[name].data_ptr() for name in own.keys() & files.keys()}
    lacking = sorted(
        name
        for name, tensor in own.items()
        if tensor.data_ptr() not in stored and not name.startswith(heads)
    )
    if lacking:
        raise UserError(
            f"{path}: lacks {len(lacking)} tensors of the base model ({lacking[0]}, ...); it is a"
            " checkpoint of another backbone"
        )
    updates: dict[str, Update] = {}
    head, others = {}, []
    for name in sorted(files):
        tensor = read_tensor(files[name], name)
        if tensor.is_complex() or not (tensor := tensor.float()).isfinite().all():
            problem = "NaN, infinity or complex numbers; train it again"
            raise UserError(f"{files[name]}: '{name}' holds {problem}")
        if name.startswith(heads):
            head[name] = tensor
        elif name not in own or own[name].shape != tensor.shape:
            others.append(name)
        elif not torch.equal(own[name].float().cpu(), tensor):
            module = name.removesuffix(".weight")
            if isinstance(base.get_submodule(name.rpartition(".")[0]), nn.Linear) and (
                module != name
            ):
                updates[module] = _difference(files[name], name, linear_weight(base, module))
            else:
                others.append(name)
    if others:
        raise UserError(
            f"{path}: differs from the base model in {len(others)} tensors that are no linear"
            f" layer's weight ({others[0]}, ...); only updates of linear layers can be merged"
        )
    return updates, head


def _difference(file: Path, name: str, base: Tensor) -> Any:
    return lambda: read_tensor(file, name).float() - base.detach().float().cpu()


def tensor_files(path: Path) -> dict[str, Path]:
    """{tensor: file} of a model's directory; a file of all comes first, as in transformers.

    Raises:
        UserError: there is no safetensors file, or it is damaged.
    """
    if (path / INDEX).exists() and not (path / DENSE).exists():
        index = read_json(path / INDEX, "checkpoint")
        try:
            return {name: path / Path(file).name for name, file in index["weight_map"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path / INDEX}: no weight_map in it; save the model again") from None
    try:
        with safe_open(path / DENSE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / DENSE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / DENSE}: not readable ({error}); save the model again") from None


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor as it is stored; raises UserError if the file is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable ({error}); save the model again") from None
