"""A merged model on disk: the updates by module, a head for each task, and the recipe.

recipe.json                 inputs with checksums, method, knobs, versions, module names
updates/0000.safetensors    one file a module: "shared", or one tensor a task
heads/<task>.safetensors    the task's own trained head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from osrm.adapters import linear_weight, load_head
from osrm.backbones import find_backbone, load_model, load_tokenizer
from osrm.config import read_json
from osrm.errors import UserError
from osrm.merging import Updates
from osrm.runs import staged, write_json

RECIPE, SHARED = "recipe.json", "shared"


def save_merged(
    directory: Path,
    updates: Updates,
    heads: Mapping[str, Mapping[str, Tensor]],
    recipe: Mapping[str, Any],
) -> None:
    """Write a merged model, one module at a time; it appears under its name when it is whole.

    Args:
        updates: rows in the order of `heads`, which names the tasks.
    """
    with staged(directory) as staging:
        for name in ("updates", "heads"):
            (staging / name).mkdir()
        for number, module in enumerate(tqdm(updates, desc=directory.name, leave=False)):
            stack = updates[module]
            shared = len(stack) == 1 or stack.stride(0) == 0
            rows = {SHARED: stack[0]} if shared else dict(zip(heads, stack))
            save_file(
                {name: row.contiguous() for name, row in rows.items()},
                staging / "updates" / _file(number),
            )
        for task, head in heads.items():
            save_file(dict(head), staging / "heads" / f"{task}.safetensors")
        write_json(staging / RECIPE, {**recipe, "modules": list(updates)})


def _file(number: int) -> str:
    # Module names come from files that strangers made: they must not become paths.
    return f"{number:04d}.safetensors"


class MergedUpdate(Mapping[str, Tensor]):
    """The update that one task receives, read from disk one module at a time."""

    def __init__(self, directory: Path, task: str) -> None:
        """Raises UserError if the directory holds no merged model, or not of this task."""
        self.directory, self.task = directory, task
        recipe = read_json(directory / RECIPE, "merged model")
        if task not in recipe["tasks"]:
            raise UserError(f"{directory}: merged from {list(recipe['tasks'])}, not '{task}'")
        self.recipe: dict[str, Any] = recipe
        self.numbers = {name: number for number, name in enumerate(recipe["modules"])}

    def __getitem__(self, module: str) -> Tensor:
        path = self.directory / "updates" / _file(self.numbers[module])
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(self.task if self.task in file.keys() else SHARED)  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def head(self) -> dict[str, Tensor]:
        """The task's trained head."""
        return load_file(self.directory / "heads" / f"{self.task}.safetensors")


@torch.no_grad()
def load_merged(directory: str | Path, task: str, backbone: str | None = None) -> Any:
    """A ready `transformers` model of one task out of a directory that merge.py wrote.

    Args:
        directory: one method's directory, such as `.save_dir/merged/ties`.
        backbone: a name, path or hub id of the base model, if it is no longer where it was.

    Raises:
        UserError: not such a directory, or it has no update or head for this task.
    """
    update = MergedUpdate(Path(directory), task)
    base = find_backbone(backbone or update.recipe["backbone"])
    labels = tuple(update.recipe["tasks"][task]["labels"])
    model = load_model(base, labels, load_tokenizer(base), torch.float32)
    load_head(model, update.head)
    for module in update:
        linear_weight(model, module).add_(update[module])
    return model.eval()
