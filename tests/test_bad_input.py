"""Bad input is one line that names file, field and fix, and exit code 2, before any long work."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from osrm.commands.train import train
from osrm.config import TrainConfig
from osrm.errors import run_script
from osrm.runs import run_dir
from tests.conftest import ROOT

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# -- flags -------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--tasks rte wnli": ["--tasks", "wnli", "stsb"],
    "--other-tasks ax": ["--other-tasks", "ax", "stsb"],
    "--block x": ["--block x", "q, k and v"],
    "--block qvx": ["--block qvx", "q, k and v"],
    "--block qqv": ["--block qqv", "each once"],
    "--freeze AB": ["--freeze AB", "nothing to train", "A, B or N"],
    "--freeze X": ["--freeze X", "A, B or N"],
    "--rank 0": ["--rank 0", "at least 1"],
    "--rank -3": ["--rank -3", "at least 1"],
    "--alpha 0": ["--alpha 0", "at least 1"],
    "--rank 33": ["--rank 33", "query", "(32, 32)", "32 at most"],
    "--rank 33 --init analytical": ["--rank 33", "query", "32 at most"],
    "--lr 0": ["--lr 0", "above 0"],
    "--lr nan": ["--lr nan", "finite"],
    "--lr inf": ["--lr inf", "finite"],
    "--lr=-1e-4": ["--lr -0.0001", "above 0"],
    "--warmup-ratio 1.5": ["--warmup-ratio 1.5", "below 1"],
    "--weight-decay nan": ["--weight-decay nan", "finite"],
    "--epochs 0": ["--epochs 0", "at least 1"],
    "--max-seq-len 0": ["--max-seq-len 0", "at least"],
    "--per-device-train-bsz 0": ["--per-device-train-bsz 0", "at least 1"],
    "--grad-accumulate-steps 0": ["--grad-accumlate-steps 0", "at least 1"],
    "--max-train-samples 0": ["--max-train-samples 0", "at least 1"],
    "--max-test-samples 0 --max-eval-samples 0": ["--max-test-samples", "--max-eval-samples"],
    "--seed -1": ["--seed -1", "at least 0"],
    "--init analytical --tasks rte --other-tasks rte": ["--other-tasks", "other tasks"],
    "--init analytical --other-tasks rte": ["--other-tasks", "other tasks"],
    "--report-to nonsense": ["--report-to nonsense"],
    "--data-dir nowhere": ["--data-dir nowhere", "rte"],
    "--init contrastive --other-tasks rte": ["--init contrastive", "--other-tasks", "other tasks"],
    "--epsilon 0": ["--epsilon 0", "above 0"],
    "--epsilon=-1e-3": ["--epsilon -0.001", "above 0"],
    "--epsilon nan": ["--epsilon nan", "finite"],
    "--norm-match 0": ["--norm-match 0", "above 0"],
    "--norm-match inf": ["--norm-match inf", "finite"],
    "--only-features": ["--only-features", "--feature-bank"],
    "--feature-bank absent --other-tasks ninth": ["--other-tasks", "ninth"],
    # All at once, from both kinds of checks.
    "--rank 0 --epochs 0 --lr nan": ["--rank 0", "--epochs 0", "--lr nan"],
    "--rank 0 --freeze AB --block xyz": ["--rank 0", "--freeze AB", "--block xyz"],
}


@pytest.fixture
def train_argv(tiny, tiny_data) -> list[str]:
    """A good command; a flag that is given once more, later, wins."""
    argv = f"--backbone {tiny['roberta']} --data-dir {tiny_data} --tasks rte sst2 --rank 2"
    return argv.split()


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flags_of_train(refuse, train_argv, flags):
    refuse("train_glue.py", [*train_argv, *flags.split()], BAD_FLAGS[flags])


@pytest.mark.parametrize("flags", ["--rank abc", "--init best", "--no-such-flag", "--tasks"])
@pytest.mark.parametrize("script", ["train_glue.py", "merge.py"])
def test_flags_that_argparse_refuses(script, flags, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        run_script(runpy.run_path(str(ROOT / script))["main"])
    assert stop.value.code == 2
    assert f"{script}: error: " in capfd.readouterr().err


def test_a_real_process_says_the_same():
    result = subprocess.run(
        [sys.executable, "train_glue.py", "--freeze", "AB"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "train_glue.py: error: --freeze AB: A and B both frozen leave nothing to train;"
        " expected A, B or N\n"
    )


# -- feature banks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tiny, tiny_data, tmp_path_factory) -> Path:
    """The feature bank of two tasks."""
    folder = tmp_path_factory.mktemp("filled")
    config = TrainConfig(
        backbone=str(tiny["roberta"]),
        tasks=["rte"],
        other_tasks=["sst2"],
        data_dir=str(tiny_data),
        rank=2,
        feature_bank=str(folder),
        only_features=True,
    )
    train(config)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


BAD_BANKS = {
    "cut": (cut, "", ["sst2.safetensors", "get it again, or delete it"]),
    "no statistics": (
        lambda path: save_file({"w": torch.ones(2)}, path),
        "",
        ["sst2.safetensors", "no file of feature statistics", "get it again"],
    ),
    "other features": (
        lambda path: None,
        "--features mean",
        ["rte.safetensors", "features is 'token' there, 'mean' here", "compute it again"],
    ),
    "padding": (
        lambda path: None,
        "--count-padding --only-features",
        ["rte.safetensors", "count_padding is False there, True here"],
    ),
    "other layers": (lambda path: None, "--block k", ["rte.safetensors", "lacks 2 layers", "key"]),
    "a file": (
        lambda path: None,
        "--feature-bank bank/sst2.safetensors",
        ["--feature-bank bank/sst2.safetensors", "no folder"],
    ),
}


@pytest.mark.parametrize("case", BAD_BANKS)
def test_feature_bank(refuse, train_argv, filled, tmp_path, case):
    damage, flags, words = BAD_BANKS[case]
    bank = shutil.copytree(filled, tmp_path / "bank")
    damage(bank / "sst2.safetensors")
    argv = [*train_argv, "--init", "analytical", "--feature-bank", "bank"]
    refuse("train_glue.py", [*argv, *flags.split()], words)


def test_feature_bank_of_another_backbone(refuse, train_argv, filled, tmp_path, tiny):
    bank = shutil.copytree(filled, tmp_path / "bank")
    flags = ["--init", "contrastive", "--feature-bank", str(bank), "--backbone", str(tiny["bert"])]
    words = [str(bank / "rte.safetensors"), "body_fingerprint is '", "lacks 4 layers (bert."]
    refuse("train_glue.py", [*train_argv, *flags], words)


# -- tables in JSON ----------------------------------------------------------------------------

GOOD = {"--load-epochs": '{"rte": 1, "sst2": 1}', "--load-lrs": '{"rte": 1e-3, "sst2": 1e-3}'}
BROKEN = [
    ("{", ["broken JSON", "fix the file"]),
    ("", ["broken JSON"]),
    ("\xff\xfe", ["broken JSON"]),
    ("[5, 5]", ["expected an object"]),
    ("5", ["expected an object"]),
]
BAD_TABLES = [
    *((flag, *case) for flag in ("--load-epochs", "--load-lrs") for case in BROKEN),
    ("--load-epochs", '{"rte": 1}', ["lacks the task 'sst2'", "add it"]),
    ("--load-epochs", "{}", ["'rte'", "'sst2'"]),
    ("--load-epochs", '{"rte": "5", "sst2": 5}', ["rte: expected a whole number", "'5'"]),
    ("--load-epochs", '{"rte": 5, "sst2": 2.5}', ["sst2: expected a whole number", "2.5"]),
    ("--load-epochs", '{"rte": 5, "sst2": true}', ["sst2: expected a whole number", "True"]),
    ("--load-epochs", '{"rte": 5, "sst2": null}', ["sst2: expected a whole number", "None"]),
    ("--load-epochs", '{"rte": 0, "sst2": -1}', ["rte: expected", "sst2: expected", "at least 1"]),
    ("--load-lrs", '{"rte": 1e-3}', ["lacks the task 'sst2'", "add it"]),
    (
        "--load-lrs",
        '{"rte": -1e-3, "sst2": 1e-3}',
        ["expected a finite number above 0", "-0.001"],
    ),
    (
        "--load-lrs",
        '{"rte": NaN, "sst2": Infinity}',
        ["rte: expected", "sst2:", "nan", "inf"],
    ),
    ("--load-lrs", '{"rte": "4e-4", "sst2": 1e-3}', ["rte: expected a finite number", "'4e-4'"]),
    ("--load-lrs", '{"rte": false, "sst2": 1e-3}', ["rte: expected a finite number", "False"]),
]


@pytest.mark.parametrize("flag, text, words", BAD_TABLES)
def test_tables_of_train(refuse, train_argv, tmp_path, flag, text, words):
    (tmp_path / "table.json").write_text(text, encoding="latin-1")
    refuse("train_glue.py", [*train_argv, flag, "table.json"], [flag, "table.json", *words])


BAD_MODEL_PATHS = [
    *BROKEN[:3],
    ("[5, 5]", ["expected an object"]),
    ('{"rte": "nowhere"}', ["'rte'", "nowhere", "train it first"]),
    ('{"rte": "nowhere/merged_model"}', ["'rte'", "nowhere/merged_model"]),
    ('{"rte": "."}', ["'rte'", "holds neither", CONFIG, "model.safetensors"]),
    ('{"rte": "table.json"}', ["'rte'", "no directory table.json"]),
    ('{"rte": ""}', ["rte: expected text", "not empty"]),
    ('{"rte": 3}', ["rte: expected text", "found 3"]),
]


@pytest.mark.parametrize("text, words", BAD_MODEL_PATHS)
@pytest.mark.parametrize("script", ["train_glue.py", "merge.py"])
def test_load_model_path(refuse, train_argv, tmp_path, script, text, words):
    (tmp_path / "table.json").write_text(text, encoding="latin-1")
    argv = ["--hparams", str(ROOT / "hparams/merge.json")]
    if script == "train_glue.py":
        argv = [*train_argv, "--tasks", "rte", "--init", "analytical"]
    words = ["--load-model-path table.json", *words]
    refuse(script, [*argv, "--load-model-path", "table.json"], words)


def test_load_model_path_lacks_a_task(refuse, train_argv, tmp_path):
    (tmp_path / "table.json").write_text('{"rte": "somewhere"}')
    argv = [*train_argv, "--init", "analytical", "--load-model-path", "table.json"]
    refuse("train_glue.py", argv, ["table.json", "lacks the task 'sst2'"])


@pytest.mark.parametrize("flag", ["--load-epochs", "--load-lrs", "--load-model-path"])
def test_file_that_is_not_there(refuse, train_argv, flag):
    argv = [*train_argv, "--init", "analytical", flag, "no.json"]
    refuse("train_glue.py", argv, [f"{flag} no.json", "No such file", "name a JSON file"])


# -- data --------------------------------------------------------------------------------------


def edit_row(split: str, **values: object):
    """Put these values into the fourth row of an rte split."""

    def damage(data: Path) -> None:
        path = data / "rte" / f"{split}.jsonl"
        lines = path.read_text().splitlines()
        lines[3] = json.dumps({**json.loads(lines[3]), **values})
        path.write_text("\n".join(lines))

    return damage


def replaced(name: str, content: bytes):
    """The train split is this file instead."""

    def damage(data: Path) -> None:
        (data / "rte" / "train.jsonl").unlink()
        (data / "rte" / name).write_bytes(content)

    return damage


def without_column(data: Path) -> None:
    path = data / "rte" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**row, "sentence2": None}) for row in rows))
    path.write_text(path.read_text().replace('"sentence2"', '"hypothesis"'))


def broken_save_to_disk(data: Path) -> None:
    (data / "rte" / "dataset_dict.json").write_text('{"splits": ["train"]}')


ROW = ["rte train", "row 3", "column "]
BAD_DATA = {
    "no folder": (lambda data: shutil.rmtree(data / "rte"), ["--data-dir", "'rte'", "add"]),
    "no train": (
        lambda data: (data / "rte/train.jsonl").unlink(),
        ["rte", "no split 'train'", "train.parquet"],
    ),
    "no validation": (
        lambda data: (data / "rte/validation.jsonl").unlink(),
        ["rte", "no split 'validation'", "validation.parquet"],
    ),
    "no column": (without_column, ["rte train", "lacks the column sentence2", "rte has"]),
    "label 2": (edit_row("train", label=2), [*ROW, "'label'", "found 2", "not_entailment"]),
    "label -1": (edit_row("validation", label=-1), ["rte validation", "row 3", "found -1"]),
    "label 0.5": (edit_row("train", label=0.5), [*ROW, "'label'", "found 0.5"]),
    "label null": (edit_row("train", label=None), [*ROW, "'label'"]),
    "label text": (edit_row("train", label="entailment"), ["rte", "train", "label", "entailment"]),
    "null text": (edit_row("train", sentence1=None), [*ROW, "'sentence1'", "None"]),
    "text is a number": (edit_row("train", sentence1=7), ["rte", "train", "sentence1"]),
    "empty jsonl": (replaced("train.jsonl", b""), ["rte", "train"]),
    "empty csv": (replaced("train.csv", b""), ["train.csv", "not readable as csv"]),
    "header alone": (
        replaced("train.csv", b"sentence1,sentence2,label\n"),
        ["rte train", "holds no examples"],
    ),
    "label text in a csv": (
        replaced("train.csv", b"sentence1,sentence2,label\na,b,0\nc,d,entailment\n"),
        ["rte train", "row 1", "'label'", "'entailment'"],
    ),
    "broken csv": (
        replaced("train.csv", b'sentence1,sentence2,label\na,b,1\nc,"d,1\n'),
        ["train.csv", "not readable as csv"],
    ),
    "too many fields in a csv": (
        replaced("train.csv", b"sentence1,sentence2,label\na,b,1\nc,d,e,1\n"),
        ["train.csv", "not readable as csv"],
    ),
    "a field more in every row": (
        replaced("train.csv", b"sentence1,sentence2,label\na,b,c,1\nd,e,f,1\n"),
        ["train.csv", "not readable as csv", "Length of header"],
    ),
    "too few fields in a csv": (
        replaced("train.csv", b"sentence1,sentence2,label\na,b,1\nc,1\n"),
        ["rte train", "row 1"],
    ),
    "not utf-8": (
        replaced("train.csv", b"sentence1,sentence2,label\n\xff\xfe,b,1\n"),
        ["train.csv", "not readable as csv"],
    ),
    "broken jsonl": (replaced("train.jsonl", b'{"label": 1\n'), ["train.jsonl", "not readable"]),
    "broken parquet": (
        replaced("train.parquet", b"PAR1nothing"),
        ["train.parquet", "not readable"],
    ),
    "broken folder": (broken_save_to_disk, ["rte", "save_to_disk", "again"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data(refuse, train_argv, tiny_data, tmp_path, case):
    damage, words = BAD_DATA[case]
    data = shutil.copytree(tiny_data, tmp_path / "data")
    damage(data)
    refuse("train_glue.py", [*train_argv, "--data-dir", str(data)], words)


# -- no hub ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_cached(tmp_path_factory, monkeypatch):
    """Neither hub nor cache, wherever the tests run."""
    import datasets
    import huggingface_hub.constants

    empty = tmp_path_factory.mktemp("hub")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(empty))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", empty)


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize("backbone", ["roberta-large", "llama3-8b", "some/model", "./no/model"])
def test_no_hub_for_the_model(refuse, tiny_data, backbone):
    argv = ["--backbone", backbone, "--data-dir", str(tiny_data)]
    refuse("train_glue.py", argv, ["--backbone", "--backbone minilm"])


@pytest.mark.usefixtures("nothing_cached")
def test_no_hub_for_the_data(refuse, tiny):
    words = ["nyu-mll/glue", "mrpc", "--data-dir DIR", "--data-dir mini-glue"]
    refuse("train_glue.py", ["--backbone", str(tiny["roberta"])], words)


@pytest.mark.parametrize(
    "flags, source", [("", "nyu-mll/glue rte"), ("--data-dir data", "data/rte")]
)
def test_no_datasets_for_what_needs_it(refuse, tiny, tmp_path, monkeypatch, flags, source):
    (tmp_path / "data" / "rte").mkdir(parents=True)
    broken_save_to_disk(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    argv = ["--backbone", str(tiny["roberta"]), "--tasks", "rte", *flags.split()]
    refuse("train_glue.py", argv, [f"{source}: ", "; pip install datasets"])


# -- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """{task: run directory} of two quick runs."""
    config = TrainConfig(
        backbone=str(tiny["roberta"]),
        tasks=["rte", "sst2"],
        data_dir=str(tiny_data),
        output_dir=str(tmp_path_factory.mktemp("trained")),
        rank=2,
        epochs=1,
    )
    train(config)
    return {task: run_dir(config, task) for task in config.tasks}


@pytest.fixture
def runs(trained, tmp_path) -> dict[str, Path]:
    """Copies of them, to be damaged, and models.json, which names them."""
    copies = {task: shutil.copytree(path, tmp_path / task) for task, path in trained.items()}
    (tmp_path / "models.json").write_text(json.dumps({k: str(v) for k, v in copies.items()}))
    return copies


MERGE = ["--load-model-path", "models.json", "--hparams", str(ROOT / "hparams/merge.json")]
MERGE += ["--output-dir", "out"]


def edit_json(name: str, **values: object):
    def damage(run: Path) -> None:
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**content, **values}))

    return damage


def edit_tensors(change):
    """`change` a {name: tensor}, in place, of the adapter's weights."""

    def damage(run: Path) -> None:
        tensors = load_file(run / WEIGHTS)
        change(tensors)
        save_file(tensors, run / WEIGHTS)

    return damage


def first_key(tensors: dict, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def with_value(value: float, part: str):
    def change(tensors: dict) -> None:
        tensors[first_key(tensors, part)].view(-1)[0] = value

    return edit_tensors(change)


@edit_tensors
def without_head(tensors: dict) -> None:
    for name in [name for name in tensors if "classifier" in name]:
        del tensors[name]


@edit_tensors
def without_a_module(tensors: dict) -> None:
    for name in [name for name in tensors if "layer.0" in name and "query" in name]:
        del tensors[name]


@edit_tensors
def wider_output(tensors: dict) -> None:
    name = first_key(tensors, "lora_B")
    tensors[name] = torch.ones(40, tensors[name].shape[1])


def truncated(name: str):
    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return damage


# Those of runs; test_malformed has what can be wrong with any adapter.
BAD_CHECKPOINTS = {
    "other base": (
        edit_json("args.json", body_fingerprint="0123456789abcdef"),
        ["'rte'", "'sst2'", "different base models", "one base"],
    ),
    "no head": (without_head, ["sst2", "no trained head", "modules_to_save", "--no-eval"]),
    "truncated args": (truncated("args.json"), ["sst2/args.json", "broken JSON"]),
    "args is a list": (lambda run: (run / "args.json").write_text("[]"), ["sst2/args.json"]),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_checkpoint(refuse, runs, case):
    damage, words = BAD_CHECKPOINTS[case]
    damage(runs["sst2"])
    refuse("merge.py", MERGE, words)


BAD_MERGE_FLAGS = {
    "--methods ties best": ["--methods", "'best'", "average"],
    "--scale nan": ["scale", "nan", "finite"],
    "--density 0": ["density", "0.0", "(0, 1]"],
    "--density 1.5": ["density", "1.5", "(0, 1]"],
    "--density nan --scale inf": ["density", "scale"],
    "--max-test-samples 0": ["--max-test-samples 0"],
    "--per-device-eval-bsz 0": ["--per-device-eval-bsz 0"],
    "--hparams no.json": ["--hparams no.json", "No such file"],
    "--data-dir nowhere": ["--data-dir nowhere", "rte"],
    "--backbone no/model": ["--backbone", "no/model", "minilm"],
}


@pytest.mark.parametrize("flags", BAD_MERGE_FLAGS)
def test_flags_of_merge(refuse, runs, flags):
    refuse("merge.py", [*MERGE, *flags.split()], BAD_MERGE_FLAGS[flags])


BAD_HPARAMS = {
    "{": ["broken JSON"],
    "[]": ["{method: {knob: value}}"],
    "{}": ["method"],
    '{"ties": 0.2}': ["{method: {knob: value}}"],
    '{"tiess": {}}': ["'tiess'", "ties"],
    '{"ties": {"densty": 0.2}}': ["'ties'", "'densty'", "density"],
    '{"ties": {"density": "0.2"}}': ["'ties'", "density", "'0.2'"],
    '{"ties": {"density": true}}': ["'ties'", "density", "True"],
    '{"ties": {"density": 0}, "best": {}}': ["'ties'", "density", "'best'"],
    '{"task_arithmetic": {"scale": NaN}}': ["'task_arithmetic'", "scale", "nan"],
    '{"average": {"scale": 1.0}}': ["'average'", "'scale'"],
}


@pytest.mark.parametrize("text", BAD_HPARAMS)
def test_hparams_of_merge(refuse, runs, tmp_path, text):
    (tmp_path / "merge.json").write_text(text)
    refuse(
        "merge.py",
        [*MERGE, "--hparams", "merge.json"],
        ["--hparams merge.json", *BAD_HPARAMS[text]],
    )


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "", ".hidden", "a b"])
def test_task_names_do_not_become_paths(refuse, runs, tmp_path, name):
    (tmp_path / "models.json").write_text(json.dumps({name: str(runs["rte"])}))
    refuse("merge.py", [*MERGE, "--no-eval"], ["models.json", repr(name), "letters"])


def test_foreign_tasks_cannot_be_evaluated(refuse, runs, tmp_path):
    (tmp_path / "models.json").write_text(json.dumps({"boolq": str(runs["rte"])}))
    refuse("merge.py", MERGE, ["models.json", "boolq", "mnli"])


def test_run_of_another_task(refuse, runs, tmp_path):
    (tmp_path / "models.json").write_text(json.dumps({"sst2": str(runs["rte"])}))
    refuse("merge.py", MERGE, ["rte", "listed as 'sst2'"])


def test_head_of_another_task(refuse, runs, tmp_path):
    (tmp_path / "models.json").write_text(json.dumps({"stsb": str(runs["rte"])}))
    (runs["rte"] / "args.json").unlink()
    refuse("merge.py", MERGE, ["rte", "2 outputs", "stsb needs 1"])


def test_base_of_another_family(refuse, runs, tiny):
    argv = [*MERGE, "--backbone", str(tiny["distilbert"])]
    refuse("merge.py", argv, ["--backbone", "rte", "query"])


def test_data_of_the_second_task_is_checked_before_the_first_is_scored(
    refuse, runs, tiny_data, tmp_path
):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "sst2" / "validation.jsonl").unlink()
    refuse("merge.py", [*MERGE, "--data-dir", str(data)], ["sst2", "no split 'validation'"])


@pytest.mark.parametrize(
    "damage, flags, words",
    [
        (with_value(float("nan"), "lora_A"), "", ["sst2", WEIGHTS, "NaN"]),
        (truncated(WEIGHTS), "", ["sst2", WEIGHTS, "not readable"]),
        (wider_output, "", ["sst2", "layer.0", "(40, 32)"]),
        (without_head, "", ["sst2", "head"]),
        (without_a_module, "", ["sst2", "--block", "layer.0"]),
        (lambda run: None, "--block q", ["--block", "value"]),
    ],
    ids=["NaN", "truncated", "shape", "no head", "module", "block"],
)
def test_checkpoint_to_transform(refuse, runs, train_argv, damage, flags, words):
    """The second task's checkpoint is looked at before the first one's features are taken."""
    damage(runs["sst2"])
    argv = [*train_argv, "--init", "analytical", "--load-model-path", "models.json"]
    refuse("train_glue.py", [*argv, *flags.split()], words)


# -- what is there already ---------------------------------------------------------------------


def test_existing_run(refuse, trained, train_argv, tmp_path):
    shutil.copytree(trained["sst2"].parent.parent, tmp_path / "old")
    words = ["old/rte", "exists already", "--resume", "--output-dir"]
    refuse("train_glue.py", [*train_argv, "--output-dir", "old"], words)


def test_existing_merge(refuse, runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    refuse("merge.py", MERGE, ["--output-dir out", "exists", "--overwrite"])


def test_overwrite_replaces_merges_alone(refuse, runs, tmp_path):
    """`--output-dir ~ --overwrite` must not empty the home directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    refuse("merge.py", [*MERGE, "--overwrite", "--no-eval"], ["--output-dir out"])


@pytest.mark.parametrize("script", ["train_glue.py", "merge.py"])
def test_output_below_a_file(refuse, runs, train_argv, tmp_path, script):
    (tmp_path / "file").write_text("")
    argv = train_argv if script == "train_glue.py" else [*MERGE, "--no-eval"]
    refuse(script, [*argv, "--output-dir", "file/out"], ["--output-dir file/out"])


def test_resumed_with_other_settings(refuse, trained, train_argv, tmp_path):
    shutil.copytree(trained["sst2"].parent.parent, tmp_path / "old")
    for path in (tmp_path / "old").glob("sst2/*/metrics.json"):
        path.unlink()
    argv = [*train_argv, "--output-dir", "old", "--resume", "--epochs", "3", "--tasks", "sst2"]
    refuse("train_glue.py", argv, ["args.json", "epochs was 1, is 3"])


# -- dense checkpoints -------------------------------------------------------------------------


@pytest.fixture
def dense(tiny, tmp_path):
    """`dense(edit)`: a dense checkpoint whose tensors were edited; models.json names it."""

    def save(edit) -> Path:
        folder = tmp_path / "dense"
        model = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=2)
        edit(model.state_dict())
        model.save_pretrained(folder)
        (tmp_path / "models.json").write_text(json.dumps({"rte": str(folder)}))
        return folder

    return save


QUERY = "roberta.encoder.layer.1.attention.self.query.weight"
NORM = "roberta.encoder.layer.0.output.LayerNorm.weight"


@pytest.mark.parametrize(
    "name, value, words",
    [
        (NORM, 2.0, ["dense", "LayerNorm", "no linear layer's weight"]),
        (QUERY.replace("weight", "bias"), 2.0, ["dense", "query.bias", "no linear layer's weight"]),
        (QUERY, float("nan"), ["dense", QUERY, "NaN"]),
    ],
)
def test_dense_checkpoint(refuse, dense, tiny, name, value, words):
    dense(lambda tensors: tensors[name].fill_(value))
    refuse("merge.py", [*MERGE, "--backbone", str(tiny["roberta"])], words)


def test_dense_checkpoint_that_nothing_names_the_base_of(refuse, dense):
    dense(lambda tensors: tensors[QUERY].add_(1))
    refuse("merge.py", MERGE, ["models.json", "args.json", "--backbone"])


def test_dense_checkpoint_of_another_backbone(refuse, dense, tiny):
    dense(lambda tensors: tensors[QUERY].add_(1))
    argv = [*MERGE, "--backbone", str(tiny["mpnet"])]
    refuse("merge.py", argv, ["dense", "lacks", "another backbone"])


def test_truncated_dense_checkpoint(refuse, dense, tiny):
    truncated("model.safetensors")(dense(lambda tensors: tensors[QUERY].add_(1)))
    argv = [*MERGE, "--backbone", str(tiny["roberta"])]
    refuse("merge.py", argv, ["dense/model.safetensors", "not readable"])


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 1}}'])
def test_index_of_shards(refuse, dense, tiny, index):
    folder = dense(lambda tensors: tensors[QUERY].add_(1))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    argv = [*MERGE, "--backbone", str(tiny["roberta"])]
    refuse("merge.py", argv, ["model.safetensors.index.json", "weight_map"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_one_line(error, capsys):
    def main():
        raise error

    assert run_script(main) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "the disk is full; free some space" in printed


def test_a_bug_is_no_bad_input():
    def main():
        raise OSError(errno.EACCES, "a bug")

    with pytest.raises(OSError, match="a bug"):
        run_script(main)
