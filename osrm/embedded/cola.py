"""Sentences of SNLI and broken ones, with the parser's tags as the guide."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Tokens = list[tuple[str, str]]  # (tag, word), the full stop last

COLLECTIVE = set(
    "group couple crowd family team band pair audience class bunch crew staff police "  # noqa: SIM905
    "fish sheep deer half majority rest lot number all some any none".split()
)
COUNTED = set("man woman boy girl dog person child guy lady kid cat bike horse hat".split())  # noqa: SIM905
PLURAL = {"is": "are", "has": "have", "does": "do", "goes": "go", "wears": "wear", "sits": "sit"}
PLURAL |= {verb + "s": verb for verb in ("play", "walk", "run", "stand", "ride", "look", "eat")}
SINGULAR = {plural: singular for singular, plural in PLURAL.items()}
SWAPPED = {("DT", "NN"), ("DT", "NNS"), ("DT", "JJ"), ("IN", "DT"), ("JJ", "NN"), ("JJ", "NNS")}
SWAPPED |= {("NN", "VBZ"), ("NNS", "VBP")}
ARTICLES = {"a", "an", "the"}


def tagged(row: Mapping[str, str]) -> Tokens | None:
    """The hypothesis with its tags; None unless it is a plain, sound sentence."""
    tokens = re.findall(r"\(([^\s()]+) ([^\s()]+)\)", row["sentence2_parse"])
    sentence = written([word for _, word in tokens])
    plain = row["sentence2_parse"].startswith("(ROOT (S (NP") and sentence == row["sentence2"]
    headless = tokens[0][0] not in {"DT", "CD", "NNS"}  # a headline: "Man on a horse."
    misspelt = re.search(r"\b(a [aeiou]|an [^aeiouh])", sentence, re.IGNORECASE)
    if not plain or headless or misspelt or len(tokens) > 16 or tokens[-1] != (".", "."):
        return None
    return [(tokens[0][0], tokens[0][1].lower()), *tokens[1:]]


def written(words: Sequence[str]) -> str:
    """The words as a sentence."""
    text = " ".join(words[:-1]) + words[-1]
    return text[0].upper() + text[1:]


def wrong_agreement(tokens: Tokens, rng: random.Random) -> list[str] | None:
    """The verb in the other number; None where the subject's number could be argued about."""
    words, tags = [word for _, word in tokens], [tag for tag, _ in tokens]
    verb = next((i for i, tag in enumerate(tags) if tag in {"VBZ", "VBP", "VBD", "MD"}), 0)
    if COLLECTIVE & set(words[:verb]):
        return None
    nouns = set(tags[:verb]) & {"NN", "NNS", "NNP", "NNPS", "PRP", "CC"}
    number = {"VBZ": ({"NN"}, PLURAL), "VBP": ({"NNS"}, SINGULAR)}.get(tags[verb])
    if number is None or nouns != number[0] or words[verb] not in number[1]:
        return None
    words[verb] = number[1][words[verb]]
    return words


def wrong_determiner(tokens: Tokens, rng: random.Random) -> list[str] | None:
    """An article doubled, or removed before a noun that needs one, or a for an."""
    words = [word for _, word in tokens]
    ways: dict[str, list[list[str]]] = defaultdict(list)
    for i, (word, after) in enumerate(pairwise(words)):
        if word in ARTICLES:
            ways["doubled"].append([*words[:i], word, *words[i:]])
        if word in ARTICLES and after in COUNTED and not tokens[i + 2][0].startswith("NN"):
            ways["removed"].append(words[:i] + words[i + 1 :])
        if word in {"a", "an"}:
            ways["misfit"].append([*words[:i], "an" if word == "a" else "a", *words[i + 1 :]])
    return rng.choice(ways[rng.choice(sorted(ways))]) if ways else None


def wrong_order(tokens: Tokens, rng: random.Random) -> list[str] | None:
    """Two neighbours of differing kinds swapped, such as "man the" or "the on"."""
    words = [word for _, word in tokens]
    places = [
        i
        for i, ((tag, word), (after, _)) in enumerate(pairwise(tokens))
        if (tag, after) in SWAPPED and (tag != "DT" or word in ARTICLES)
    ]
    if not places:
        return None
    i = rng.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


BREAKS = (wrong_agreement, wrong_determiner, wrong_order)


def half_broken(rows: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Sentences, and whether they are sound: every second is not, in the three ways by turns.

    Only a sentence that can be broken in each way is used, so that sound and broken ones are
    drawn alike.
    """
    rng, labels = random.Random(0), dict[str, int]()
    parsed = {row["sentence2"]: tagged(row) for row in rows}
    for sentence, tokens in parsed.items():
        broken = [words for way in BREAKS if tokens and (words := way(tokens, rng))]
        if len(broken) < len(BREAKS):
            continue
        wrong, label = written(broken[len(labels) // 2 % 3]), 1 - len(labels) % 2
        if wrong not in parsed and wrong not in labels:  # some writers do write "Man is asleep."
            labels[sentence if label else wrong] = label
    return labels
