"""Memory and operations of models without weights: what `plan.py` is made of.

Models are built on torch's meta device, which has shapes but no data. Their passes run there
operation by operation, as on a GPU, and are counted. Sizes are bytes.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForSequenceClassification, LlamaConfig, RobertaConfig, T5Config

from osrm.adapters import add_lora
from osrm.backbones import projections
from osrm.features import recorded_inputs
from osrm.glue import TASKS
from osrm.merging import METHODS, Lazy, Part, merge
from osrm.moments import Moment
from osrm.task_vectors import LoraPair, TaskVectors

HPARAMS = Path(__file__).parent.parent / "hparams" / "merge.json"

# ------------------------------------------------------------------- models


def _roberta(vocabulary: int, d: int, layers: int, heads: int, positions: int, types: int) -> Any:
    return RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        max_position_embeddings=positions,
        type_vocab_size=types,
    )


def llama(vocabulary: int, d: int, layers: int, heads: int, head: int, inner: int) -> Any:
    """A Llama of eight heads for keys and values."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head,
        intermediate_size=inner,
        pad_token_id=0,
    )


CONFIGS = {
    "minilm": _roberta(30522, 384, 6, 12, 513, 2),
    "roberta-large": _roberta(50265, 1024, 24, 16, 514, 1),
    "t5-large": T5Config(
        vocab_size=32128,
        d_model=1024,
        d_kv=64,
        d_ff=4096,
        num_layers=24,
        num_heads=16,
        decoder_start_token_id=0,
    ),
    "llama3.2-1b": llama(128256, 2048, 16, 32, 64, 8192),
    "llama3.2-3b": llama(128256, 3072, 28, 24, 128, 8192),
    "llama3-8b": llama(128256, 4096, 32, 32, 128, 14336),
}
"""The published sizes of the backbones."""


def pretrained(config: Any, dtype: torch.dtype, device: str = "meta") -> Any:
    """The backbone with MNLI's head."""
    config = copy.deepcopy(config)
    config.num_labels = TASKS["mnli"].num_labels
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def adapted(config: Any, dtype: torch.dtype, block: str, rank: int, device: str = "meta") -> Any:
    """The model that train_glue.py trains."""
    model = pretrained(config, dtype, device)
    model.config.use_cache = False  # as the Trainer sets it
    with torch.device(device):
        return add_lora(model, projections(model, block, rank), rank, 2 * rank)


def trained(model: Any) -> list[nn.Parameter]:
    """Adapters and head."""
    return [each for each in model.parameters() if each.requires_grad]


def frozen(model: nn.Module) -> list[Tensor]:
    """All else that lies on the device, each tensor once."""
    found = [each for each in model.parameters() if not each.requires_grad]
    return [*found, *model.buffers()]


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes."""
    return sum(each.numel() * each.element_size() for each in tensors)


def optimizer_size(parameters: Sequence[Tensor]) -> int:
    """Bytes of AdamW's states: two moments, and a step of float32, of each parameter."""
    return 2 * size(parameters) + 4 * len(parameters)


def gathered_size(model: Any) -> int:
    """Bytes of the whole weights that a GPU of FSDP has beside its share.

    Two blocks, the one that computes and the next one, and what is in no block: that is gathered
    with the root module and stays until the backward pass is over. (accelerate 1.15 gathers the
    embeddings by themselves, and then needs less.)
    """
    base = model.get_base_model()
    names = base._no_split_modules
    sizes = [size(frozen(each)) for each in base.modules() if type(each).__name__ in names]
    return 2 * max(sizes) + size(frozen(model)) - sum(sizes)


# ------------------------------------------------------------------- passes


class OnGpu(TorchFunctionMode):
    """Lets tensors without data, or those of a CPU, take the way that torch takes on a GPU.

    That is autocast to bfloat16 as the Trainer asks for it (torch has none on the meta device), the
    memory-efficient attention kernel, which torch takes where there is padding, and dropout with a
    mask of one byte an entry.
    """

    # Of torch's list "CUDA Ops that can autocast" those that these models call.
    LOW = frozenset({"linear", "matmul", "__matmul__", "bmm", "baddbmm", "mm", "addmm"})
    FULL = frozenset(
        {"layer_norm", "softmax", "log_softmax", "cross_entropy", "pow", "rsqrt", "sum", "cumsum"}
        | {"__pow__", "nll_loss", "mse_loss", "prod", "exp", "log", "norm", "reciprocal"}
    )

    def __init__(self, autocast: bool, kernels: bool = True) -> None:
        """`kernels`: attention and dropout as on a GPU; else by torch's own formulas."""
        super().__init__()
        self.autocast, self.kernels = autocast, kernels

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one call of the model's, or what stands for it on a GPU."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__" and args[0].is_meta:
            return False  # "is there no padding?"
        if self.autocast and name in self.LOW | self.FULL:
            dtype = torch.bfloat16 if name in self.LOW else torch.float32
            args = [_cast(each, dtype) for each in args]
            kwargs = {key: _cast(each, dtype) for key, each in kwargs.items()}
        if self.kernels and func is F.dropout:
            return _dropout(*args, **kwargs)
        if self.kernels and func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


Way = Callable[[], AbstractContextManager]
"""Makes the context in which a model runs: `OnGpu`, or what a check compares."""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not enable_gqa, "torch has no such kernel with a mask"
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(attn_mask.logical_not(), -math.inf)
    attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    needed = torch.is_grad_enabled() and query.requires_grad
    return kernel(query, key, value, attn_mask, needed, dropout_p, is_causal, scale=scale)[0]


class Meter(TorchDispatchMode):
    """Counts, operation by operation, what tensors are alive and what is computed.

    A tensor that was there before counts as nothing. What an operation allocates for itself alone
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0
        """Of products and attention."""
        self.moved = 0
        """Bytes that all other operations read and write."""
        self.operations = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for tensor in given:
            self._note(tensor, 0)
        if func._overloadpacket is torch.ops.aten.sum and given and not given[0].is_meta:
            # Of another precision, it is cast as a whole first on a CPU.
            copied = (kwargs.get("dtype") or given[0].dtype) != given[0].dtype
            extra = given[0].numel() * kwargs["dtype"].itemsize if copied else 0
            self.peak = max(self.peak, self.live + extra)
        out = func(*args, **kwargs)
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        is_view = not func._schema.is_mutable and {_key(each) for each in made} <= {
            _key(each) for each in given
        }
        for tensor in made:
            self._note(tensor, tensor.untyped_storage().nbytes())
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif not is_view:
            self.moved += sum(map(_extent, [*given, *made]))
        self.operations += not is_view
        return out

    def _note(self, tensor: Tensor, size: int) -> None:
        key = _key(tensor)
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(tensor.untyped_storage(), freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> int:
    """Bytes that are read of a tensor: of an expanded one only those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Count:
    """Of a pass: bytes beside what was there before, and what is computed (see `Meter`)."""

    kept: int
    """What is alive at its end; of a training step, between forward and backward."""
    peak: int
    flops: int
    moved: int
    operations: int


def logits(model: Any, batch: int, length: int) -> Tensor:
    """Of a batch with padding, as long as it can be."""
    device = next(model.parameters()).device
    ids = torch.full((batch, length), 5, device=device)
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.is_encoder_decoder:
        # T5 pools where the end token is, which cannot be asked of a tensor without data.
        hidden = base.transformer(
            ids, attention_mask=mask, decoder_input_ids=ids, use_cache=base.config.use_cache
        )[0]
        return base.classification_head(hidden[:, -1])
    return model(input_ids=ids, attention_mask=mask).logits


def prepare_step(model: Any, checkpoint: bool, way: Way) -> None:
    """Let the gradients be there, so that the pass does not count them.

    Checkpointing is that of `osrm.training.enable_checkpointing`; what is computed again goes the
    same `way`.
    """
    model.train()
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    if checkpoint:
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), way())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=options
            )


def count_step(model: Any, batch: int, length: int, checkpoint: bool, way: Way) -> Count:
    """A forward and a backward pass of a model with LoRA, which is prepared for it."""
    prepare_step(model, checkpoint, way)
    with Meter() as meter:
        with way():
            output = logits(model, batch, length)
            labels = torch.zeros(batch, dtype=torch.long, device=output.device)
            loss = F.cross_entropy(output, labels)
        del output
        kept = meter.live
        loss.backward()
    return Count(kept, meter.peak, meter.flops, meter.moved, meter.operations)


@torch.no_grad()
def count_forward(
    model: Any, batch: int, length: int, way: Way, modules: Sequence[str] = ()
) -> tuple[Count, list[Tensor]]:
    """A forward pass of an evaluation; what enters `modules` is kept and given back, each once."""
    model.eval()
    with recorded_inputs(model, modules) as (inputs, _), way(), Meter() as meter:
        logits(model, batch, length)
    count = Count(meter.live, meter.peak, meter.flops, meter.moved, meter.operations)
    return count, [*inputs.values()]


# ------------------------------------------------------------------- statistics


def moment_size(vectors: int, d: int) -> int:
    """Bytes of a `Moment`."""
    return vectors * d * 4 if vectors < d else d * d * 8


def collecting_size(
    forward: Count, inputs: Sequence[tuple[int, ...]], features: str, samples: int, itemsize: int
) -> int:
    """Bytes, at most, of `osrm.features.collect` for one task, on the device, beside the weights.

    The sums of all inputs, and the rows that wait to be added, up to twice the width. Beside them
    is either a forward pass, or what it leaves, the inputs, and of one of them at a time all rows
    in one piece and in float64, and their product; then that and the new sum.

    Args:
        forward: a pass that keeps the inputs.
        inputs: (batch, tokens, d) of each.
        itemsize: bytes of a number in them.
    """
    standing, adding = 0, 0
    for batch, tokens, d in inputs:
        rows, step, item = samples * tokens, batch * tokens, itemsize
        if features != "token":
            rows, step, item = samples, batch, 4
        if features == "mean":  # a column more, and rows until the end
            d += 1
        standing += moment_size(rows, d) + min(rows, 2 * d) * d * item
        piece = min(rows, 2 * d + step) * d
        product = d * d * 8 if rows >= d else 0
        adding = max(adding, piece * (item + (8 if product else 4)) + product, 2 * product)
    return standing + max(forward.peak, forward.kept + adding)


def solving_size(tasks: int, vectors: int, d: int) -> int:
    """Bytes while one input's A is solved for: see `osrm.features.starts` and `shifted_inverse`.

    The statistics of all tasks, their sum, that of the others, and a factorisation with what is
    factorised: d x d each, or, of few vectors, n x n beside the vectors in float64.
    """
    others = (tasks - 1) * vectors
    factor = others * d * 8 + 2 * others**2 * 8 if others < d else 2 * d * d * 8
    sums = moment_size(tasks * vectors, d) + moment_size(others, d)
    return tasks * moment_size(vectors, d) + sums + factor


# ------------------------------------------------------------------- merging


@dataclass(frozen=True)
class Merge:
    """Of one method: bytes while one module is merged, at most, and of the result on disk."""

    peak: int
    disk: int
    factors: bool


def random_updates(
    shapes: Mapping[str, tuple[int, int]], rank: int, tasks: Sequence[str]
) -> TaskVectors:
    """Every task's LoRA pair of modules of these shapes (out, in)."""
    generator = torch.Generator().manual_seed(0)

    def pair(out: int, width: int) -> LoraPair:
        A = torch.randn(rank, width, generator=generator) / width**0.5
        return LoraPair(A, torch.randn(out, rank, generator=generator) / 100, 2.0)

    return TaskVectors.stack(
        {task: {module: pair(*shape) for module, shape in shapes.items()} for task in tasks}
    )


@torch.no_grad()
def merge_one(method: str, vectors: TaskVectors) -> Part:
    """What a method makes of one module, with the shipped knobs and made-up statistics."""
    knobs = json.loads(HPARAMS.read_text())[method]
    tasks, (out, width) = len(vectors.tasks), vectors.pairs("module")[0].shape

    def moments(_: str) -> list[Moment]:
        units = [torch.eye(width, dtype=torch.float64) for _ in range(tasks)]
        return [Moment(width, each.mul_(width)) for each in units]

    def fisher(_: str) -> Tensor:
        return torch.ones(tasks, out, width)

    needed = {"moments": moments, "fisher": fisher}.get(METHODS[method].needs)
    statistics = Lazy([*vectors], needed) if needed else None
    return merge(method, vectors, statistics=statistics, **knobs).parts["module"]


def count_merge(method: str, shapes: Mapping[tuple[int, int], int], rank: int, tasks: int) -> Merge:
    """Run a method on one module of each shape, on random adapters.

    Args:
        shapes: {(out, in): how many modules have it}.
    """
    peak, disk, part = 0, 0, None
    for shape, modules in shapes.items():
        vectors = random_updates({"module": shape}, rank, [*map(str, range(tasks))])
        with Meter() as meter:
            part = merge_one(method, vectors)
        peak = max(peak, meter.peak)
        stored = [part] if isinstance(part, Tensor) else vars(part).values()
        disk += modules * size([each for each in stored if isinstance(each, Tensor)])
    return Merge(peak, disk, isinstance(part, LoraPair))
