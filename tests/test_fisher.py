"""Fisher information against one example and one class at a time, in float64."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig

from osrm.fisher import fisher_information

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
