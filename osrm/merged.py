"""A merged model on disk: the updates by module, a head for each task, and the recipe.

recipe.json                 inputs with checksums, method, knobs, versions, module names
updates/0000.safetensors    one file a module, of one of these forms:
    shared                  one dense update for all tasks (out, in)
    A, B, scaling           one update for all tasks, scaling · B A
    unified, mask, rescaler EMR's: task t receives rescaler_t · mask_t · unified; a bit for each
                            entry in mask (task, bytes), from the lowest of the first byte on
    rows                    a dense update for each task (task, out, in)
heads/<task>.safetensors    the task's own trained head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from osrm.adapters import linear_weight, load_head
from osrm.backbones import find_backbone, load_model, load_tokenizer
from osrm.config import read_json
from osrm.errors import UserError
from osrm.merging import Masked, Merged, Part, row
from osrm.runs import staged, write_json, write_text
from osrm.task_vectors import LoraPair

RECIPE = "recipe.json"


def save_merged(
    directory: Path,
    merged: Merged,
    heads: Mapping[str, Mapping[str, Tensor]],
    recipe: Mapping[str, Any],
) -> None:
    """Write a merged model, one module at a time; it appears under its name when it is whole.

    Args:
        heads: {task: the trained head}, in the order of the merge's tasks.
    """
    with staged(directory) as staging:
        for name in ("updates", "heads"):
            (staging / name).mkdir()
        for number, module in enumerate(tqdm(merged, desc=directory.name, leave=False)):
            tensors = _tensors(merged.parts[module])
            save_file(
                {name: each.contiguous() for name, each in tensors.items()},
                staging / "updates" / _file(number),
            )
        write_text(staging / "README.md", _card(recipe))
        for task, head in heads.items():
            save_file(dict(head), staging / "heads" / f"{task}.safetensors")
        write_json(staging / RECIPE, {**recipe, "modules": list(merged)})


def _card(recipe: Mapping[str, Any]) -> str:
    """The model card: what this is, of what it was made, how to load and to repeat it."""
    sources = "\n".join(f"- {task}: `{each['path']}`" for task, each in recipe["tasks"].items())
    knobs = ", ".join(f"{name} {value}" for name, value in recipe["knobs"].items())
    return f"""---
base_model: {recipe["base"] or recipe["backbone"]}
tags: [lora, merge, {recipe["method"]}]
---

# {recipe["method"]} of {", ".join(recipe["tasks"])}

Merged with [{recipe["method"]}]({recipe["paper"]}){f" ({knobs})" if knobs else ""} from:

{sources}

A module that one of them does not adapt counts as a zero update there. `recipe.json` has the
checksums of the inputs and the versions; `python merge.py --from recipe.json --output-dir NEW`
repeats the merge byte for byte.

```python
from osrm import load_merged

model = load_merged("path/of/this/directory", "{next(iter(recipe["tasks"]))}")
```
"""


def _tensors(part: Part) -> dict[str, Tensor]:
    """A part as it is stored."""
    if isinstance(part, LoraPair):
        # Apart, so that what is read is what was merged to the last bit.
        scaling = torch.tensor(part.scaling, dtype=torch.float64)
        return {"A": part.A, "B": part.B, "scaling": scaling}
    if isinstance(part, Masked):
        return vars(part)
    return {"shared" if part.ndim == 2 else "rows": part}


def _part(tensors: Mapping[str, Tensor]) -> Part:
    """The part that is stored as these tensors."""
    match {**tensors}:
        case {"A": A, "B": B, "scaling": scaling}:
            return LoraPair(A, B, float(scaling))
        case {"unified": _}:
            return Masked(**tensors)
    (part,) = tensors.values()
    return part


def _file(number: int) -> str:
    # Module names come from files that strangers made: they must not become paths.
    return f"{number:04d}.safetensors"


class MergedUpdate(Mapping[str, Tensor]):
    """The update that one task receives, read from disk one module at a time."""

    def __init__(self, directory: Path, task: str, scale: float = 1.0) -> None:
        """`scale` times what was merged.

        Raises UserError if the directory holds no merged model, or not of this task.
        """
        self.directory, self.task, self.scale = directory, task, scale
        recipe = read_json(directory / RECIPE, "merged model")
        if task not in recipe["tasks"]:
            raise UserError(f"{directory}: merged from {list(recipe['tasks'])}, not '{task}'")
        self.recipe: dict[str, Any] = recipe
        self.numbers = {name: number for number, name in enumerate(recipe["modules"])}

    def __getitem__(self, module: str) -> Tensor:
        return row(self.part(module), list(self.recipe["tasks"]).index(self.task))

    def part(self, module: str) -> Part:
        """What all tasks receive in one module, in the form in which it is stored."""
        part = _part(load_file(self.directory / "updates" / _file(self.numbers[module])))
        if isinstance(part, LoraPair):
            return replace(part, scaling=self.scale * part.scaling)
        if isinstance(part, Masked):
            return replace(part, rescaler=self.scale * part.rescaler)
        return part.mul_(self.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's classes; none of them means a regression."""
        return tuple(self.recipe["tasks"][self.task]["labels"])

    @property
    def head(self) -> dict[str, Tensor]:
        """The task's trained head."""
        return load_file(self.directory / "heads" / f"{self.task}.safetensors")


@torch.no_grad()
def load_merged(
    directory: str | Path,
    task: str,
    backbone: str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """A ready `transformers` model of one task out of a directory that merge.py wrote.

    Args:
        directory: one method's directory, such as `.save_dir/merged/ties`.
        backbone: a name, path or hub id of the base model, if it is no longer where it was.
        dtype: of the model; "auto" is the base's own.

    Raises:
        UserError: not such a directory, or it has no update or head for this task.
    """
    update = MergedUpdate(Path(directory), task)
    base = find_backbone(backbone or update.recipe["backbone"])
    model = load_model(base, update.labels, load_tokenizer(base), dtype)
    load_head(model, update.head)
    for module in update:
        linear_weight(model, module).add_(update[module])
    return model.eval()
