"""Tensors on disk: safetensors files, and those with a header and a checksum."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osrm import processes
from osrm.errors import UserError, first_line
from osrm.files import written

logger = logging.getLogger(__name__)

File = TypeVar("File")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file of a user, open for reading; raises UserError if it is damaged."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        path.open("rb").close()  # safetensors says "No such file" whatever the reason
        with safe_open(path, framework="pt") as file:
            yield file
    # AttributeError: torch is older than the file's precision.
    except (OSError, SafetensorError, AttributeError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); save it again") from None


class TensorFile(Mapping[str, Tensor]):
    """Named tensors in a safetensors file; a look-up reads that tensor only.

    "sha256" in its header in JSON is that of the rest of the header and of all tensors.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read it through; raises ValueError if it is damaged, or none."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.header: dict[str, Any] = json.loads((file.metadata() or {})["header"])
                self.sha256: str = self.header.pop("sha256")
                self.names = sorted(file.keys())
                if _checksum(self.header, self.names, file.get_tensor) != self.sha256:
                    raise ValueError("its checksum differs")
        except Exception as error:  # damaged files raise many kinds
            raise ValueError(f"not readable: {first_line(error)}") from None

    @staticmethod
    def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write contiguous tensors; the file appears under its name only when it is whole."""
        header = {**header, "sha256": _checksum(header, tensors, tensors.__getitem__)}
        with written(path) as temporary:
            # One entry: safetensors writes several in no fixed order.
            save_file(dict(tensors), temporary, {"header": json.dumps(header)})

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _checksum(header: Mapping[str, Any], names: Iterable[str], get: Callable[[str], Tensor]) -> str:
    """sha256 of header and tensors in the order of their names, one in memory at a time."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(get(name).numpy().tobytes())
    return digest.hexdigest()


def cached(path: Path, read: Callable[[Path], File], write: Callable[[Path], None]) -> File:
    """What `read` returns for a cache file, which `write` makes if it is missing or damaged.

    `read` raises ValueError if it is damaged. Of several processes the first decides whether all
    call `write` or none does.
    """
    content = None
    if processes.is_first() and path.exists():
        try:
            content = read(path)
        except ValueError as error:
            logger.warning("%s is damaged (%s); computing it again", path, error)
    if not processes.of_first(content is not None):
        write(path)
    return read(path) if content is None else content
