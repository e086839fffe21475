"""merge.py --eval-text: language models, scored by the loss of texts.

The oracle is transformers' own loss, model(labels=...), of one text after the other.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from osrm import embedded, load_merged, report, texts
from osrm.config import MergeConfig
from osrm.errors import UserError
from osrm.flags import parse
from tests.conftest import CONFIGS, ROOT, WORDS, make_tokenizer, merge_them

TASKS = ["chat", "math"]
POSITIONS = 16
"""The longest text of the tiny model."""


def make_adapter(base: Path, folder: Path, seed: int, std: float = 0.3) -> str:
    """By PEFT alone, with random factors."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    )
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)
    model.save_pretrained(folder)
    return str(folder)


def write_lines(folder: Path, task: str, examples: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(example) + "\n" for example in examples]
    (folder / f"{task}.jsonl").write_text("".join(lines))


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A tiny Llama, two adapters, and a file of texts for each: plain ones, and completions."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    options = {"max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    config = type(CONFIGS["llama"])(**CONFIGS["llama"].to_dict() | options)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    make_tokenizer("llama").save_pretrained(folder / "base")
    adapters = {
        task: make_adapter(folder / "base", folder / task, i) for i, task in enumerate(TASKS)
    }
    draw = random.Random(0)
    plain = [{"text": words(draw, draw.randint(1, 12))} for _ in range(11)]
    plain.append({"text": words(draw, 30)})  # too long: it loses its start
    pairs = [
        {"prompt": words(draw, draw.randint(1, 6)) + " ", "completion": words(draw, 5), "id": i}
        for i in range(9)
    ]
    write_lines(folder / "texts", "chat", plain)
    write_lines(folder / "texts", "math", pairs)
    return SimpleNamespace(
        base=folder / "base",
        adapters=adapters,
        texts=folder / "texts",
        lines={"chat": plain, "math": pairs},
    )


def own_losses(
    model, base: Path, lines: list[dict], longest: int | None = POSITIONS
) -> tuple[float, int]:
    """By transformers, text by text: the summed loss, and the number of tokens."""
    tokenizer, total, count = AutoTokenizer.from_pretrained(base), 0.0, 0
    for line in lines:
        prompt = tokenizer(line["prompt"]).input_ids if "prompt" in line else []
        text = line.get("prompt", "") + line.get("completion", line.get("text", ""))
        labels = torch.tensor([tokenizer(text).input_ids])
        ids = labels[:, -(longest or len(labels[0])) :]
        labels = labels.index_fill(1, torch.arange(len(prompt)), -100)[:, -len(ids[0]) :]
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=labels).loss
        total, count = total + loss.double().item() * tokens, count + tokens
    return total, count


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def score(made, folder: Path, name: str = "out", **options) -> Path:
    return merge_them(made.adapters, folder, name, eval_text=str(made.texts), **options)


# -- scores ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory) -> Path:
    methods = ["task_arithmetic", "ties", "emr"]
    return score(made, tmp_path_factory.mktemp("out"), methods=methods, per_device_eval_bsz=4)


def test_losses_are_those_of_transformers(made, scored):
    rows = {row["name"]: row for row in results(scored)["rows"]}
    assert [*rows] == ["pre-trained", "individual", "task_arithmetic", "ties", "emr"]
    found, expected = [], []
    for name, row in rows.items():
        for task in TASKS:
            base = AutoModelForCausalLM.from_pretrained(made.base)
            if name == "individual":
                base = PeftModel.from_pretrained(base, made.adapters[task])
            elif name != "pre-trained":
                base = load_merged(scored / name, task)
            total, count = own_losses(base, made.base, made.lines[task])
            metrics = row["metrics"][task]
            assert metrics["eval_tokens"] == count
            assert metrics["eval_samples"] == len(made.lines[task])
            assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]))
            assert row["scores"][task] == metrics["eval_loss"]
            found.append(metrics["eval_loss"])
            expected.append(total / count)
        assert row["average"] == pytest.approx(np.mean(found[-2:]))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert np.ptp(expected) > 0.1
    assert rows["individual"]["normalised_average"] == pytest.approx(1)


def test_the_files_have_loss_perplexity_and_tokens(made, scored):
    (row,) = (row for row in results(scored)["rows"] if row["name"] == "ties")
    table = pd.read_csv(scored / "results.csv").set_index("row").loc["ties"]
    text = (scored / "results.md").read_text()
    for task in TASKS:
        metrics = row["metrics"][task]
        assert table[task] == pytest.approx(metrics["eval_loss"])
        assert table[f"{task}_perplexity"] == pytest.approx(metrics["eval_perplexity"])
        assert table[f"{task}_tokens"] == metrics["eval_tokens"]
        assert f"{metrics['eval_loss']:.3f}" in text and f"{metrics['eval_perplexity']:.1f}" in text
        assert f"{task} {metrics['eval_tokens']}" in text
    assert "lower is better" in text
    lines = pd.read_parquet(scored / "predictions.parquet").query("task == 'chat'")
    assert lines["ties"].sum() / lines["label"].sum() == pytest.approx(row["scores"]["chat"])
    assert (scored / "tasks.png").exists()


@pytest.mark.sweep
def test_a_repeated_recipe_has_the_same_losses_in_batches_of_one(
    made, scored, tmp_path, monkeypatch
):
    monkeypatch.setattr(texts, "LOGITS", 1)
    out = score(made, tmp_path, from_recipe=str(scored / "ties" / "recipe.json"))
    by_name = {row["name"]: row["scores"] for row in results(scored)["rows"]}
    rows = {row["name"]: row["scores"] for row in results(out)["rows"]}
    assert [*rows] == ["pre-trained", "individual", "ties"]
    for name, found in rows.items():
        assert found == pytest.approx(by_name[name], rel=1e-6)


@pytest.mark.sweep
def test_a_text_without_a_token_to_predict_makes_no_difference(made, scored, tmp_path):
    folder = tmp_path / "texts"
    for task, lines in made.lines.items():
        write_lines(folder, task, [{"text": "\n"}, *lines, {"prompt": "a", "completion": " "}])
    out = merge_them(made.adapters, tmp_path, eval_text=str(folder), methods=["ties"])
    for row in results(out)["rows"]:
        same = next(each for each in results(scored)["rows"] if each["name"] == row["name"])
        assert row["metrics"] == {
            task: pytest.approx(metrics, rel=1e-6) for task, metrics in same["metrics"].items()
        }


def test_a_batch_has_few_logits():
    session = SimpleNamespace(batch_size=64, tokenizer=range(128_000))
    encoded = SimpleNamespace(lengths=[3, 500])
    assert texts.TextSession.rows(session, encoded) == 2**28 // (500 * 128_000) == 4
    session.tokenizer = range(100)
    assert texts.TextSession.rows(session, encoded) == 64


def test_bfloat16(made, scored, tmp_path):
    out = score(made, tmp_path, methods=["ties"], eval_dtype="bfloat16")
    by_name = {row["name"]: row["scores"] for row in results(scored)["rows"]}
    rows = {row["name"]: row["scores"] for row in results(out)["rows"]}
    for name, found in rows.items():
        assert found == pytest.approx(by_name[name], abs=0.03)
        assert found != by_name[name]


@pytest.mark.sweep
def test_interference_is_diagnosed(made, tmp_path):
    out = score(made, tmp_path, methods=["average"], diagnose=True, max_test_samples=5)
    for row in results(out)["rows"]:
        assert {metrics["eval_samples"] for metrics in row["metrics"].values()} == {5}
    shift = json.loads((out / "interference.json").read_text())["shift"]["overall"]
    assert np.shape(shift) == (2, 2) and np.all(np.array(shift) > 0)


# -- which tokens count ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, completion, counted",
    [
        ("", "a dog runs", ["a", "dog", "runs"]),
        ("the ", "dog runs", ["dog", "runs"]),
        ("the dog", " runs", ["runs"]),
        ("the do", "g runs", ["dog", "runs"]),  # the end of the prompt is in a token that counts
        ("the dog ", "a", ["a"]),
        ("a " * 9, "dog", ["dog"]),
        ("dog ", "a " * 5 + "old cat is", ["a", "a", "a", "a", "old", "cat", "is"]),
    ],
)
def test_the_completion_counts(prompt, completion, counted):
    tokenizer = make_tokenizer("llama")
    frame = pd.DataFrame({"prompt": [prompt], "completion": [completion]})
    (example,) = texts.encode(frame, tokenizer, 8)
    kept = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert kept[len(kept) - example["labels"] :] == counted
    assert kept == tokenizer.convert_ids_to_tokens(tokenizer(prompt + completion).input_ids)[-8:]


# -- the search --------------------------------------------------------------------------------


def held_out_loss(made, merged: Path) -> float:
    """Of every second line: the loss per token, mean over the tasks."""
    losses = []
    for task in TASKS:
        model = load_merged(merged, task)
        total, count = own_losses(model, made.base, made.lines[task][1::2])
        losses.append(total / count)
    return np.mean(losses)


def test_the_search_takes_the_smallest_loss_of_every_second_line(made, tmp_path):
    out = score(made, tmp_path, methods=["task_arithmetic"], search=[0.1, 0.5, 2.0])
    found = results(out)
    search = found["search"]["task_arithmetic"]
    by_hand = []
    for scale in search["grid"]:
        options = {"methods": ["task_arithmetic"], "scale": scale, "no_eval": True}
        at = merge_them(made.adapters, tmp_path, f"{scale}", **options)
        by_hand.append(held_out_loss(made, at / "task_arithmetic"))
    np.testing.assert_allclose(search["average"], by_hand, rtol=1e-5)
    assert search["best"] == search["grid"][int(np.argmin(by_hand))]
    assert np.ptp(by_hand) > 0.1
    merged = load_merged(out / "task_arithmetic", "math")
    total, count = own_losses(merged, made.base, made.lines["math"][::2])
    assert found["rows"][-1]["scores"]["math"] == pytest.approx(total / count, rel=1e-5)
    assert found["rows"][-1]["knobs"] == {"scale": search["best"]}


@pytest.mark.sweep
def test_the_best_density_has_the_smallest_loss(made, tmp_path):
    losses = {}
    for density in (0.1, 0.9):
        options = {"methods": ["ties"], "scale": 1.0, "density": density, "no_eval": True}
        out = merge_them(made.adapters, tmp_path, f"{density}", **options)
        losses[density] = held_out_loss(made, out / "ties")
    out = score(made, tmp_path, methods=["ties"], search=[1.0], search_density=[0.1, 0.9])
    search = results(out)["search"]["ties"]
    assert search["knobs"] == {"density": min(losses, key=losses.get)}
    assert search["average"] == pytest.approx([min(losses.values())], rel=1e-5)


# -- tables -----------------------------------------------------------------------------------


def test_scores_and_losses_are_no_one_table(scored, tmp_path, monkeypatch):
    other = tmp_path / "results.json"
    record = results(scored)
    del record["kind"]  # as that of a text classification
    other.write_text(json.dumps(record))
    argv = [str(scored / "results.json"), str(other), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["report", *argv])
    with pytest.raises(UserError, match="other tasks"):
        report.main()


# -- a real model ------------------------------------------------------------------------------


def train(base: Path, sentences: list[str], folder: Path, steps: int) -> None:
    """A few steps of PEFT's LoRA on the next token of these sentences, eight a step."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=2e-3)
    for step in range(steps):
        batch = tokenizer(
            sentences[8 * step : 8 * step + 8],
            padding=True,
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.mark.sweep
def test_smollm2_end_to_end(tmp_path):
    base, adapters = embedded.smollm2(), {}
    for name, task in {"reviews": "sst2", "policies": "qnli"}.items():
        frame = pd.read_parquet(embedded.mini_glue() / task / "train.parquet")
        sentences = sorted({*frame.sentence})
        random.Random(0).shuffle(sentences)
        write_lines(tmp_path / "texts", name, [{"text": text} for text in sentences[:16]])
        train(base, sentences[16:], tmp_path / name, steps=8)
        adapters[name] = str(tmp_path / name)
    options = {"eval_text": str(tmp_path / "texts"), "methods": ["task_arithmetic"]}
    options |= {"search": [1.0], "export": ["adapter"]}
    found = merge_them(adapters, tmp_path, "found", **options)
    rows = {row["name"]: row["scores"] for row in results(found)["rows"]}
    for task in adapters:
        assert rows["individual"][task] < rows["pre-trained"][task] - 0.1
        assert rows["individual"][task] < rows["task_arithmetic"][task] < rows["pre-trained"][task]
        exported = found / "task_arithmetic" / "adapters" / task
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(start, exported)
        lines = (tmp_path / "texts" / f"{task}.jsonl").read_text().splitlines()[::2]
        total, count = own_losses(model, base, [json.loads(line) for line in lines], None)
        assert rows["task_arithmetic"][task] == pytest.approx(total / count, rel=1e-4)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", ["line 2", "broken JSON"]),
        ('["a"]', ["line 2", "text, or prompt and completion"]),
        ("{}", ["line 2", "text, or prompt and completion"]),
        ('{"prompt": "a"}', ["line 2", "text, or prompt and completion"]),
        ('{"text": "a", "prompt": "b"}', ["line 2", "text, or prompt and completion"]),
        ('{"text": ""}', ["line 2", "text: expected text that is not empty, found ''"]),
        ('{"text": 7}', ["line 2", "text: expected", "found 7"]),
        ('{"prompt": null, "completion": "a"}', ["line 2", "prompt: expected text, found None"]),
        ('{"prompt": "a", "completion": ""}', ["line 2", "completion: expected", "found ''"]),
        ('{"text": "\\ud800"}', ["line 2", "broken JSON"]),
    ],
)
def test_bad_lines(made, refuse, tmp_path, line, said):
    (tmp_path / "both.json").write_text(json.dumps(made.adapters))
    (tmp_path / "texts").mkdir()
    good = '{"text": "a dog"}\n'
    (tmp_path / "texts/chat.jsonl").write_text(good)
    (tmp_path / "texts/math.jsonl").write_text(f"{good}{line}\n{good}")
    argv = ["--load-model-path", "both.json", "--eval-text", "texts"]
    argv += ["--hparams", str(ROOT / "hparams/merge.json")]
    refuse("merge.py", argv, ["--eval-text texts/math.jsonl", 'write {"text": ...}', *said])


@pytest.mark.parametrize(
    "content, options, said",
    [
        (None, {}, "math.jsonl: cannot be read"),
        ("\n", {}, "math.jsonl: holds no text"),
        ('{"text": "a dog"}\n', {"search": [0.5]}, "math.jsonl: too few texts .*--search"),
        ('{"text": "\\n"}\n', {}, "math.jsonl: too few texts with a token"),
    ],
)
def test_files_without_texts(made, tmp_path, content, options, said):
    folder = tmp_path / "texts"
    write_lines(folder, "chat", made.lines["chat"])
    if content is not None:
        (folder / "math.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        merge_them(made.adapters, tmp_path, eval_text=str(folder), methods=["ties"], **options)


def test_other_kinds_and_methods_that_look_at_data(made, tiny, tmp_path):
    from tests.conftest import make_adapter as make_classifier

    classifier = make_classifier(tiny["roberta"], tmp_path / "rte", 2, 1, target_modules=["query"])
    with pytest.raises(UserError, match=r"SEQ_CLS.*--eval-text scores language models"):
        merge_them({"rte": classifier}, tmp_path, eval_text=str(made.texts))
    with pytest.raises(UserError, match="regmean looks at data, which --eval-text leaves out"):
        score(made, tmp_path, methods=["regmean"])


@pytest.mark.parametrize("other", ["--no-eval", "--data-dir data"])
def test_flags_that_contradict(other):
    with pytest.raises(UserError, match=r"--eval-text and .* contradict each other"):
        parse(MergeConfig, None, f"--eval-text texts {other}".split())
