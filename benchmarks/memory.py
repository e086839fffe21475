"""How much memory training, statistics and scoring take on this machine.

    python benchmarks/memory.py --model minilm --output benchmarks/results/memory.json
    python benchmarks/memory.py --model llama3-8b --dtype bfloat16

The model has the sizes of --model and random weights: nothing is downloaded. Every number is the
peak of a process of its own beside what was there before: of the GPU's memory if there is a GPU,
else of resident memory (Linux with glibc). The weights are part of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import flags, in_new_process, parse, report, resident, roberta_config, table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, PretrainedConfig

from osrm.adapters import add_lora
from osrm.backbones import projections
from osrm.features import collect
from osrm.measure import reset_peak_memory
from osrm.training import enable_checkpointing

RANK = 8
MODELS = {
    "minilm": roberta_config(384, 6, num_attention_heads=12, vocab_size=30522),
    "roberta-large": roberta_config(),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        pad_token_id=0,
        use_cache=False,
    ),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M_MMAP_THRESHOLD = -3  # glibc's number of this setting of malloc


def growth(function: Callable[..., Any], *arguments: Any) -> float:
    """GiB by which memory grows, at most, while the function runs."""
    # Every tensor is a mapping of its own, so that resident memory is what is alive.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    reset_peak_memory()
    before = resident("VmRSS")
    function(*arguments)
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") - before


def random_model(config: PretrainedConfig, dtype: str, device: str = DEVICE) -> Any:
    """The backbone with a head of two labels."""
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))


def random_batch(examples: int, length: int, device: str) -> dict[str, Tensor]:
    """Full examples of random tokens."""
    ids = torch.randint(3, 1000, (examples, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(base: Any, batch: tuple[int, int], checkpoint: bool) -> Callable[[], None]:
    """One step of train_glue.py, to be repeated: LoRA on q and v, AdamW."""
    model = add_lora(base, projections(base, "qv", RANK), RANK, 2 * RANK)
    model.train()
    if checkpoint:
        enable_checkpointing(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, kind = torch.optim.AdamW(trained, fused=True), base.device.type
    inputs = random_batch(*batch, kind)

    def run() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            logits = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits, logits.new_zeros(len(logits)).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def statistics(model: Any, batch: tuple[int, int], features: str = "token") -> None:
    """One task's statistics of a hundred examples."""
    examples, length = batch
    batches = (
        random_batch(min(examples, 100 - first), length, model.device.type)
        for first in range(0, 100, examples)
    )
    collect(model, projections(model, "qv", RANK), batches, features=features)


def train(name: str, dtype: str, batch: tuple[int, int], checkpoint: bool) -> None:
    """One step of a new model."""
    step(random_model(MODELS[name], dtype), batch, checkpoint)()


def collect_statistics(name: str, dtype: str, batch: tuple[int, int], features: str) -> None:
    """The statistics of a new model."""
    statistics(random_model(MODELS[name], dtype), batch, features)


@torch.no_grad()
def score(name: str, dtype: str, batch: tuple[int, int]) -> None:
    """A forward pass of an evaluation."""
    random_model(MODELS[name], dtype).eval()(**random_batch(*batch, DEVICE))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = flags(__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64, help="examples of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of each example")
    args = parse(parser, argv)
    model, batch = (args.model, args.dtype), (args.batch, args.length)
    cases = {
        "training": (train, *model, batch, False),
        "training, --gradient-checkpoint": (train, *model, batch, True),
        "scoring": (score, *model, batch),
    }
    for features in ("token", "sample", "mean"):
        cases[f"{features} statistics"] = (collect_statistics, *model, batch, features)
    records = []
    for what, case in cases.items():
        gib, _ = in_new_process(args.threads, growth, *case)
        records.append({"what": what, "gib": gib})
        print(records[-1], flush=True)
    title = f"{args.model} in {args.dtype}, {args.batch} x {args.length} tokens"
    report(args, table({title: "{what}", "GiB": "{gib:.2f}"}, records), {"peaks": records})


if __name__ == "__main__":
    main()
