"""Command-line flags as the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

from osrm.checks import Check
from osrm.errors import UserError

Config = TypeVar("Config")


def flag(
    default: Any, help: str, expected: Check | tuple[str, ...] | None = None, **options: Any
) -> Any:
    """A dataclass field that is also a command-line flag of its default's type.

    `expected` is what the number, or every number of a list, must be; or the choices. The values
    of a list are text unless `type` says otherwise. The other options are those of argparse, and
    `aliases`.
    """
    several = isinstance(default, list)
    if isinstance(default, bool):
        options["action"] = "store_true"
    else:
        kind = options.setdefault("type", str if several or default is None else type(default))
        if isinstance(expected, tuple):
            options["choices"], expected = expected, None
        elif kind in (int, float):
            options["metavar"] = "N" if kind is int else "X"
        if several:
            options["nargs"] = "+"
        elif default is not None:
            help += f" (default: {default})"
    metadata = {"expected": expected, "options": {"help": help, **options}}
    if several:
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, problems: list[str]) -> None:
    """Raises one UserError for the config's own problems and all numbers that a flag refuses."""
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), field.metadata["expected"]
        if value is None or expected is None:
            continue
        values = value if isinstance(value, list) else [value]
        if wrong := [x for x in values if not expected.holds(x)]:
            shown = " ".join(f"{x:g}" if isinstance(x, float) else reprlib.repr(x) for x in wrong)
            problems.append(f"{_name(field)} {shown}: expected {expected.words}")
    if problems:
        raise UserError("; ".join(problems))


def parse(cls: Callable[..., Config], about: str | None, argv: list[str] | None = None) -> Config:
    """The dataclass `cls` with the values of the command line; `about` begins its --help."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the dataclass has the defaults
    )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        options = dict(field.metadata["options"])
        names = [_name(field), *options.pop("aliases", ())]
        parser.add_argument(*names, dest=field.name, **options)
    return cls(**vars(parser.parse_args(argv)))


def _name(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")
