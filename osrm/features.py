"""The latent features of a task: second moments of the inputs of every adapted layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from osrm import processes
from osrm.moments import Moment


class TokenMask(NamedTuple):
    """Which positions of a batch are real."""

    mask: Bool[Tensor, "batch length"]
    places: Int64[Tensor, "real"]
    """Their numbers. A GPU would have to be waited for, to learn how many there are."""

    @classmethod
    def of(cls, mask: Tensor) -> TokenMask:
        """The mask with the places, found where the mask is."""
        return cls(mask.bool(), mask.flatten().nonzero().flatten())


def token_masks(batch: Any) -> list[TokenMask]:
    """The attention masks of a batch: the encoder's, then the decoder's."""
    names = ("attention_mask", "decoder_attention_mask") if isinstance(batch, Mapping) else ()
    masks = (batch.get(name) for name in names)
    return [TokenMask.of(mask) for mask in masks if mask is not None]


def pool(
    inputs: Float[Tensor, "batch *positions d"], masks: Sequence[TokenMask], features: str
) -> Float[Tensor, "rows d"]:
    """The vectors that count: all real positions ("token"), or one mean an example.

    The first mask of the inputs' shape says which are real. Without one all are.
    """
    mask = next((mask for mask in masks if mask.mask.shape == inputs.shape[:-1]), None)
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if features == "token":
        rows = inputs.flatten(0, 1)
        return rows if mask is None else rows[mask.places]
    weights = inputs.new_ones(inputs.shape[:2]) if mask is None else mask.mask
    weights = weights.to(torch.float32).unsqueeze(-1)
    return (inputs.float() * weights).sum(1) / weights.sum(1)


@contextmanager
def recorded_inputs(
    model: nn.Module, modules: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Record the inputs of the modules in each forward pass; yields (inputs, leaders).

    `inputs` has each distinct tensor once, under its leader, the first module that read it; the
    caller clears it after each pass. `leaders` is {module: leader}: the query, key and value of
    one layer read one tensor and share one statistic.
    """
    inputs: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        same = (leader for leader, tensor in inputs.items() if tensor is args[0])
        leaders[name] = next(same, name)
        if inputs.setdefault(leaders[name], args[0]) is not args[0]:
            raise ValueError(f"{name} runs more than once in a forward pass: not supported")

    layers = {name: model.get_submodule(name) for name in modules}
    handles = [x.register_forward_pre_hook(partial(record, name)) for name, x in layers.items()]
    try:
        yield inputs, leaders
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside `with`; afterwards all modes and requires_grad are as before."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def collect(
    model: Any,
    modules: Sequence[str],
    batches: Iterable[Any],
    features: str,
    *,
    count_padding: bool = False,
) -> tuple[dict[str, Moment], dict[str, str]]:
    """({leader: statistic}, {module: leader}) of `recorded_inputs`, in one pass over the batches.

    If torch.distributed has started, every process must call this with its own share of the
    batches; all get the statistics of all batches together.

    Args:
        batches: keyword arguments of the model, or its one argument.
        features: "token", "sample" (one mean an example), or "mean" (their mean: one vector).
        count_padding: padding counts like text; all batches must then have the same length.

    Raises ValueError if a module never ran, or more than once in a forward pass, if there was no
    batch, or if an input is not finite.
    """
    totals: dict[str, Moment] = {}
    waiting: dict[str, list[Tensor]] = {}

    def add_waiting(name: str) -> None:
        statistic = Moment.of(torch.cat(waiting.pop(name)))
        totals[name] = totals[name] + statistic if name in totals else statistic

    device = next(model.parameters()).device
    with evaluating(model), recorded_inputs(model, modules) as (inputs, leaders):
        for batch in batches:
            masks = [] if count_padding else token_masks(batch)
            batch, masks = send_to_device((batch, masks), device, non_blocking=True)
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
            for name, tensor in inputs.items():
                rows = pool(tensor, masks, features)
                if features == "mean":  # E[(h, 1) (h, 1)ᵀ] has the mean in its last column
                    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
                waiting.setdefault(name, []).append(rows)
                # Many rows at a time: a product of few rows costs no more than its addition.
                if sum(map(len, waiting[name])) >= 2 * rows.shape[1]:
                    add_waiting(name)
            inputs.clear()
    for name in list(waiting):
        add_waiting(name)
    if processes.count() > 1:
        totals, leaders = _over_processes(totals, leaders, device)
    if not leaders:
        raise ValueError("there was no batch")
    if idle := [name for name in modules if name not in leaders]:
        raise ValueError(f"{len(idle)} layers never ran ({', '.join(idle[:3])})")
    finite = torch.stack([total.data.isfinite().all() for total in totals.values()]).tolist()
    if broken := [name for name, holds in zip(totals, finite) if not holds]:
        raise ValueError(f"NaN or infinity enters {len(broken)} layers ({', '.join(broken[:3])})")
    if features == "mean":
        for name, total in totals.items():
            unit = total.data.new_zeros(total.data.shape[1], 1)
            unit[-1] = 1
            totals[name] = Moment.of(total.times(unit).T[:, :-1])
    return totals, leaders


def _over_processes(
    totals: Mapping[str, Moment], leaders: Mapping[str, str], device: torch.device
) -> tuple[dict[str, Moment], dict[str, str]]:
    """The statistics of all processes' vectors; a process may lack any of them.

    Few vectors are gathered in the order of the processes; the group must support `device`.
    """
    sizes = {name: (total.count, total.data.shape[1]) for name, total in totals.items()}
    known = processes.gathered((dict(leaders), sizes))
    merged = {module: leader for theirs, _ in known for module, leader in theirs.items()}
    result = {}
    for name in dict.fromkeys(merged.values()):
        parts = [sizes[name] for _, sizes in known if name in sizes]
        count, d = sum(vectors for vectors, _ in parts), parts[0][1]
        own = totals.get(name) or Moment.of(torch.zeros(0, d, device=device))
        if count < d:
            data = torch.cat(processes.gathered(own.data.cpu()))
        else:
            data = own.gram
            dist.all_reduce(data)
        result[name] = Moment(count, data)
    return result, merged
