"""Fisher information against one example and one class at a time, in float64; its cache."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, RobertaConfig

from osrm.fisher import fisher_information
from osrm.tensor_file import TensorFile, cached
from tests.conftest import make_adapter, merge_them, written

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
MODULES = [f"roberta.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]


@pytest.fixture(params=[3, 1], ids=["classes", "regression"])
def model(request):
    torch.manual_seed(0)
    config = RobertaConfig(num_labels=request.param, **CONFIG)
    return AutoModelForSequenceClassification.from_config(config)


def examples(n=5):
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        ids = torch.randint(3, 20, (1, 4 + i), generator=generator)
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([i % 3], dtype=torch.long),
        }


def test_it_is_the_mean_of_the_squared_gradients(model):
    found = fisher_information(model, MODULES, examples())
    slow = model.double().eval()
    for name in MODULES:
        weight = slow.get_submodule(name).weight
        expected = torch.zeros_like(weight)
        for batch in examples():
            labels = batch.pop("labels")
            logits = slow(**batch).logits[0]
            if len(logits) == 1:
                gradient = torch.autograd.grad((logits[0] - labels[0]) ** 2, weight)[0]
            else:
                p = logits.softmax(0).detach()
                gradient = torch.zeros_like(weight)
                for k in range(len(p)):
                    log_p = logits.log_softmax(0)[k]
                    gradient += (
                        p[k].sqrt() * torch.autograd.grad(log_p, weight, retain_graph=True)[0]
                    )
            expected += gradient**2 / 5
        assert found[name].dtype == torch.float32 and found[name].max() > 0
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-12)


def test_the_model_comes_back_as_it_was(model):
    model.train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    with pytest.raises(KeyError, match="labels"):
        fisher_information(model, MODULES, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    fisher_information(model, MODULES, examples())
    assert model.training and not frozen.requires_grad
    assert before == {name: each.requires_grad for name, each in model.named_parameters()}
    assert all(each.grad is None for each in model.parameters())


# -- the cache ---------------------------------------------------------------------------------


def lose_a_module(path):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del tensors[next(iter(tensors))]
    save_file(tensors, path, metadata)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "another number": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
    "a module less": lose_a_module,
    "no checksum": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage, tmp_path, caplog):
    path = tmp_path / "rte.safetensors"
    information = {name: torch.rand(4, 3) for name in MODULES}

    def write(path):
        TensorFile.save(path, information, {"settings": {"task": "rte"}})

    cached(path, TensorFile, write)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    again = cached(path, TensorFile, write)
    assert path.read_bytes() == whole and "is damaged" in caplog.text
    assert all(torch.equal(again[name], information[name]) for name in MODULES)


def test_a_merge_computes_a_damaged_cache_again(
    tiny, tiny_data, tmp_path, own_feature_cache, caplog
):
    paths = {
        task: make_adapter(tiny["roberta"], tmp_path / task, 2, seed, target_modules=["query"])
        for seed, task in enumerate(("rte", "sst2"))
    }
    options = {"data_dir": str(tiny_data), "max_test_samples": 4, "max_num_samples": 3}
    options["methods"] = ["fisher"]
    before = written(merge_them(paths, tmp_path, "before", **options) / "fisher")
    file, other = sorted((own_feature_cache / "features").iterdir())
    whole, untouched = file.read_bytes(), other.stat().st_mtime_ns
    DAMAGES["another number"](file)
    caplog.set_level(logging.WARNING)
    assert written(merge_them(paths, tmp_path, "after", **options) / "fisher") == before
    (line,) = [each.getMessage() for each in caplog.records if "is damaged" in each.getMessage()]
    assert str(file) in line and "computing it again" in line and "\n" not in line
    assert file.read_bytes() == whole and other.stat().st_mtime_ns == untouched
