"""The release's flags, defaults, commands, directory names and tables, as it published them."""

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from osrm import checks
from osrm.checks import per_task, read_json
from osrm.config import MergeConfig, TrainConfig
from osrm.errors import UserError
from osrm.flags import parse
from osrm.glue import TASKS
from osrm.runs import run_dir, run_name
from osrm.seeds import derive_seed

ROOT = Path(__file__).parent.parent

FLAGS = {
    "--seed": 42,
    "--backbone": "roberta-large",
    "--epochs": 10,
    "--load-epochs": None,
    "--max-train-samples": 105000,
    "--max-eval-samples": 15000,
    "--max-test-samples": -1,
    "--per-device-train-bsz": 64,
    "--per-device-eval-bsz": 64,
    "--grad-accumlate-steps": 1,
    "--lr": 4e-4,
    "--load-lrs": None,
    "--weight-decay": 0.0,
    "--warmup-ratio": 0.06,
    "--lr-scheduler": "linear",
    "--max-seq-len": 128,
    "--gradient-checkpoint": False,
    "--not-load-best-model-at-end": False,
    "--max-num-samples": 100,
    "--alpha": 16,
    "--rank": 8,
    "--init": "gaussian",
    "--freeze": "N",
    "--block": "qv",
    "--load-model-path": None,
}
OTHER_VALUES = {
    "--backbone": [
        "t5-large",
        "llama3.2-1b",
        "llama3.2-3b",
        "llama3-8b",
        "minilm",
        "mpnet",
        "smollm2",
    ],
    "--load-epochs": ["epochs.json"],
    "--load-lrs": ["lrs.json"],
    "--lr-scheduler": ["constant", "constant_with_warmup"],
    "--init": ["analytical"],
    "--freeze": ["A", "B"],
    "--block": ["q", "k", "v", "qk", "kv", "qkv"],
    "--load-model-path": ["models.json"],
    "--max-num-samples": ["-1", "0", "7"],
    "--max-train-samples": ["-1", "7"],
    "--max-eval-samples": ["-1", "7"],
    "--max-test-samples": ["7"],
    "--lr": ["2e-4", "1"],
    "--weight-decay": ["0.1"],
    "--warmup-ratio": ["0", "0.5"],
    "--max-seq-len": ["64", "512"],
}
COMMANDS = """
--backbone roberta-large --init analytical --freeze N --block qv
--backbone roberta-large --init {gaussian,analytical} --freeze N --block qv --lr 4e-4 \
--gradient-checkpoint
--backbone llama3-8b --init {gaussian,analytical} --freeze N --block qv \
--load-epochs ./hparams/epoch_1.json --gradient-checkpoint
--init gaussian --freeze N --block qv --load-lrs ./hparams/lr_qkv.json \
--load-epochs ./hparams/epoch_qkv.json --gradient-checkpoint
--init analytical --freeze N --block qv --lr 4e-4 --load-epochs ./hparams/epoch_qkv.json \
--gradient-checkpoint
--backbone roberta-large --init analytical --freeze N --block qv \
--load-model-path ./load_model_path.json
""".strip().splitlines()
HPARAMS = {
    "epoch_1": {
        "mrpc": 5, "qnli": 2, "qqp": 2, "rte": 5, "sst2": 2, "mnli": 5, "cola": 5, "stsb": 5
    },
    "epoch_qkv": {
        "cola": 20, "sst2": 10, "mrpc": 20, "qqp": 10, "qnli": 10, "rte": 20, "mnli": 10, "stsb": 20
    },
    "lr_qkv": {
        "mrpc": 4e-4, "qnli": 4e-4, "qqp": 4e-4, "rte": 2e-4, "sst2": 4e-4, "mnli": 4e-4,
        "cola": 4e-4, "stsb": 4e-4,
    },
}  # fmt: skip


def parse_train(text: str = "") -> TrainConfig:
    return parse(TrainConfig, None, shlex.split(text))


def expand_braces(text: str) -> list[str]:
    """As the shell does with {gaussian,analytical}."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


# -- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", FLAGS)
def test_defaults_of_the_release(flag):
    default = getattr(parse_train(), flag[2:].replace("-", "_"))
    assert (default, type(default)) == (FLAGS[flag], type(FLAGS[flag]))


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_takes_its_values(flag):
    name, default = flag[2:].replace("-", "_"), FLAGS[flag]
    if isinstance(default, bool):
        assert getattr(parse_train(flag), name) is True
        return
    for value in OTHER_VALUES.get(flag, ["3"]):
        found = getattr(parse_train(f"{flag} {value}"), name)
        assert found == (value if default is None else type(default)(value))
        assert default is None or type(found) is type(default)


def test_no_flags_mean_the_defaults():
    assert parse_train() == TrainConfig()
    assert parse(MergeConfig, None, []) == MergeConfig()


@pytest.mark.parametrize("spelling", ["--grad-accumlate-steps", "--grad-accumulate-steps"])
def test_both_spellings_of_accumulate(spelling):
    assert parse_train(f"{spelling} 4").grad_accumlate_steps == 4


@pytest.mark.parametrize(
    "command", [each for line in COMMANDS for each in expand_braces(line)], ids=str.strip
)
def test_commands_of_the_release(command, monkeypatch):
    """They parse, and the tables that they name are there, checks.whole, and of the right type."""
    monkeypatch.chdir(ROOT)
    config = parse_train(command)
    assert (config.freeze, config.block, config.rank) == ("N", "qv", 8)
    for path, field, check in [
        (config.load_epochs, "--load-epochs", checks.whole(1)),
        (config.load_lrs, "--load-lrs", checks.number(0, low_open=True)),
        (config.load_model_path, "--load-model-path", checks.nonempty),
    ]:
        assert path is None or len(per_task(path, field, TASKS, check)) == 8


def test_commands_are_as_many_as_the_release_has():
    assert len(COMMANDS) == 6 and sum(len(expand_braces(line)) for line in COMMANDS) == 8


def test_lists_of_tasks_and_methods():
    assert parse_train("--tasks rte mrpc --other-tasks cola").tasks == ["rte", "mrpc"]
    config = parse(MergeConfig, None, ["--methods", "ties", "emr", "--scale", "0.3"])
    assert (config.methods, config.scale, config.density) == (["ties", "emr"], 0.3, None)


@pytest.mark.parametrize("cls", [TrainConfig, MergeConfig])
def test_every_flag_says_what_it_does(cls):
    for each in dataclasses.fields(cls):
        assert len(each.metadata["options"]["help"]) > 10, each.name


@pytest.mark.parametrize("script", ["train_glue.py", "merge.py"])
def test_help_does_not_wait_for_torch(script):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert "--load-model-path" in result.stdout
    assert "osrm.config" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "numpy"}


# -- names and tables of the release -----------------------------------------------------------


@pytest.mark.parametrize(
    "command, name",
    [
        ("", "roberta-large-r8-a16-gaussian-fixN-qv-wd0.0-seq128"),
        ("--init analytical", "roberta-large-r8-a16-analytical-fixN-qv-wd0.0-seq128-100"),
        (
            "--init analytical --max-num-samples -1",
            "roberta-large-r8-a16-analytical-fixN-qv-wd0.0-seq128-full",
        ),
        (
            "--init analytical --max-num-samples 0 --rank 4 --alpha 32 --freeze A",
            "roberta-large-r4-a32-analytical-fixA-qv-wd0.0-seq128-full",
        ),
        (
            "--backbone llama3-8b --block qkv --weight-decay 0.01 --max-seq-len 64",
            "llama3-8b-r8-a16-gaussian-fixN-qkv-wd0.01-seq64",
        ),
        ("--backbone some/where/mine", "mine-r8-a16-gaussian-fixN-qv-wd0.0-seq128"),
        *(
            (f"--init {init}", f"roberta-large-r8-a16-{init}-fixN-qv-wd0.0-seq128")
            for init in ("kaiming", "orthogonal")
        ),
        *(
            (flags, f"roberta-large-r8-a16-{ending}")
            for flags, ending in {
                "--init contrastive": "contrastive-fixN-qv-wd0.0-seq128-100",
                "--init contrastive --epsilon 0.5": "contrastive-fixN-qv-wd0.0-seq128-100-eps0.5",
                "--init analytical --features sample --count-padding --norm-match 2": (
                    "analytical-fixN-qv-wd0.0-seq128-100-sample-padding-norm2"
                ),
                "--norm-match 0.577": "gaussian-fixN-qv-wd0.0-seq128-norm0.577",
                # What no run depends on, or not this one.
                "--features mean --count-padding": "gaussian-fixN-qv-wd0.0-seq128",
                "--init analytical --feature-bank b": "analytical-fixN-qv-wd0.0-seq128-100",
            }.items()
        ),
    ],
)
def test_run_names(command, name):
    config = parse_train(command)
    assert run_name(config) == name
    assert run_dir(config, "rte") == Path(".save_dir/rte", name)


def test_runs_of_different_settings_of_a_start_have_different_names():
    settings = {
        "init": ["contrastive", "analytical"],
        "epsilon": [1e-2, 1e-3],
        "norm_match": [None, 1.0, 2.0],
        "features": ["token", "sample", "mean"],
        "count_padding": [False, True],
        "max_num_samples": [100, -1],
    }
    grid = [dict(zip(settings, values)) for values in itertools.product(*settings.values())]
    assert len({run_name(TrainConfig(**each)) for each in grid}) == len(grid)


def test_load_model_path_names_the_runs_of_the_first_command():
    config = parse_train(COMMANDS[0])
    table = json.loads((ROOT / "load_model_path.json").read_text())
    assert list(table) == ["mrpc", "qnli", "qqp", "rte", "sst2", "mnli", "cola", "stsb"]
    for task, directory in table.items():
        assert Path(directory) == run_dir(config, task) / "merged_model"


@pytest.mark.parametrize("name", HPARAMS)
def test_hparams_of_the_release(name):
    assert json.loads((ROOT / "hparams" / f"{name}.json").read_text()) == HPARAMS[name]


# -- seeds -------------------------------------------------------------------------------------


def test_seeds_are_stable():
    """Runs of tomorrow draw what runs of today drew."""
    by_hand = int.from_bytes(hashlib.sha256(b"42/rte/lora").digest()[:4], "big")
    assert derive_seed(42, "rte", "lora") == by_hand == 1093871245


def test_every_task_and_purpose_has_its_own_seed():
    purposes = list(itertools.product((0, 1, 42), TASKS, ("head", "lora", "training", "A")))
    seeds = {derive_seed(seed, *purpose) for seed, *purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**32 for seed in seeds)


# -- tables of the user ------------------------------------------------------------------------


def test_table_may_hold_more_tasks_and_whole_rates(tmp_path):
    path = tmp_path / "lrs.json"
    path.write_text('{"rte": 1, "cola": 2e-4, "else": "never looked at"}')
    found = per_task(path, "--load-lrs", ["cola", "rte"], checks.number())
    assert found == {"cola": 2e-4, "rte": 1}


def test_table_names_every_problem_at_once(tmp_path):
    path = tmp_path / "epochs.json"
    path.write_text('{"rte": "3", "cola": 0}')
    with pytest.raises(UserError) as caught:
        per_task(path, "--load-epochs", ["rte", "cola", "mrpc"], checks.whole(1))
    for words in ("--load-epochs", str(path), "rte: expected", "cola: expected", "'mrpc'"):
        assert words in str(caught.value)


def test_a_key_that_occurs_twice_is_found_among_many(tmp_path):
    """In seconds: comparing each with each would take an hour."""
    keys = [*map(str, range(200_000)), "7"]
    (tmp_path / "many.json").write_text("{" + ", ".join(f'"{key}": 1' for key in keys) + "}")
    with pytest.raises(UserError, match="'7' occurs twice"):
        read_json(tmp_path / "many.json", "--load-epochs")


VALUES = [0, 1, -1, 0.5, 1.0, 2**63, 10**400, float("nan"), float("inf"), -float("inf")]
VALUES += [True, False, None, "", "1", [], [1], {}]
CHECKS = {
    "a finite number": (checks.number(), VALUES[:6]),
    "a finite number above 0": (checks.number(0, low_open=True), [1, 0.5, 1.0, 2**63]),
    "a number in (0, 1]": (checks.number(0, 1, low_open=True), [1, 0.5, 1.0]),
    "a number in [0, 1)": (checks.number(0, 1, high_open=True), [0, 0.5]),
    "a whole number of at least 0, below 2^63": (checks.whole(0), [0, 1]),
    "text": (checks.text, ["", "1"]),
    "text that is not empty": (checks.nonempty, ["1"]),
    "true or false": (checks.flag, [True, False]),
    "one of 1, None": (checks.one_of(1, None), [1, None]),
    "a list, each a finite number": (checks.list_of(checks.number()), [[], [1]]),
    "text or null": (checks.optional(checks.text), [None, "", "1"]),
}


@pytest.mark.parametrize("words", CHECKS)
def test_a_check_lets_through_what_its_words_say(words):
    check, good = CHECKS[words]
    assert check.words == words
    found = [value for value in VALUES if not checks.problems({"x": value}, {"x": check})]
    assert repr(found) == repr(good)
    assert checks.problems({}, {"x": check}) == []
