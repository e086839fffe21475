"""The one exception that a user is meant to see, and how a script shows it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import ClassVar


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the field and the mend.

    What does not print in it, such as a line break in the name of a file or tensor, is escaped.
    """

    code: ClassVar[int] = 2
    """What the script exits with."""

    def __str__(self) -> str:
        return "".join(
            each if each.isprintable() else repr(each)[1:-1] for each in super().__str__()
        )


class Diverged(UserError):
    """The training of a task came to a loss that is not finite; other tasks may have gone well."""

    code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; the message says what is kept."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def first_line(error: Exception) -> str:
    """The gist of a library's message, for a UserError's single line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def explained(error: Exception) -> UserError | None:
    """What a user is told of it; None of a bug."""
    if isinstance(error, UserError):
        return error
    # The text, as safetensors has an exception of its own.
    if os.strerror(errno.ENOSPC) in str(error):
        return UserError("the disk is full; free some space, or choose another --output-dir")
    if os.strerror(errno.ENAMETOOLONG) in str(error):
        name = getattr(error, "filename", None) or "--output-dir"
        return UserError(f"{name}: the name is too long; choose a shorter one")
    return None


def run_script(main: Callable[[], None]) -> int:
    """Run `main`, its progress on stderr, and return the exit code.

    What can be `explained` is one line and code 2, a task that diverged 3, and SIGINT or SIGTERM
    (which batch systems send before they kill) one line and 128 + the signal's number.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if os.environ.get("RANK", "0") == "0":  # of several processes one reports
        logging.getLogger("osrm").setLevel(logging.INFO)
    # Their warnings are about what every run does on purpose: a new head, a deprecated name
    # that PEFT still reads, retries while there is no hub.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        kept = str(error) or "what was finished is kept"
        problem, code = f"stopped by {signal.Signals(number).name}; {kept}", 128 + number
    except Exception as error:
        told = explained(error)
        if told is None:
            raise
        problem, code = str(told), told.code
    else:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
    return code


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)
