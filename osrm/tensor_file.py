"""Tensors on disk with a header and a checksum: a damaged file is found before it is used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osrm import processes
from osrm.errors import first_line

logger = logging.getLogger(__name__)

File = TypeVar("File")


class TensorFile(Mapping[str, Tensor]):
    """Named tensors on disk; a look-up reads that tensor alone.

    One safetensors file with a header in JSON, in which "sha256" is that of the rest of the header
    and of all tensors.
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
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not readable: {first_line(error)}") from None
        except RecursionError:
            raise ValueError("not readable: its header is nested too deep") from None

    @staticmethod
    def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write contiguous tensors; the file appears under its name only when it is whole."""
        header = {**header, "sha256": _checksum(header, tensors, tensors.__getitem__)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # One entry: safetensors writes several in no fixed order.
        save_file(dict(tensors), temporary, {"header": json.dumps(header)})
        temporary.replace(path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _checksum(
    header: Mapping[str, Any], names: Iterable[str], tensor: Callable[[str], Tensor]
) -> str:
    """sha256 of header and tensors in the order of their names, one in memory at a time."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensor(name).numpy().tobytes())
    return digest.hexdigest()


def cached(path: Path, read: Callable[[Path], File], write: Callable[[Path], None]) -> File:
    """What `read` finds in a cache file, which `write` makes where it is lacking or damaged.

    Several processes do the same: the first decides, and `write` is called in all or in none.

    Args:
        read: raises ValueError if the file is damaged.
    """
    found = None
    if processes.is_first() and path.exists():
        try:
            found = read(path)
        except ValueError as error:
            logger.warning("%s is damaged (%s); computing it again", path, error)
    if not processes.of_first(found is not None):
        write(path)
    return read(path) if found is None else found
