"""A merged model on disk: the updates by module, a head for each task, and the recipe.

recipe.json                 inputs with checksums, method, knobs, versions, module names
updates/0000.safetensors    one file a module, of one of these forms:
    shared                  one dense update for all tasks (out, in)
    A, B, scaling           one update for all tasks, scaling · B A
    unified, mask, rescaler EMR's: task t receives rescaler_t · mask_t · unified; see `Masked`
    rows                    a dense update for each task (task, out, in)
heads/<task>.safetensors    the task's own trained head, or what --align-heads made of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from osrm.backbones import find_backbone
from osrm.errors import UserError
from osrm.files import staged, write_json, write_text
from osrm.lending import check_not_tied, linear_weight, load_head
from osrm.merging import Masked, Merged, Part, row
from osrm.records import RECIPE, Recipe, record
from osrm.task_vectors import Lazy, LoraPair

# Numbered, not named after the module: one in a stranger's file could be a path.
_UPDATE = "updates/{:04d}.safetensors"


def save_merged(
    directory: Path, merged: Merged, heads: Mapping[str, Mapping[str, Tensor]], recipe: Recipe
) -> None:
    """Write a merged model with {task: head}; it appears under its name when it is whole."""
    with staged(directory) as staging:
        for name in ("updates", "heads"):
            (staging / name).mkdir()
        files = {module: _UPDATE.format(number) for number, module in enumerate(merged)}

        def save(module: str) -> None:
            part = _tensors(merged.parts[module]).items()
            host = {name: tensor.cpu().contiguous() for name, tensor in part}
            save_file(host, staging / files[module])

        for _ in tqdm(merged.calls(save, merged), directory.name, len(merged), leave=False):
            pass
        write_text(staging / "README.md", _card(recipe))
        for task, head in heads.items():
            save_file(dict(head), head_file(staging, task))
        write_json(staging / RECIPE, record(replace(recipe, modules=list(merged))))


def head_file(directory: Path, task: str) -> Path:
    """Where a merged model has the head of a task."""
    return directory / "heads" / f"{task}.safetensors"


def _card(recipe: Recipe) -> str:
    """The model card: what this is, of what it was made, how to load and to repeat it."""
    sources = "\n".join(f"- {task}: `{source.path}`" for task, source in recipe.tasks.items())
    knobs = ", ".join(f"{name} {value}" for name, value in recipe.knobs.items())
    count = recipe.align_heads
    fitted = f"\nEach head was fitted to the merge by {count} texts of its task.\n" if count else ""
    return f"""---
base_model: {recipe.base or recipe.backbone}
tags: [lora, merge, {recipe.method}]
---

# {recipe.method} of {", ".join(recipe.tasks)}

Merged with [{recipe.method}]({recipe.paper}){f" ({knobs})" if knobs else ""} from:

{sources}
{fitted}
A module that one of them does not adapt counts as a zero update there. `recipe.json` has the
checksums of the inputs and the versions; `python merge.py --from recipe.json --output-dir NEW`
repeats the merge byte for byte.

```python
from osrm import load_merged

model = load_merged("path/of/this/directory", "{next(iter(recipe.tasks))}")
```
"""


def _tensors(part: Part) -> dict[str, Tensor]:
    """A part as it is stored."""
    if isinstance(part, LoraPair):
        # Apart, so that what is read is what was merged to the last bit.
        return vars(part) | {"scaling": torch.tensor(part.scaling, dtype=torch.float64)}
    if isinstance(part, Masked):
        return vars(part)
    return {"shared" if part.ndim == 2 else "rows": part}


class MergedUpdate(Lazy[Tensor]):
    """The update that one task receives, `scale` times what was merged, read module by module
    into the memory of `device`.

    Raises UserError if the directory holds no merged model, or not of this task.
    """

    def __init__(
        self, directory: Path, task: str, scale: float = 1.0, device: torch.device | str = "cpu"
    ) -> None:
        self.directory, self.task, self.scale, self.device = directory, task, scale, device
        self.recipe = Recipe.read(directory / RECIPE, "merged model")
        if task not in self.recipe.tasks:
            raise UserError(f"{directory}: merged from {list(self.recipe.tasks)}, not '{task}'")
        self.numbers = {name: number for number, name in enumerate(self.recipe.modules)}
        place = list(self.recipe.tasks).index(task)
        super().__init__(self.numbers, lambda module: row(self.part(module), place))

    def part(self, module: str) -> Part:
        """What all tasks receive in one module, in the form in which it is stored."""
        stored = load_file(self.directory / _UPDATE.format(self.numbers[module]))
        scaling = self.scale * float(stored.pop("scaling", 1.0))
        tensors = {name: tensor.to(self.device) for name, tensor in stored.items()}
        if "A" in tensors:
            return LoraPair(**tensors, scaling=scaling)
        if "unified" in tensors:
            return Masked(**tensors | {"rescaler": self.scale * tensors["rescaler"]})
        (update,) = tensors.values()
        return update.mul_(self.scale)

    @property
    def backbone(self) -> str:
        """The base model; raises UserError if no file or flag named it when it was merged."""
        if self.recipe.backbone is None:
            raise UserError(f"{self.directory}: {RECIPE} names no backbone; merge with --backbone")
        return self.recipe.backbone

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's classes; none of them means a regression."""
        return tuple(self.recipe.tasks[self.task].labels)

    @property
    def head(self) -> dict[str, Tensor]:
        """The task's head: the trained one, or with --align-heads the fitted one."""
        return load_file(head_file(self.directory, self.task))


@torch.no_grad()
def load_merged(
    directory: str | Path,
    task: str,
    backbone: str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """The `transformers` model of one task from a method's directory (.save_dir/merged/ties).

    `backbone` is a name, path or hub id of the base model, if it is no longer where it was. The
    dtype "auto" is the base's own. Raises UserError as `MergedUpdate` does.
    """
    update = MergedUpdate(Path(directory), task)
    base = find_backbone(backbone or update.backbone)
    model, new = update.recipe.kind.load(base, update.labels, dtype)
    load_head(model, update.head, new)
    check_not_tied(model, update, update.directory)
    for module in update:
        linear_weight(model, module).add_(update[module])
    return model.eval()
