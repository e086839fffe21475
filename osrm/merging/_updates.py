"""What a merging method receives and returns: every task's update of every module, made lazily."""

from collections.abc import Callable, Collection, Iterator, Mapping

from jaxtyping import Float
from torch import Tensor

Updates = Mapping[str, Float[Tensor, "task out in"]]
"""Module name -> stack of the tasks' dense updates. Every look-up may compute it anew, so loop
over the names and let go of one stack before asking for the next."""


class LazyUpdates(Mapping[str, Tensor]):
    """The mapping from each name to `compute(name)`, which runs at every look-up."""

    def __init__(
        self, names: Collection[str], compute: Callable[[str], Float[Tensor, "task out in"]]
    ) -> None:
        self._names = names
        self._compute = compute

    def __getitem__(self, name: str) -> Float[Tensor, "task out in"]:
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
