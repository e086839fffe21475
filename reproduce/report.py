"""The page of a study out of its results: python reproduce/report.py reproduce/results/embedded

Writes report.html, which needs nothing else, report.md for the README, and the plots beside them.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import figures
import tables
from jinja2 import Environment, FileSystemLoader
from plan import HERE, runs, varied_runs
from study import Study

from osrm.errors import UserError, run_script
from osrm.report import markdown
from osrm.runs import write_text


@dataclass(frozen=True)
class Section:
    """One question: a table or a figure, and how to read it."""

    title: str
    note: str
    table: tables.Table | None = None
    figure: str = ""
    """The file of the plot, beside the page."""


def sections(study: Study) -> list[Section]:
    """All that the results of the study can tell."""
    found = [
        Section(
            "Claims",
            "Differences of the average score × 100, paired by seed, with 95 % bootstrap intervals"
            " over seeds and examples. A claim shows if its interval lies above 0, and does not if"
            " it lies below or at 0; the claims on λ and on the number of tasks if every seed"
            " agrees. What is known of the paper comes from third-party notes.",
            tables.claim_table(study),
        ),
        Section(
            "Which start, which method",
            "Average score of the tasks × 100 under each task's own head, mean ± standard"
            " deviation over the seeds. λ is chosen on held-out data.",
            tables.main_table(study),
        ),
        Section(
            "Paired differences",
            "The same minus the same, by seed, with 95 % bootstrap intervals over seeds and"
            " examples. A bootstrap over few seeds is too narrow rather than too wide.",
            tables.difference_table(study),
        ),
        Section(
            "Single tasks",
            "Each task with its own adapter, × 100.",
            tables.task_table(study, "individual"),
        ),
        Section(
            "Task arithmetic, by task",
            "All adapters merged, × 100.",
            tables.task_table(study, "task_arithmetic"),
        ),
        Section("The chosen λ", "Of each seed.", tables.scale_table(study)),
        *figure(
            study,
            figures.lambda_curves,
            "lambda.png",
            "Robustness to λ",
            "The held-out average against λ; the bands are standard deviations over the seeds.",
            tables.area_table(study),
        ),
        *figure(
            study,
            figures.size_curves,
            "tasks.png",
            "How many tasks",
            "Score of the merge / score of the own adapter × 100. Each seed draws tasks of its own,"
            " the same for all starts.",
            tables.size_table(study),
        ),
        *figure(
            study,
            figures.heat_maps,
            "interference.png",
            "Interference",
            "‖ΔW Xᵀ‖ / ‖W0 Xᵀ‖ × 100 of each adapter on each task's data: the diagonal is wanted."
            " Energy: of the features along A before training, 1 being random directions. Overlap:"
            " median principal cosine of two tasks' trained A. Drift: ‖change of A‖ / ‖start‖."
            " Error: ‖(M − ΔW) Xᵀ‖ / ‖W0 Xᵀ‖ × 100 of the task-arithmetic merge M on each task's"
            " own data.",
            tables.run_table(study, study.starts),
        ),
        *figure(
            study,
            figures.layer_energies,
            "energy.png",
            "Energy along A, by layer",
            "Before training.",
            None,
        ),
    ]
    for question, text in VARIED.items():
        plain = tables.PLAIN.get(question)
        note = f"{text} The plain run of a start is {plain}." if plain else text
        table = tables.run_table(study, varied_runs(question))
        found.append(Section(f"Variation: {question}", note, table))
    rates = HERE.parent / "hparams" / f"lr_{study.name}.json"
    if rates.exists():
        found.append(
            Section(
                "The rate of each start",
                "Mean selection score × 100 on held-out data, with a seed that is not reported.",
                tables.rate_table(json.loads(rates.read_text())),
            )
        )
    return found


VARIED = {
    "samples": "Examples a task for the features that A avoids.",
    "block": "The adapted projections.",
    "freeze": "A or B stays as it starts; B frozen is a trained head alone.",
    "rank": "The rank; alpha / rank stays 2.",
    "features": "Which vectors count: every token, one mean an example, one mean a task.",
    "transform": "Finished LoRA adapters, moved: nullify is ours; project is the paper's, of an"
    " arbitrary A; release-project the published code's, its update alpha / rank times too large.",
}


def figure(
    study: Study,
    draw: Callable[[Study, Path], None],
    name: str,
    title: str,
    note: str,
    table: tables.Table | None,
) -> list[Section]:
    """Draw a figure beside the page; its section."""
    draw(study, study.directory / name)
    return [Section(title, note, table, name)]


def missing(study: Study) -> list[str]:
    """The runs that the study asks for and has not."""
    wanted = runs(study.name) if study.settings else []
    have = {f"{run}/{seed}" for run, seeds in study.records.items() for seed in seeds}
    return [run for run in wanted if run not in have]


def footer(study: Study) -> dict[str, str]:
    """Where the numbers come from."""
    records = [each for seeds in study.records.values() for each in seeds.values()]
    dates = sorted({each["date"] for each in records})
    versions = {json.dumps(each["environment"], sort_keys=True) for each in records}
    settings = study.settings
    return {
        "Command": f"snakemake --snakefile reproduce/Snakefile --cores 2 {study.name}",
        "train_glue.py": f"{settings.get('flags', '')} {settings.get('train', '')}",
        "merge.py": f"--search {' '.join(map(str, settings.get('scales', [])))}"
        f" {settings.get('merge', '')}",
        "Model": ", ".join(sorted({each["backbone"] for each in records})),
        "Dates": " to ".join(dict.fromkeys([dates[0], dates[-1]])),
        "Machine": ", ".join(sorted({each["machine"] for each in records})),
        "Versions": " · ".join(sorted(versions)),
        "Files": f"reproduce/results/{study.name}/<run>/<seed>.json and .parquet",
    }


def markdown_page(study: Study, parts: list[Section]) -> str:
    """The short form, for a README."""
    lines = []
    for part in parts:
        lines += [f"### {part.title}", part.note]
        if part.table:
            head, *body = part.table
            lines.append(markdown([head, ["---", *["---:"] * (len(head) - 1)], *body]))
        if part.figure:
            lines.append(f"![{part.title}]({part.figure})")
    return "\n\n".join(lines) + "\n"


def html_page(study: Study, parts: list[Section]) -> str:
    """One file: the plots are inside."""
    loader = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    images = {
        part.figure: base64.b64encode((study.directory / part.figure).read_bytes()).decode()
        for part in parts
        if part.figure
    }
    return loader.get_template("page.html.j2").render(
        study=study.name,
        sections=parts,
        images=images,
        missing=missing(study),
        footer=footer(study),
    )


def main() -> None:
    """Read, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="reproduce/results/<study>")
    directory = parser.parse_args().directory
    study = Study(directory)
    if not study.starts:
        raise UserError(f"{directory}: no <start>/<seed>.json in it; run the study first")
    parts = sections(study)
    write_text(directory / "report.md", markdown_page(study, parts))
    write_text(directory / "report.html", html_page(study, parts))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
