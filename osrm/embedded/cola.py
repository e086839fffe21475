"""Sentences of SNLI, and versions of them that the rules of this file break.

A sentence is a list of words, the full stop last; `tags` has the Penn Treebank's tag of each word.
"""

import random
import re
from itertools import pairwise

COLLECTIVE = set(
    "group couple crowd family team band pair audience class bunch crew staff police "  # noqa: SIM905
    "fish sheep deer half majority rest lot number all some any none".split()
)
COUNTED = set("man woman boy girl dog person child guy lady kid cat bike horse hat".split())  # noqa: SIM905
PLURAL = {"is": "are", "has": "have", "does": "do", "goes": "go", "wears": "wear", "sits": "sit"}
PLURAL |= {verb + "s": verb for verb in ("play", "walk", "run", "stand", "ride", "look", "eat")}
SINGULAR = {plural: singular for singular, plural in PLURAL.items()}
SWAPPED = {"DT NN", "DT NNS", "DT JJ", "IN DT", "JJ NN", "JJ NNS", "NN VBZ", "NNS VBP"}
ARTICLES = {"a", "an", "the"}


def tagged(sentence: str, parse: str) -> tuple[list[str], list[str]] | None:
    """The words and their tags; None unless the sentence is plain and sound."""
    tags, words = map(list, zip(*re.findall(r"\(([^\s()]+) ([^\s()]+)\)", parse)))
    plain = parse.startswith("(ROOT (S (NP") and sentence == written(words)
    headline = tags[0] not in {"DT", "CD", "NNS"}  # "Man on a horse."
    misspelt = re.search(r"\b(a [aeiou]|an [^aeiouh])", sentence, re.IGNORECASE)
    if not plain or headline or misspelt or len(words) > 16 or (tags[-1], words[-1]) != (".", "."):
        return None
    return [words[0].lower(), *words[1:]], tags


def written(words: list[str]) -> str:
    """The words as text."""
    text = " ".join(words[:-1]) + words[-1]
    return text[0].upper() + text[1:]


def wrong_agreement(words: list[str], tags: list[str], rng: random.Random) -> list[str] | None:
    """The verb in the other number; None where both numbers could be right."""
    verb = next((i for i, tag in enumerate(tags) if tag in {"VBZ", "VBP", "VBD", "MD"}), 0)
    nouns = set(tags[:verb]) & {"NN", "NNS", "NNP", "NNPS", "PRP", "CC"}
    noun, other = {"VBZ": ("NN", PLURAL), "VBP": ("NNS", SINGULAR)}.get(tags[verb], ("", {}))
    if COLLECTIVE & set(words[:verb]) or nouns != {noun} or words[verb] not in other:
        return None
    return [*words[:verb], other[words[verb]], *words[verb + 1 :]]


def wrong_determiner(words: list[str], tags: list[str], rng: random.Random) -> list[str] | None:
    """An article twice, or none before a noun that needs one, or "a" for "an" or "an" for "a"."""
    doubled, misfit, removed = [], [], []
    for i, (word, after) in enumerate(pairwise(words)):
        before, rest = words[:i], words[i + 1 :]
        if word in ARTICLES:
            doubled.append([*before, word, word, *rest])
        if word in ARTICLES and after in COUNTED and not tags[i + 2].startswith("NN"):
            removed.append(before + rest)
        if word in {"a", "an"}:
            misfit.append([*before, "an" if word == "a" else "a", *rest])
    ways = [way for way in (doubled, misfit, removed) if way]
    return rng.choice(rng.choice(ways)) if ways else None


def wrong_order(words: list[str], tags: list[str], rng: random.Random) -> list[str] | None:
    """Two neighbours in the wrong order, such as "man the" or "the on"."""
    places = [i for i, pair in enumerate(pairwise(tags)) if " ".join(pair) in SWAPPED]
    places = [i for i in places if tags[i] != "DT" or words[i] in ARTICLES]
    if not places:
        return None
    i = rng.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def half_broken(parses: dict[str, str]) -> dict[str, int]:
    """`{sentence: label}`: every second sentence is broken (label 0), in three ways by turns.

    `parses` is {sentence: parse}. Both labels come from sentences that all three ways can break.
    """
    rng, labels = random.Random(0), dict[str, int]()
    ways = (wrong_agreement, wrong_determiner, wrong_order)
    for sentence, parse in parses.items():
        tokens = tagged(sentence, parse)
        broken = [words for way in ways if tokens and (words := way(*tokens, rng))]
        if len(broken) < 3:
            continue
        wrong, label = written(broken[len(labels) // 2 % 3]), 1 - len(labels) % 2
        if wrong not in parses and wrong not in labels:  # SNLI itself has "Man is asleep."
            labels[sentence if label else wrong] = label
    return labels
