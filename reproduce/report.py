"""The page of a study out of its results: python reproduce/report.py reproduce/results/embedded

Writes report.html, which needs nothing else, report.md, and the plots beside them; --page also puts
the main tables between the two markers of another page, such as docs/evidence.md.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
import figures
import pandas as pd
import tables
from jinja2 import Environment, FileSystemLoader
from plan import HERE, QUESTIONS, STARTS, runs, varied_runs
from study import Study

from osrm.errors import UserError, run_script
from osrm.files import write_text
from osrm.report import markdown


@dataclass(frozen=True)
class Section:
    """One question: tables, a figure, and how to read them."""

    title: str
    note: str
    tables: tuple[tables.Table, ...] = ()
    figure: str = ""
    """The file of the plot, from the page."""
    runs: tuple[str, ...] = ()
    """What it is made of; all starts if it does not say."""
    short: bool = True
    """Whether it also stands in report.md."""
    page: bool = False
    """Whether `--page` shows its tables."""


def sections(study: Study) -> list[Section]:
    """All that the results of the study can tell."""
    return [
        *results(study),
        *illustrated(study),
        *(variation(study, question) for question in VARIED if was_run(study, question)),
        *rates(study),
    ]


def results(study: Study) -> list[Section]:
    """The claims, and the scores behind them."""
    sizes = [run for run in varied_runs("tasks") if run in study.records]
    return [
        Section(
            "Claims",
            "Differences of the average score × 100, paired by seed, with Student's 95 % intervals"
            " over the seeds. p is corrected by Holm for the methods of one comparison; for λ, for"
            " the two areas. * marks a corrected p below .05. A claim shows if its p is below .05"
            " and the difference above 0 (for “within 1 %”: above −1). It does not show if p is"
            " below .05 and the difference below that. It is undecided otherwise. Merging loss:"
            " individual − merged, so less than 0 is better. What is known of the paper comes from"
            " third-party notes.",
            (claims.claim_table(study),),
            runs=tuple(dict.fromkeys([*study.starts, *sizes])),
            page=True,
        ),
        Section(
            "Which start, which method",
            "Average score of the tasks × 100 under each task's own head, mean ± standard"
            " deviation over the seeds; in brackets the merging loss, individual − merged. λ is"
            " chosen on held-out data. The constants give every example the same answer.",
            (tables.main_table(study),),
            page=True,
        ),
        Section(
            "Normalised average",
            "Mean over the tasks of the score / the score of the task's own adapter, × 100: the"
            " share that a merge keeps.",
            (tables.start_table(study, "normalised_average"),),
            short=False,
        ),
        Section(
            "Paired differences",
            PAIRED,
            (tables.difference_table(study),),
            page=True,
        ),
        Section(
            "Differences of the merging loss",
            "Individual − merged, × 100, paired by seed as above: less than 0 is better.",
            (tables.difference_table(study, "loss"),),
        ),
        Section(
            "Methods beside task arithmetic",
            "Each method − task arithmetic, average score × 100, paired by seed as above. The"
            " methods of one start are a family.",
            (tables.method_table(study),),
        ),
        Section(
            "What the seeds can show",
            "2,000 simulated studies of each paired difference: each task of a simulated seed is"
            " that of a real seed, with its examples drawn anew. The shares are the least and the"
            " greatest of these comparisons. The last two columns are the difference that four of"
            " five studies find, if one method is asked for and if all are. A failure that no real"
            " seed had is not in it.",
            (tables.reliability_table(study),),
            page=True,
        ),
        Section(
            "Single tasks",
            "Each task with its own adapter, × 100. The most frequent label and the best constant"
            " need no model. By F1 the best constant may be the rarer label.",
            (tables.task_table(study, "individual"),),
            page=True,
        ),
        Section(
            "Task arithmetic, by task",
            "All adapters merged, × 100.",
            (tables.task_table(study, "task_arithmetic"),),
            short=False,
        ),
        Section(
            "The chosen λ",
            "Of each seed, on held-out data.",
            (tables.scale_table(study),),
            short=False,
        ),
    ]


def illustrated(study: Study) -> list[Section]:
    """What has a figure."""
    return [
        figure(
            study,
            figures.lambda_curves,
            "Robustness to λ",
            "The held-out average against λ, × 100; the bands are standard deviations over the"
            " seeds. A higher curve has a larger area without being flatter: area / best tells how"
            " flat it is.",
            (tables.area_table(study),),
        ),
        figure(
            study,
            figures.size_curves,
            "How many tasks",
            "Score of the merge / score of the own adapter × 100. Each seed draws tasks of its own,"
            " the same for all starts. Differences: of the average score × 100.",
            (tables.size_table(study), tables.contrast_table(study, "tasks")),
            varied_runs("tasks"),
        ),
        figure(
            study,
            figures.heat_maps,
            "Interference",
            "‖ΔW Xᵀ‖ / ‖W0 Xᵀ‖ × 100 of each adapter on each task's data. Only the diagonal is"
            " wanted. Energy: that of the features along A before training; random directions have"
            " 1. Overlap: median principal cosine of two tasks' trained A. Drift: ‖change of A‖ /"
            " ‖start‖. Merges: these methods together.",
            (tables.run_table(study, study.starts),),
        ),
        figure(
            study, figures.layer_energies, "Energy along A by layer", "Before the training.", ()
        ),
    ]


def was_run(study: Study, question: str) -> bool:
    """Whether the study has any run of a question beside the plain ones."""
    return bool({*varied_runs(question)} & study.records.keys() - {*STARTS})


def variation(study: Study, question: str) -> Section:
    """One question of runs that were trained or moved anew."""
    plain = tables.PLAIN.get(question)
    note = f" The plain run of a start is {plain}." if plain else ""
    asked = varied_runs(question)
    needed = dict.fromkeys([*asked, *(other for _, other in tables.contrasts(question))])
    return Section(
        f"Variation: {question}",
        f"{VARIED[question]}{note} {PAIRED} The plain runs may have more seeds than the"
        " variations.",
        (tables.run_table(study, asked), tables.contrast_table(study, question)),
        runs=(*needed,),
    )


def rates(study: Study) -> list[Section]:
    """The rates that were tried, if the study chose them."""
    path = HERE.parent / "hparams" / f"lr_{study.name}.json"
    if not path.exists():
        return []
    return [
        Section(
            "The rate of each start",
            "Mean selection score × 100 on held-out data, with seeds that are not reported"
            f" (hparams/{path.name}). Chosen is the smallest rate whose mean is within one standard"
            " error of the best; the error is pooled over all starts and rates.",
            (tables.rate_table(json.loads(path.read_text())),),
            short=False,
        )
    ]


PAIRED = (
    "Differences of the average score × 100, paired by seed, with Student's 95 % intervals. * marks"
    " p below .05 after Holm's correction for the merging methods of the comparison."
)
VARIED = {
    "samples": "Examples per task for the features that A avoids.",
    "block": "The adapted projections.",
    "freeze": "A or B stays as it starts. With B frozen, only the head is trained.",
    "rank": "The rank. alpha / rank stays 2.",
    "rate": "lr2x: twice the rate that was chosen.",
    "features": "Which vectors count: every token, one mean per example, or one mean per task.",
    "heads": "aligned: each head is fitted to its features in the merge (--align-heads).",
    "transform": "Finished LoRA adapters, transformed. nullify is ours. project is the paper's,"
    " with an arbitrary A. release-project is the published code's, whose update is alpha / rank"
    " times too large.",
}


def figure(
    study: Study,
    draw: Callable[[Study, Path], None],
    title: str,
    note: str,
    shown: tuple[tables.Table, ...],
    of: Iterable[str] = (),
) -> Section:
    """Draw a figure beside the page; its section."""
    name = f"plots/{draw.__name__}.png"
    path = study.directory / name
    path.parent.mkdir(exist_ok=True)
    draw(study, path)
    return Section(title, note, shown, name, (*of,))


def missing(study: Study) -> list[str]:
    """The runs that the study asks for and has not."""
    wanted = runs(study.name) if study.settings else []
    have = {f"{run}/{seed}" for run, seeds in study.records.items() for seed in seeds}
    return [run for run in wanted if run not in have]


def footer(study: Study) -> dict[str, list[str]]:
    """Where the numbers come from."""
    records = [each for seeds in study.records.values() for each in seeds.values()]
    dates = sorted({each["date"] for each in records})
    settings = study.settings
    common = f"{settings.get('flags', '')} {settings.get('train', '')}"
    found = {
        "Command": [f"snakemake --snakefile reproduce/Snakefile --cores 2 {study.name}"],
        "train_glue.py, all runs": [common],
        "train_glue.py, each start": [
            f"{tables.title(start)}: {STARTS[start]}" for start in study.starts
        ],
        "train_glue.py, each variation": [
            f"{name}: {flags}" for asked in QUESTIONS.values() for name, flags in moved(asked)
        ],
        "merge.py": [
            f"--search {' '.join(map(str, settings.get('scales', [])))} {settings.get('merge', '')}"
        ],
        "Seeds": [
            f"{tables.title(run)}: {', '.join(map(str, sorted(seeds)))}"
            for run, seeds in study.records.items()
        ],
        "Model": sorted({each["backbone"] for each in records}),
        "Dates": [" to ".join(dict.fromkeys([dates[0], dates[-1]]))],
        "Machine": sorted({each["machine"] for each in records}),
        "Versions": sorted({versions(each["environment"]) for each in records}),
        "Commits": commits(study),
    }
    if not settings:
        return {name: lines for name, lines in found.items() if name in ALWAYS}
    return found


ALWAYS = ("Seeds", "Model", "Dates", "Machine", "Versions", "Commits")
"""What is known of results that are no study of ours."""


def moved(asked: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The variations of a question that have flags."""
    rates = {name: f"--lr × {factor}" for name, factor in asked.get("multiply_lr", {}).items()}
    kinds = ("vary", "transform", "merge")
    return ChainMap(rates, *(asked.get(kind, {}) for kind in kinds)).items()


COMMIT = "git_commit"


def versions(environment: dict[str, str]) -> str:
    """The packages of a run."""
    return ", ".join(f"{name} {text}" for name, text in environment.items() if name != COMMIT)


def commits(study: Study) -> list[str]:
    """Which code made which runs."""
    made: dict[str, dict[str, list[str]]] = {}
    for run, seeds in study.records.items():
        for seed, record in seeds.items():
            commit = record["environment"].get(COMMIT, "unknown")
            made.setdefault(commit, {}).setdefault(run, []).append(str(seed))
    return [
        f"{commit}: " + "; ".join(f"{run} {', '.join(seeds)}" for run, seeds in of.items())
        for commit, of in made.items()
    ]


def sources(study: Study, part: Section) -> dict[str, list[str]]:
    """{run: its records, from the page} behind one section."""
    return {
        run: [f"{run}/{seed}.json" for seed in sorted(study.records[run])]
        for run in part.runs or study.starts
        if run in study.records
    }


def markdown_page(study: Study, parts: list[Section]) -> str:
    """The short form."""
    absent = missing(study)
    lines = [f"{len(absent)} runs of this study are not there yet."] if absent else []
    lines += study.problems
    for part in parts:
        if part.short:
            lines += markdown_section(part)
            if part.figure:
                lines.append(f"![{part.title}]({part.figure})")
    return "\n\n".join(lines) + "\n"


def markdown_section(part: Section) -> list[str]:
    """The heading, the note and the tables of a section."""
    found = [markdown(pd.DataFrame(body, columns=head)) for head, *body in part.tables]
    return [f"### {part.title}", part.note, *found]


def with_results(page: str, study: Study, parts: list[Section]) -> str:
    """The text of a page with the main tables between its markers.

    Raises:
        UserError: it has no markers.
    """
    begin, end = (f"<!-- {each} of reproduce/results/{study.name} -->" for each in ("begin", "end"))
    if not 0 <= page.find(begin) < page.find(end):
        raise UserError(
            f"--page: the file has no line {begin} with a line {end} below it; add them"
        )
    shown = [text for part in parts if part.page for text in markdown_section(part)]
    before, after = page.split(begin)[0], page.split(end)[1]
    return "\n\n".join([before + begin, *shown, end + after])


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
        sources=[sources(study, part) for part in parts],
        problems=[*study.problems],
        images=images,
        missing=missing(study),
        footer=footer(study),
    )


def write(directory: Path, page: Path | None = None) -> None:
    """Read, compute, write."""
    study = Study(directory)
    if not study.starts:
        raise UserError(f"{directory}: no <start>/<seed>.json in it; run the study first")
    parts = sections(study)
    if page:
        write_text(page, with_results(page.read_text(encoding="utf-8"), study, parts))
    write_text(directory / "report.md", markdown_page(study, parts))
    write_text(directory / "report.html", html_page(study, parts))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="reproduce/results/<study>")
    parser.add_argument("--page", type=Path, help="also put tables between this file's markers")
    given = parser.parse_args()
    write(given.directory, given.page)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
