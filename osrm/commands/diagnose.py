"""merge.py --diagnose: how far the adapters, and their merges, disturb each task's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from osrm.adapters import CONFIG, linear_weight, read_adapter
from osrm.backbones import body_fingerprint
from osrm.diagnosis import heat_map, layer_plot, tables
from osrm.features import FeatureFile, task_features
from osrm.glue import collator, fingerprint
from osrm.interference import diagnose
from osrm.merged import MergedUpdate
from osrm.runs import write_json, write_text
from osrm.task_vectors import LoraPair

if TYPE_CHECKING:
    from osrm.commands.merge import Inputs
    from osrm.commands.scoring import Evaluation

SAMPLES = 100
FILES = ("interference.json", "interference.md", "interference.png", "interference-layers.png")


def diagnose_merges(
    evaluation: Evaluation, inputs: Inputs, merged: Path, methods: list[str]
) -> None:
    """Write `FILES` beside the merged models; the text is the tables.

    Measured on the first reported examples of each task, which no start of A looked at.
    """
    model = evaluation.model(next(iter(inputs.checkpoints)))
    modules = [name for name, _ in model.named_modules() if name in inputs.vectors]
    starts = {
        task: {
            name: update.A
            for name, update in read_adapter(each.path / "init_model")[0].items()
            if isinstance(update, LoraPair)
        }
        for task, each in inputs.checkpoints.items()
        if (each.path / "init_model" / CONFIG).exists()
    }
    found = diagnose(
        {
            task: {name: each.updates[name] for name in modules}
            for task, each in inputs.checkpoints.items()
        },
        {task: reported_features(evaluation, task, model, modules) for task in inputs.checkpoints},
        lambda name: linear_weight(model, name).detach().cpu().float(),
        starts,
        {
            method: {task: MergedUpdate(merged / method, task) for task in inputs.checkpoints}
            for method in methods
        },
    )
    data, text, heat, layers = (merged / name for name in FILES)
    write_json(data, found.record())
    write_text(text, tables(found))
    heat_map(found, heat)
    layer_plot(found, layers)


def reported_features(
    evaluation: Evaluation, task: str, model: object, modules: list[str]
) -> FeatureFile:
    """The statistics of every real token of a task's first reported examples, cached."""
    reported = evaluation.reported[task][""]
    samples = reported.select(range(min(SAMPLES, len(reported))))
    settings = {
        "task": task,
        "body_fingerprint": body_fingerprint(model),
        "features": "token",
        "count_padding": False,
        "data": fingerprint(samples),
    }
    batches = DataLoader(
        samples.sort("length").remove_columns("labels"),
        batch_size=evaluation.settings[task]["batch_size"],
        collate_fn=collator(evaluation.tokenizer),
    )
    return task_features(settings, model, modules, batches)
