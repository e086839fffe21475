"""Tiny random models and tiny data; real ones come from the cache of the embedded set."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.util import find_spec

from jaxtyping import install_import_hook

# Every shape that these files' annotations promise is checked in the tests, if beartype is there.
NUMBERS = (
    "alignment",
    "moments",
    "subspace",
    "starts",
    "merging",
    "task_vectors",
    "features",
    "bank",
    "adapters",
    "lending",
    "interference",
)
if find_spec("beartype"):
    install_import_hook([f"osrm.{name}" for name in NUMBERS], "beartype.beartype")

import gc
import json
import logging
import multiprocessing
import random
import re
import runpy
import signal
import socket
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from osrm.adapters import read_adapter
from osrm.commands.merge import run as merge
from osrm.config import MergeConfig, TrainConfig
from osrm.errors import run_script
from osrm.glue import TASKS

ROOT = Path(__file__).parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


def pytest_collection_finish() -> None:
    """What is imported stays, so that the Trainer's full collections need not look at it.

    Each of them would take a third of a second, half of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)

TEXT = "a the no is was not good bad dog cat runs sleeps sees film very old new man woman"
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
COMMON = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
CONFIGS = {
    "roberta": RobertaConfig(**COMMON, **BERT_LIKE),
    "bert": BertConfig(**COMMON, **BERT_LIKE),
    "mpnet": MPNetConfig(**COMMON, **BERT_LIKE),
    "distilbert": DistilBertConfig(
        **COMMON, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=66
    ),
    "t5": T5Config(
        **COMMON, d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64, decoder_start_token_id=0
    ),
    "llama": LlamaConfig(
        **{**COMMON, "pad_token_id": None},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    ),
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words to ids; with an end token as each family has it; Llama's has no padding token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = {
        "t5": ("$A </s>", "$A </s> $B </s>"),
        "llama": ("<s> $A", "<s> $A $B"),
    }.get(family, ("<s> $A </s>", "<s> $A </s> </s> $B </s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    padding = {} if family == "llama" else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        **padding,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """{family: directory of a tiny random pre-trained body with its tokenizer}."""
    return {
        family: make_tiny(family, tmp_path_factory.mktemp(family) / f"tiny-{family}")
        for family in CONFIGS
    }


def make_tiny(family: str, directory: Path, **options: object) -> Path:
    """A tiny random pre-trained body with its tokenizer; `options` of its config."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | options)
    AutoModel.from_config(config).save_pretrained(directory)
    make_tokenizer(family).save_pretrained(directory)
    return directory


def make_examples(task: str, count: int, seed: int) -> list[dict]:
    """Examples with GLUE's columns; the label is whether "good" occurs, so it can be learnt."""
    generator = random.Random(f"{task}/{seed}")
    row = TASKS[task]
    examples = []
    for idx in range(count):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(2, 8))) for _ in row.fields]
        good = any("good" in text.split() for text in texts)
        label = int(good) if row.labels else 5.0 * good
        examples.append({**dict(zip(row.fields, texts)), "label": label, "idx": idx})
    return examples


def write_data(folder: Path, tasks: list[str], **splits: int) -> Path:
    """A --data-dir of made-up examples: {split: how many}."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, count in splits.items():
            lines = [json.dumps(each) for each in make_examples(task, count, seed=len(split))]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A --data-dir with three small tasks."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, ["rte", "sst2", "stsb"], train=60, validation=24)


@pytest.fixture(autouse=True)
def own_feature_cache(request, monkeypatch, tmp_path_factory):
    """Features are cached in a fresh place; the embedded model and data stay where they are."""
    from osrm import bank

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(bank, "cache_dir", lambda: folder)
    return folder


def small(tiny: dict, data: Path, out: Path, family: str = "roberta", **more) -> TrainConfig:
    """A run of seconds on a tiny random model."""
    return TrainConfig(
        **{
            "backbone": str(tiny[family]),
            "data_dir": str(data),
            "output_dir": str(out),
            "tasks": ["rte", "sst2"],
            "rank": 2,
            "alpha": 4,
            "epochs": 2,
            "lr": 1e-2,
            "per_device_train_bsz": 16,
            **more,
        }
    )


def updates_and_head(directory: Path) -> tuple[dict, dict]:
    adapter = read_adapter(directory)
    return adapter.updates, adapter.head


def make_adapter(base: Path, folder: Path, labels: int, seed: int, **options) -> str:
    """By PEFT alone: random factors and head; the second layer's query stays as it is."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )
    config = LoraConfig(task_type="SEQ_CLS", **{"modules_to_save": ["classifier"], **options})
    model = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
        if "lora_B" in name and "layer.1.attention.self.query" in name:
            parameter.data.zero_()
    model.save_pretrained(folder)
    return str(folder)


def merge_them(paths: dict, folder: Path, name: str = "out", **options) -> Path:
    """merge.py on checkpoints {task: path}: its output directory, of that name in the folder."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({task: str(path) for task, path in paths.items()}))
    merge(MergeConfig(load_model_path=str(file), output_dir=str(folder / name), **options))
    return folder / name


def written(directory: Path) -> dict[str, bytes]:
    """What a merge has stored of one method."""
    files = [*(directory / "updates").iterdir(), *(directory / "heads").iterdir()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.conftest", "osrm.commands.train", "osrm.commands.merge"])


class Forked:
    """`python script arguments`, without the seconds that its imports take.

    Each process is the fork of one that has imported everything and done nothing. Several are
    given what torchrun gives to its processes.
    """

    def __init__(
        self, folder: Path, script: str | Path, *arguments: object, count: int = 1, **environ: str
    ) -> None:
        """Start; what the processes print goes to a file in `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self.output.write_text("")
        words = [str(ROOT / script), *map(str, arguments)]
        if count > 1:
            environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environ["MASTER_PORT"] = str(free.getsockname()[1])
        self.processes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            for rank in map(str, range(count)):
                own = {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
                target = partial(run_forked, words, self.output, environ | own)
                process = FORKS.Process(target=target)
                process.start()
                self.processes.append(process)

    def wait(self, seconds: float = 900) -> tuple[int, str]:
        """The exit code that is furthest from 0, and what all have printed.

        When one fails, the others have ten seconds left.
        """
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            time.sleep(0.02)
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + 10)
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
        code = max((process.exitcode for process in self.processes), key=abs)
        return code, self.output.read_text(errors="replace")

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send_signal(self, number: int) -> None:
        """As the launcher does: to all of them."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


def run_forked(words: list[str], output: Path, environ: dict[str, str]) -> None:
    """Be the script that the first word names."""
    with output.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    gc.freeze()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.path.insert(0, str(Path(words[0]).parent))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All files and directories below, and what is in them."""
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def no_forward(*_: object) -> None:
    raise AssertionError("bad input was found only after a model had begun to work")


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd, request):
    """`refuse(script, argv, words)`: run it in `tmp_path`; it must refuse, as the title says."""

    verbosity = transformers.logging.get_verbosity()

    def refuse(script: str, argv: list[str], words: list[str]) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *argv])
        monkeypatch.setattr(torch.nn.Linear, "forward", no_forward)
        # As the script itself asks for, but here transformers has been imported long ago.
        request.addfinalizer(partial(transformers.logging.set_verbosity, verbosity))
        transformers.logging.set_verbosity_error()
        # Progress goes to stderr as it does outside of pytest, which has handlers of its own.
        monkeypatch.setattr(logging.root, "handlers", [])
        before = snapshot(tmp_path)
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)
            code = run_script(runpy.run_path(str(ROOT / script))["main"])
        out, err = capfd.readouterr()
        err = re.sub(r"\rLoading weights: [^\r\n]*", "", err).lstrip()
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert not warned, [str(each.message) for each in warned]
        assert err.startswith(f"{script}: error: "), err
        missing = [word for word in words if word not in err]
        assert not missing, f"{missing} not in: {err}"
        assert out == "" and "Traceback" not in err
        assert snapshot(tmp_path) == before, "it wrote something"

    return refuse
