"""The one exception that a user is meant to see, and how a script shows it."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the field and the mend.

    What does not print in it, such as a line break in the name of a file or tensor, is escaped.
    """

    def __str__(self) -> str:
        return "".join(
            each if each.isprintable() else repr(each)[1:-1] for each in super().__str__()
        )


def first_line(error: Exception) -> str:
    """The gist of a library's message, for a UserError's single line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def run_script(main: Callable[[], None]) -> int:
    """Run `main`, its progress on stderr; bad input or a full disk is one line and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("osrm").setLevel(logging.INFO)
    # Their warnings are about what every run does on purpose: a new head, a deprecated name
    # that PEFT still reads, retries while there is no hub.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except Exception as error:
        if isinstance(error, UserError):
            problem = str(error)
        elif os.strerror(errno.ENOSPC) in str(error):  # also in safetensors' own exception
            problem = "the disk is full; free some space, or choose another --output-dir"
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        return 2
    return 0
