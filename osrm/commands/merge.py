"""Journey 3: stack the updates, merge them, score every task, print the table."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from osrm.checkpoints import checksum
from osrm.commands.heads import align_heads
from osrm.commands.inputs import Inputs, check_base, choose_methods, fit_methods, read_inputs
from osrm.commands.merger import Merger
from osrm.config import MergeConfig
from osrm.devices import find_device
from osrm.errors import UserError
from osrm.export import export_adapters, export_model
from osrm.files import check_output, locked, staged, write_json
from osrm.measure import environment
from osrm.merged import MergedUpdate
from osrm.records import RECIPE, Merge, Recipe, Source
from osrm.session import Session

logger = logging.getLogger(__name__)

FILES = ("results.", "predictions.parquet", "tasks.png", "search.png", "interference")
"""How the names of the files begin that stand beside the merges."""


def run(config: MergeConfig) -> None:
    """Run merge.py: read, merge and save with each method, search for λ, export, score, print.

    Bad input is refused before any merge; an adapter of a merge that has none at the end.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("merge.py works in one process; start it without torchrun or accelerate")
    source = read_source(config) if config.from_recipe else None
    if source:
        config = replace(
            config,
            backbone=config.backbone or source.backbone,
            dtype=source.dtype,
            max_num_samples=source.max_num_samples,
            align_heads=source.align_heads,
            count_padding=source.count_padding,
        )
    methods = {source.method: source.knobs} if source else choose_methods(config)
    search = {source.method: source.search} if source and source.search else {}
    device, directory = find_device(config.device), Path(config.output_dir)
    check_replaceable(directory, config.overwrite)
    inputs = read_inputs(config, source)
    fit_methods(methods, config, inputs)
    session: Session | None = None
    if not config.no_eval:
        from osrm.commands import scoring  # late: it draws plots, and matplotlib is slow to load

        session, settings = scoring.open_session(config, inputs, methods)
    if session or "model" in config.export:
        check_base(inputs)
    shared = describe(config, inputs)
    with locked(directory), staged(directory) as staging:
        merger = Merger(inputs, session, shared, staging, methods, search, device)
        merger.save(methods)
        if session and config.search:
            merger.choose(config)
        if session and config.align_heads:
            align_heads(session, merger, config.align_heads)
        dense = export(config, merger)
        if session:
            scoring.score_all(session, merger, settings)
        if session and config.diagnose:
            scoring.diagnose_merges(session, merger)
    for name in ("results.md", "interference.md"):
        if (directory / name).exists():
            print((directory / name).read_text(encoding="utf-8"))
    logger.info("The merged models%s are in %s", " and scores" if session else "", directory)
    if dense:
        raise UserError(
            f"--export adapter: {', '.join(dense)} gave no update of low rank, so no adapter was"
            " written; all else is there. Use --export model for them"
        )


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Refuse an output directory that is in the way; only an earlier merge is ever replaced."""
    check_output(directory)
    if not directory.exists():
        return
    if not overwrite:
        raise UserError(f"--output-dir {directory} exists; choose another, or add --overwrite")
    for path in directory.iterdir():
        if not path.name.startswith(FILES) and not (path / RECIPE).exists():
            raise UserError(
                f"--output-dir {directory}: --overwrite replaces earlier merges only, and"
                f" '{path.name}' in it is none; choose another directory"
            )


def read_source(config: MergeConfig) -> Recipe:
    """The recipe.json of --from; raises UserError if it is none, or an input has changed since."""
    recipe = Recipe.read(str(config.from_recipe), "--from")
    for task, source in recipe.tasks.items():
        path, where = Path(source.path), f"--from {config.from_recipe}: '{task}'"
        if not path.is_dir():
            raise UserError(f"{where}: no directory {path}; put the adapter back there")
        if checksum(path) != source.sha256:
            raise UserError(
                f"{where}: the weights in {path} are no longer those of the recipe; put"
                " those back, or merge anew with --load-model-path"
            )
    return recipe


def describe(config: MergeConfig, inputs: Inputs) -> Merge:
    """What the recipes of all methods share: the inputs with checksums, and the versions."""
    runs = inputs.checkpoints.items()
    return Merge(
        backbone=inputs.backbone,
        base=next((run.base for _, run in runs if run.base), None),
        dtype=config.dtype,
        max_num_samples=config.max_num_samples,
        align_heads=config.align_heads,
        count_padding=config.count_padding,
        kind=next(run.kind for _, run in runs),
        tasks={
            task: Source(str(run.path), checksum(run.path), inputs.labels[task], run.saved)
            for task, run in runs
        },
        environment=environment(),
    )


def export(config: MergeConfig, merger: Merger) -> list[str]:
    """Write every merge as --export asks: <method>/adapters/<task> and <method>/models/<task>.

    Returns the methods that have no adapter, because they gave a dense update.
    """
    dense = []
    for method in merger.methods:
        directory = merger.directory / method
        merged = [MergedUpdate(directory, task) for task in merger.shared.tasks]
        if "model" in config.export:
            for update in merged:
                export_model(update, directory / "models" / update.task)
        if "adapter" in config.export:
            try:
                truncation = export_adapters(merged, directory / "adapters", config.rank)
            except UserError:
                dense.append(method)
                continue
            write_json(directory / "adapters" / "truncation.json", truncation)
            rank, error = truncation["rank"], truncation["error"]
            logger.info("%s: adapters of rank %d, relative error %.2g", method, rank, error)
    return dense
