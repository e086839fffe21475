"""A GPU that is pretended: its tensors are computed on the CPU, but are not at the CPU's disposal.

An operation that mixes them with the CPU's tensors fails, as on a real one. What makes the CPU wait
for a real one is noted: a value that is read, a copy between the two, a count of true entries.
torch's device "meta" stands for it, since torch knows it in every build.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
READS = {
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
    Tensor.numpy,
    Tensor.tolist,
}
COUNTS = {"bincount", "masked_select", "nonzero", "equal"}
OSRM = str(Path(__file__).parents[1] / "osrm")
SITE = str(Path(torch.__file__).parents[1])


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `inner` is the CPU's tensor that holds it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, dtype=inner.dtype, device=GPU
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: object) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return Operations.current.run(operation, args, kwargs or {})


def on_cpu(value: object) -> object:
    return value.inner if isinstance(value, OnGpu) else value


def on_gpu(value: object) -> object:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


class Operations(TorchDispatchMode):
    """Every operation on tensors of either side."""

    current: "Operations"

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits
        Operations.current = self

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.run(operation, args, kwargs or {})

    def run(self, operation, args, kwargs):
        name, target = operation.name().removeprefix("aten::"), kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        # As torch itself allows: one number of the CPU's may take part.
        others = [x for x in tensors if x.ndim and not isinstance(x, OnGpu)]
        if ours and others and name != "copy_":
            raise RuntimeError(f"{name}: one tensor is on the GPU, another on the CPU")
        stays = bool(ours) if target is None else torch.device(target) == GPU
        moves = stays != bool(ours) if name == "_to_copy" else name == "copy_" and ours and others
        chooses = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if (ours and (name in COUNTS or chooses)) or (moves and not kwargs.get("non_blocking")):
            note(self.waits, name)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = operation(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        same = [tensor for tensor in ours if tensor.inner is result]  # an operation in place
        return same[0] if same else tree_map(on_gpu, result) if stays else result


class Calls(TorchFunctionMode):
    """The calls that read a value, or make a tensor of values."""

    def __init__(self, waits: list[str], everywhere: bool = False) -> None:
        """`everywhere`: note those of the CPU's tensors, too."""
        super().__init__()
        self.waits, self.everywhere = waits, everywhere

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in READS and isinstance(args[0], Tensor):
            if self.everywhere or isinstance(args[0], OnGpu):
                note(self.waits, function.__name__)
            return function(*map(on_cpu, args), **kwargs)
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], OnGpu)
        if made and torch.device(kwargs.get("device") or "cpu") == GPU:
            return on_gpu(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)


def note(waits: list[str], what: str) -> None:
    """Note a wait if osrm's code asks for it, and not a library that it calls."""
    frame = sys._getframe(1)
    while frame and (__file__ == frame.f_code.co_filename or _is_torch(frame.f_code.co_filename)):
        frame = frame.f_back
    if frame and frame.f_code.co_filename.startswith(OSRM):
        file = Path(frame.f_code.co_filename).relative_to(OSRM)
        waits.append(f"{file}: {frame.f_code.co_name}: {what}")


def _is_torch(path: str) -> bool:
    return path.startswith((f"{SITE}/torch/", f"{SITE}/accelerate/", "<"))


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Inside `with` the device `GPU` computes; yields where osrm's code waited for it."""
    waits: list[str] = []
    with Operations(waits), Calls(waits):
        yield waits
