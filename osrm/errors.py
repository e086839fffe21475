"""Errors that a user sees, and how a script shows them."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the field and the fix.

    Unprintable characters, such as a line break in the name of a file, are escaped.
    """

    code = 2  # the exit code of the script

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Diverged(UserError):
    """The loss of a task became infinite or NaN; other tasks may be finished."""

    code = 3


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; the message says what is kept."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def first_line(error: Exception) -> str:
    """The first line of a library's message, for a UserError's single line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def explained(error: Exception) -> UserError | None:
    """The error that a user sees instead of this one; None if it is a bug."""
    if isinstance(error, UserError):
        return error
    # By the text: safetensors has an exception of its own.
    if os.strerror(errno.ENOSPC) in str(error):
        return UserError("the disk is full; free some space, or choose another --output-dir")
    if os.strerror(errno.ENAMETOOLONG) in str(error):
        name = getattr(error, "filename", None) or "--output-dir"
        return UserError(f"{name}: the name is too long; choose a shorter one")
    return None


def run_script(main: Callable[[], None]) -> int:
    """Run `main`, its progress on stderr, and return the exit code.

    An error that can be `explained` is one line, and the code is that of its class. SIGINT or
    SIGTERM (which batch systems send before they kill) is one line, and 128 + its number.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if os.environ.get("RANK", "0") == "0":  # of several processes only the first reports
        logging.getLogger("osrm").setLevel(logging.INFO)
    # They warn about what every run does on purpose: a new head, a deprecated name that PEFT
    # reads, retries without a hub.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
        return 0
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        kept = str(error) or "what was finished is kept"
        problem, code = f"stopped by {signal.Signals(number).name}; {kept}", 128 + number
    except Exception as error:
        if (told := explained(error)) is None:
            raise
        problem, code = str(told), told.code
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
    return code


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)
