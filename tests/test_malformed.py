"""Adapter directories of all kinds of damage: one line names the file, the field and the fix."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from osrm.adapters import add_lora, save_adapter
from osrm.backbones import projections
from osrm.commands.merge import run
from osrm.config import MergeConfig
from osrm.errors import UserError
from tests.conftest import ROOT

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "base_model.model.roberta.encoder.layer.0.attention.self.query"
A, B, BIAS = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", f"{QUERY}.lora_B.bias"
HEAD = "base_model.model.classifier.dense.weight"
MERGE = ["--load-model-path", "models.json", "--hparams", str(ROOT / "hparams/merge.json")]
MERGE += ["--output-dir", "out"]

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> Path:
    """An adapter that PEFT wrote, with a head of two classes."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny["roberta"], num_labels=2)
    model = add_lora(base, projections(base, "qv", 2), rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("good") / "adapter"
    save_adapter(model, folder)
    return folder


@pytest.fixture
def second(good, tmp_path) -> Path:
    """One of two copies of it, which models.json lists; to be damaged."""
    for name in ("first", "second"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "models.json").write_text('{"rte": "first", "sst2": "second"}')
    return tmp_path / "second"


# -- kinds of damage ---------------------------------------------------------------------------


def option(**values: object) -> Damage:
    """Other values of adapter_config.json."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **values}))

    return damage


def without_option(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        del content[name]
        (folder / CONFIG).write_text(json.dumps(content))

    return damage


def tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor) -> Damage:
    """Another value of one tensor; a new one if there is no such key."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        found[key] = change if isinstance(change, torch.Tensor) else change(found[key])
        save_file(found, folder / WEIGHTS)

    return damage


def without_tensors(part: str) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file({key: found[key] for key in found if part not in key}, folder / WEIGHTS)

    return damage


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def content(name: str, value: str | bytes) -> Damage:
    """Other bytes in a file."""
    return lambda folder: (folder / name).write_bytes(
        value.encode() if isinstance(value, str) else value
    )


def cut(name: str, length: int) -> Damage:
    """The first bytes of a file alone; a negative length leaves out the last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def header(size: int | None = None, **entry: object) -> Damage:
    """A safetensors file of four bytes of data, whose header says of A what `entry` says."""
    text = json.dumps({A: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}})
    return content(WEIGHTS, struct.pack("<Q", size or len(text)) + text.encode() + b"1234")


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def link(name: str, target: str) -> Damage:
    """A symbolic link in place of a file, or of the whole directory if the name is empty."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink() if name else shutil.rmtree(path)
        path.symlink_to(target)

    return damage


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def models(text: str) -> Damage:
    """Another models.json."""
    return lambda folder: (folder.parent / "models.json").write_text(text)


def all_of(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("unpickled"),)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({A: Evil()}))


def file_in_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


# -- the table ---------------------------------------------------------------------------------

UNREADABLE = [f"second/{WEIGHTS}", "not readable", "save it again"]
NUMBERS = [f"second/{WEIGHTS}", "NaN or infinity", "train it again"]
BROKEN = [f"second/{CONFIG}", "broken JSON", "fix the file"]
FOREIGN = [f"second/{WEIGHTS}", "neither", "LoRA", "['classifier'", "merge_and_unload"]
ONLY_LORA = [f"second/{CONFIG}", "plain LoRA", "merge_and_unload"]
NO_PRODUCT = [f"second/{WEIGHTS}", "layer.0", "query", "do not multiply", "save it again"]

CASES: dict[str, tuple[Damage, list[str]]] = {
    # the file of the weights
    "no weights": (gone(WEIGHTS), [*UNREADABLE, "no such file"]),
    "weights without a byte": (content(WEIGHTS, b""), UNREADABLE),
    "weights of noise": (content(WEIGHTS, bytes(range(256))), UNREADABLE),
    "weights are text": (content(WEIGHTS, "version https://git-lfs.github.com/spec"), UNREADABLE),
    "weights cut in the header": (cut(WEIGHTS, 100), UNREADABLE),
    "weights cut at the end": (cut(WEIGHTS, -1), UNREADABLE),
    "header longer than the file": (header(size=1 << 20), UNREADABLE),
    "header longer than any file": (header(size=(1 << 64) - 1), UNREADABLE),
    "more numbers than bytes": (header(shape=[1 << 40]), UNREADABLE),
    "offsets beyond the end": (header(data_offsets=[0, 400]), UNREADABLE),
    "offsets backwards": (header(data_offsets=[4, 0]), UNREADABLE),
    "dtype of another world": (header(dtype="F77"), UNREADABLE),
    "dtype that torch has not": (header(dtype="F8_E8M0", shape=[4]), [f"second/{WEIGHTS}"]),
    "half a byte a number": (header(dtype="F4", shape=[8]), [f"second/{WEIGHTS}"]),
    "header is a list": (content(WEIGHTS, struct.pack("<Q", 2) + b"[]"), UNREADABLE),
    "weights are a directory": (directory(WEIGHTS), UNREADABLE),
    "weights are a pipe": (pipe, UNREADABLE),
    "weights link to themselves": (link(WEIGHTS, WEIGHTS), UNREADABLE),
    "weights link to nothing": (link(WEIGHTS, "blobs/gone"), UNREADABLE),
    "weights are a pickle": (
        pickled,
        ["second/adapter_model.bin", "pickle", f"save the adapter as {WEIGHTS}"],
    ),
    # the file of the configuration
    "no configuration": (gone(CONFIG), ["models.json", "'sst2'", "second", CONFIG]),
    "configuration without a byte": (content(CONFIG, ""), BROKEN),
    "configuration cut": (cut(CONFIG, 50), BROKEN),
    "configuration not JSON": (content(CONFIG, "peft_type: LORA"), BROKEN),
    "configuration not UTF-8": (content(CONFIG, b'{"peft_type": "LOR\xc4"}'), BROKEN),
    "option twice": (
        content(CONFIG, '{"peft_type": "LORA", "r": 2, "r": 4}'),
        [*BROKEN, "'r' occurs twice"],
    ),
    "configuration nested too deep": (content(CONFIG, "[" * 100_000), BROKEN),
    "number of 5000 digits": (content(CONFIG, '{"r": ' + "9" * 5000 + "}"), BROKEN),
    "configuration is a list": (content(CONFIG, "[]"), [f"second/{CONFIG}", "{option: value}"]),
    "configuration is null": (content(CONFIG, "null"), [f"second/{CONFIG}", "{option: value}"]),
    "configuration is a directory": (directory(CONFIG), [f"second/{CONFIG}", "Is a directory"]),
    "configuration links to itself": (link(CONFIG, CONFIG), ["models.json", "'sst2'", CONFIG]),
    # other kinds of adapters
    "no peft_type": (without_option("peft_type"), [*ONLY_LORA, "peft_type=None"]),
    "peft_type unknown": (option(peft_type="MAGIC"), [*ONLY_LORA, "peft_type='MAGIC'"]),
    "peft_type is a list": (option(peft_type=["LORA"]), [*ONLY_LORA, "peft_type=['LORA']"]),
    **{
        config.peft_type.value: (config.save_pretrained, [*ONLY_LORA, repr(config.peft_type.value)])
        for config in (
            AdaLoraConfig(total_step=1),
            IA3Config(),
            LoHaConfig(),
            PromptTuningConfig(),
            VeraConfig(),
        )
    },
    "DoRA": (option(use_dora=True), [*ONLY_LORA, "use_dora"]),
    "QA-LoRA": (option(use_qalora=True), [*ONLY_LORA, "use_qalora"]),
    "LoftQ": (option(init_lora_weights="loftq"), [*ONLY_LORA, "loftq", "base weights"]),
    "biases of layers without LoRA": (option(bias="all"), [*ONLY_LORA, "bias='all'"]),
    "biases outside of LoRA": (option(bias="lora_only"), [*ONLY_LORA, "bias='lora_only'"]),
    "PiSSA": (option(init_lora_weights="pissa_niter_4"), [*ONLY_LORA, "pissa", "base weights"]),
    "a variant of LoRA": (option(init_lora_weights="mica"), [*ONLY_LORA, "mica"]),
    "option of a later PEFT": (option(shear=2), [*ONLY_LORA, "shear, which PEFT", "not know"]),
    # options
    "no r": (without_option("r"), [f"second/{CONFIG}", "r: expected a whole number", "None"]),
    "r is 0": (
        option(r=0),
        [f"second/{CONFIG}", "r: expected a whole number of at least 1, below"],
    ),
    "r is 0 with rsLoRA": (option(r=0, use_rslora=True), [f"second/{CONFIG}", "r: expected"]),
    "r is negative": (option(r=-2), [f"second/{CONFIG}", "r: expected", "found -2"]),
    "r is text": (option(r="2"), [f"second/{CONFIG}", "r: expected", "found '2'"]),
    "r is true": (option(r=True), [f"second/{CONFIG}", "r: expected", "found True"]),
    "r of another adapter": (option(r=8), [f"second/{WEIGHTS}", "query", "rank 2", "r,", "says 8"]),
    "r is huge": (
        option(r=10**400),
        [f"second/{CONFIG}", "r: expected", "below 2^63", "found 100"],
    ),
    "alpha is null": (
        option(lora_alpha=None),
        [f"second/{CONFIG}", "lora_alpha", "None", "fix it"],
    ),
    "alpha is NaN": (option(lora_alpha=float("nan")), [f"second/{CONFIG}", "lora_alpha", "nan"]),
    "alpha is infinite": (option(lora_alpha=float("inf")), [f"second/{CONFIG}", "lora_alpha"]),
    "alpha is huge": (option(lora_alpha=10**400), [f"second/{CONFIG}", "lora_alpha: expected"]),
    "alpha is text": (option(lora_alpha="16"), [f"second/{CONFIG}", "lora_alpha", "'16'"]),
    "rsLoRA is text": (option(use_rslora="no"), [f"second/{CONFIG}", "use_rslora", "true or"]),
    "ranks are a list": (option(rank_pattern=[2]), [f"second/{CONFIG}", "rank_pattern", "[2]"]),
    "rank of a pattern is 0": (option(rank_pattern={"query": 0}), [CONFIG, "rank_pattern", "0}"]),
    "rank of a pattern is half": (option(rank_pattern={"query": 0.5}), [CONFIG, "rank_pattern"]),
    "ranks of another adapter": (
        option(rank_pattern={"query": 4}),
        [f"second/{WEIGHTS}", "query", "rank 2", "rank_pattern", "says 4"],
    ),
    "pattern is no regular expression": (option(rank_pattern={"(": 2}), [CONFIG, "rank_pattern"]),
    "alphas are a list": (option(alpha_pattern=["query"]), [CONFIG, "alpha_pattern", "'query'"]),
    "alpha of a pattern is text": (option(alpha_pattern={"query": "3"}), [CONFIG, "alpha_pattern"]),
    "base is a number": (
        option(base_model_name_or_path=7),
        [f"second/{CONFIG}", "base_model_name_or_path", "found 7"],
    ),
    "modules_to_save is text": (
        option(modules_to_save="classifier"),
        [f"second/{CONFIG}", "modules_to_save", "a list, each text"],
    ),
    # tensors
    "no tensors": (
        without_tensors(""),
        [f"second/{WEIGHTS}", "lora_A and lora_B", "found neither"],
    ),
    "head alone": (
        without_tensors("lora"),
        [f"second/{WEIGHTS}", "found neither", "save it again"],
    ),
    "A without B": (
        without_tensors(B),
        [f"second/{WEIGHTS}", "only one of them", "layer.0", "query"],
    ),
    "B without A": (
        without_tensors(A),
        [f"second/{WEIGHTS}", "only one of them", "layer.0", "query"],
    ),
    "A is a vector": (tensor(A, torch.ones(32)), [*NO_PRODUCT, "(32,)"]),
    "A is a number": (tensor(A, torch.tensor(1.0)), [*NO_PRODUCT, "A ()"]),
    "A of a convolution": (tensor(A, torch.ones(2, 32, 1)), [*NO_PRODUCT, "(2, 32, 1)"]),
    "B is a vector": (tensor(B, torch.ones(32)), [*NO_PRODUCT, "B (32,)"]),
    "A has another rank": (tensor(A, torch.ones(5, 32)), [*NO_PRODUCT, "(5, 32)", "(32, 2)"]),
    "B is transposed": (tensor(B, torch.ones(2, 32)), [*NO_PRODUCT, "(2, 32)"]),
    "A has no rows": (
        tensor(A, torch.ones(0, 32)),
        [f"second/{WEIGHTS}", A, "is empty", "(0, 32)"],
    ),
    "B has no rows": (tensor(B, torch.ones(0, 2)), [f"second/{WEIGHTS}", B, "is empty"]),
    "rank above both widths": (
        all_of(
            option(rank_pattern={"layer.0.attention.self.query": 33}),
            tensor(A, torch.ones(33, 32)),
            tensor(B, torch.ones(32, 33)),
        ),
        [f"second/{WEIGHTS}", "layer.0", "query", "rank 33", "32"],
    ),
    "A is int8": (tensor(A, torch.Tensor.char), [f"second/{WEIGHTS}", A, "int8", "float32"]),
    "B is bool": (tensor(B, torch.Tensor.bool), [f"second/{WEIGHTS}", B, "is bool", "bfloat16"]),
    "A is packed to bytes": (tensor(A, torch.ones(32, dtype=torch.uint8)), [A, "uint8", "float16"]),
    "A is float8": (
        tensor(A, lambda found: found.to(torch.float8_e4m3fn)),
        [f"second/{WEIGHTS}", A, "float8_e4m3fn", "save it as"],
    ),
    "A is complex": (tensor(A, lambda found: found.cfloat()), [A, "complex64", "save it as"]),
    "head is int64": (tensor(HEAD, torch.Tensor.long), [f"second/{WEIGHTS}", HEAD, "int64"]),
    "NaN in A": (tensor(A, with_entry(float("nan"))), [*NUMBERS, A]),
    "infinity in A": (tensor(A, with_entry(float("inf"))), [*NUMBERS, A]),
    "infinity below in B": (tensor(B, with_entry(float("-inf"))), [*NUMBERS, B]),
    "NaN in a half precision B": (
        all_of(tensor(B, torch.Tensor.half), tensor(B, with_entry(float("nan")))),
        [*NUMBERS, B],
    ),
    "more than float32 holds": (tensor(A, lambda found: found.double() + 1e300), [*NUMBERS, A]),
    "NaN in the head": (tensor(HEAD, with_entry(float("nan"))), [*NUMBERS, HEAD]),
    "product more than float32 holds": (
        all_of(tensor(A, torch.full((2, 32), 1e30)), tensor(B, torch.full((32, 2), 1e30))),
        ["'sst2'", "layer.0", "query", "NaN or infinity"],
    ),
    "weights of the base": (
        tensor(f"{QUERY}.base_layer.weight", torch.ones(32, 32)),
        ["second: its", "query.weight is not that of the base model", "--backbone"],
    ),
    "embeddings": (
        tensor("base_model.model.roberta.embeddings.word_embeddings.weight", torch.ones(23, 32)),
        [*FOREIGN, "word_embeddings"],
    ),
    "LoRA of the embeddings": (
        tensor("base_model.model.roberta.word_embeddings.lora_embedding_A", torch.ones(2, 23)),
        [*FOREIGN, "lora_embedding_A"],
    ),
    "DoRA's magnitudes": (
        tensor(f"{QUERY}.lora_magnitude_vector", torch.ones(32)),
        [*FOREIGN, "lora_magnitude_vector"],
    ),
    "keys with the adapter's name": (
        tensor(f"{QUERY}.lora_A.default.weight", torch.ones(2, 32)),
        [*FOREIGN, "lora_A.default.weight"],
    ),
    "key without PEFT's prefix": (
        tensor("classifier.dense.weight", torch.ones(32, 32)),
        [*FOREIGN, "'classifier.dense.weight'"],
    ),
    "key without a name": (tensor("", torch.ones(1)), [*FOREIGN, "''"]),
    "factor of no layer": (tensor("base_model.model.lora_A.weight", torch.ones(2, 32)), FOREIGN),
    "key of two lines": (
        tensor(f"{QUERY}\nhidden.lora_A.weight", torch.ones(2, 32)),
        [*FOREIGN, "query\\nhidden.lora_A"],
    ),
    "bias that lora_bias denies": (
        tensor(BIAS, torch.ones(32)),
        [f"second/{WEIGHTS}", "lora_B has a bias", "1 of 4", "lora_bias False", "save it again"],
    ),
    "bias that lora_bias promises": (
        option(lora_bias=True),
        [f"second/{WEIGHTS}", "lora_B has a bias", "0 of 4", "lora_bias True"],
    ),
    "bias of another width": (
        all_of(
            option(lora_bias=True),
            *(
                tensor(BIAS.replace("0", i).replace("query", q), torch.ones(40))
                for i in "01"
                for q in ("query", "value")
            ),
        ),
        [f"second/{WEIGHTS}", "layer.", "bias of lora_B is (40,)", "(32,)"],
    ),
    "lora_bias is text": (option(lora_bias="all"), [CONFIG, "lora_bias", "true or false"]),
    # directories
    "directory is a file": (file_in_place, ["models.json", "'sst2'", "no directory second"]),
    "directory links to itself": (link("", "second"), ["models.json", "'sst2'", "no directory"]),
    "directory links to nothing": (link("", "gone"), ["models.json", "'sst2'", "no directory"]),
    "directory is empty": (
        all_of(gone(WEIGHTS), gone(CONFIG)),
        ["models.json", "'sst2'", CONFIG, "train it first, or correct the path"],
    ),
    "weights in a directory beside": (
        lambda folder: (folder / "old.safetensors").mkdir(),
        ["second/old.safetensors", "Is a directory"],
    ),
    # the list
    "task twice": (
        models('{"rte": "first", "sst2": "second", "rte": "second"}'),
        ["--load-model-path models.json", "'rte' occurs twice", "fix the file"],
    ),
    "no path": (
        models('{"rte": "first", "sst2": null}'),
        ["models.json", "sst2: expected", "None"],
    ),
    "empty path": (
        models('{"rte": "first", "sst2": ""}'),
        ["models.json", "sst2: expected", "empty"],
    ),
    "path of 5000 letters": (
        models(json.dumps({"rte": "first", "sst2": "x" * 5000})),
        ["models.json", "'sst2'", "correct the path"],
    ),
    "path with a zero": (models('{"rte": "a\\u0000b"}'), ["models.json", "'rte'", "no directory"]),
    "task is a path": (models('{"../rte": "first"}'), ["models.json", "'../rte'", "letters"]),
    "task of two lines": (
        models('{"rt\\ne": "gone"}'),
        ["models.json", "'rt\\ne'", "no directory"],
    ),
    # two adapters that do not belong together
    "another base": (
        option(base_model_name_or_path="roberta-large"),
        ["'rte'", "'sst2'", "different base models", "roberta-large", "one base"],
    ),
    "another shape of the same base": (
        tensor(B, torch.ones(40, 2)),
        ["'rte'", "'sst2'", "layer.0.attention.self.query", "(32, 32)", "(40, 32)"],
    ),
    "another shape of a base without a name": (
        all_of(
            option(base_model_name_or_path=None),
            lambda folder: option(base_model_name_or_path=None)(folder.parent / "first"),
            tensor(A, torch.ones(2, 48)),
        ),
        ["'rte'", "'sst2'", "layer.0.attention.self.query", "(32, 32)", "(32, 48)"],
    ),
    "fingerprint is a list": (
        content("args.json", '{"body_fingerprint": [1]}'),
        ["second/args.json", "body_fingerprint: expected text, found [1]"],
    ),
    "start is an object": (content("args.json", '{"init": {}}'), ["second/args.json", "init"]),
    "seed is text": (
        content("args.json", '{"seed": "1"}'),
        ["second/args.json", "seed: expected"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(refuse, second, case):
    damage, words = CASES[case]
    damage(second)
    refuse("merge.py", [*MERGE, "--no-eval"], words)


def renamed(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file({key.replace(old, new): found[key] for key in found}, folder / WEIGHTS)

    return damage


UNFIT: dict[str, tuple[Damage, list[str]]] = {
    "layer that the base lacks": (renamed("layer.1", "layer.7"), ["layer.7", "--backbone"]),
    "layer with more outputs": (
        tensor(B, torch.ones(40, 2)),
        ["layer.0", "query", "(40, 32)", "(32, 32)", "--backbone"],
    ),
    "layer with more inputs": (tensor(A, torch.ones(2, 48)), ["layer.0", "query", "(32, 48)"]),
    "head of another width": (
        tensor(HEAD, torch.ones(32, 40)),
        ["classifier.dense.weight", "(32, 40)", "(32, 32)", "train the head"],
    ),
    "head without a part": (without_tensors("dense.bias"), ["classifier.dense.bias", "train the"]),
    "head of three classes": (
        tensor(HEAD.replace("dense", "out_proj"), torch.ones(3, 32)),
        ["3 outputs", "sst2 needs 2", "--no-eval"],
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_the_base_is_refused_before_it_is_evaluated(
    refuse, second, tiny_data, case
):
    damage, words = UNFIT[case]
    damage(second)
    models('{"sst2": "second"}')(second)
    refuse("merge.py", [*MERGE, "--data-dir", str(tiny_data)], ["second", *words])


# Without scores a head may have any number of classes.
UNFIT_TO_EXPORT = {name: UNFIT[name] for name in UNFIT if name != "head of three classes"}
UNFIT_TO_EXPORT["no head"] = without_tensors("classifier"), ["classifier.dense", "train the head"]


@pytest.mark.parametrize("case", UNFIT_TO_EXPORT)
def test_what_does_not_fit_the_base_is_refused_before_it_is_merged_and_exported(
    refuse, second, case
):
    damage, words = UNFIT_TO_EXPORT[case]
    damage(second)
    models('{"sst2": "second"}')(second)
    refuse("merge.py", [*MERGE, "--no-eval", "--export", "model"], ["second", *words])


def merge_without_evaluation() -> None:
    hparams = str(ROOT / "hparams/merge.json")
    run(MergeConfig("models.json", methods=["average"], hparams=hparams, no_eval=True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ""])
def test_no_right_to_read(second, monkeypatch, name):
    monkeypatch.chdir(second.parent)
    (second / name).chmod(0)
    with pytest.raises(UserError, match=f"second.*{name}.*Permission denied"):
        merge_without_evaluation()


def test_the_undamaged_ones_are_merged(second, monkeypatch):
    monkeypatch.chdir(second.parent)
    merge_without_evaluation()
