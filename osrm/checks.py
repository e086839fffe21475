"""Read JSON, and check the values in it: what they must be, in words and as a test."""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from osrm.errors import UserError

LARGEST = 2**63 - 1  # data, tokenizers and torch count in 64 bits


@dataclass(frozen=True)
class Check:
    """What a value from a file must be."""

    words: str
    holds: Callable[[Any], bool]


text = Check("text", lambda value: isinstance(value, str))
nonempty = Check("text that is not empty", lambda value: isinstance(value, str) and value != "")
task_name = Check(
    # A character has up to 4 bytes, the name of a file up to 255.
    "a name of up to 60 letters, digits, '_', '-', '.'",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"\w[\w.-]{,59}", value)),
)
flag = Check("true or false", lambda value: isinstance(value, bool))


def number(
    low: float = -inf, high: float = inf, *, low_open: bool = False, high_open: bool = False
) -> Check:
    """A finite number in this interval, whole or not; True and False are no numbers."""

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = low <= value <= high and abs(value) <= sys.float_info.max
        return inside and not (low_open and value == low) and not (high_open and value == high)

    words = "a finite number"
    if high < inf:
        words = f"a number in {'(['[not low_open]}{low:g}, {high:g}{')]'[not high_open]}"
    elif low > -inf:
        words += f" above {low:g}" if low_open else f" of at least {low:g}"
    return Check(words, holds)


def whole(low: int = -LARGEST) -> Check:
    """A whole number from `low` to `LARGEST`."""
    words = "a whole number" + (f" of at least {low}" if low > -LARGEST else "") + ", below 2^63"
    return Check(words, lambda value: type(value) is int and low <= value <= LARGEST)


def one_of(*values: object) -> Check:
    """One of these values, of the same type."""
    typed = [(type(value), value) for value in values]
    words = f"one of {', '.join(map(str, values))}"
    return Check(words, lambda value: (type(value), value) in typed)


def optional(check: Check) -> Check:
    """Null, or what `check` wants."""
    return Check(f"{check.words} or null", lambda value: value is None or check.holds(value))


def list_of(check: Check) -> Check:
    """A list of what `check` wants."""
    words = f"a list, each {check.words}"
    return Check(words, lambda value: isinstance(value, list) and all(map(check.holds, value)))


def set_of(check: Check, count: str, allowed: Callable[[int], bool]) -> Check:
    """A list of different values, each what `check` wants, of an `allowed` length."""
    words, each = f"a list of {count}, all different, each {check.words}", list_of(check)
    return Check(words, lambda v: each.holds(v) and allowed(len(v)) and len({*v}) == len(v))


def problems(values: Mapping[str, Any], checks: Mapping[str, Check]) -> list[str]:
    """`name: expected WORDS, found VALUE`, for every value that is there and fails its check."""
    return [
        f"{name}: expected {check.words}, found {reprlib.repr(values[name])}"
        for name, check in checks.items()
        if name in values and not check.holds(values[name])
    ]


def per_task(file: str | Path, field: str, tasks: Iterable[str], check: Check) -> dict[str, Any]:
    """{task: value} of a JSON file, for every one of `tasks`; other tasks in it are ignored."""
    tasks, values = list(tasks), read_object(file, field, "{task: value}")
    wrong = [f"lacks the task '{task}'; add it" for task in tasks if task not in values]
    wrong += problems(values, dict.fromkeys(tasks, check))
    if wrong:
        raise UserError(f"{field} {file}: {'; '.join(wrong)}")
    return {task: values[task] for task in tasks}


def read_object(file: str | Path, field: str, form: str) -> dict[str, Any]:
    """The object in a JSON file; `form` says in the error message what is expected."""
    content = read_json(file, field)
    if not isinstance(content, dict):
        raise UserError(f"{field} {file}: expected an object {form}; fix the file")
    return content


def read_json(file: str | Path, field: str) -> Any:
    """The content of a JSON file; `field` is the flag or the key that names it."""
    try:
        return json.loads(Path(file).read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{field} {file}: {error.strerror}; name a JSON file") from None
    except (ValueError, RecursionError) as error:  # broken, twice a key, or too deep
        raise UserError(f"{field} {file}: broken JSON ({error}); fix the file") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON: of two values with the same key, the first would be lost silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return content
