"""The one kind of error that a user can mend, and how it is worded.

Every message says which file, option or column, what was expected, what was found and what to do. The command line
prints it as one line and exits with status 2; anything that is not a `UserError` is a fault of the program.
"""

from __future__ import annotations

import sys
from pathlib import Path


class UserError(Exception):
    """Input, an option or a state of the disk that the user can mend. The message is one clear sentence or two."""


class ConfigError(UserError):
    """A setting that does not exist, or a value that it cannot have."""


class StoreError(UserError):
    """A store that is missing, of another version, incomplete or damaged."""


class RunError(UserError):
    """A run folder that is missing, unfinished or does not fit what is asked of it."""


class InputError(UserError):
    """A CSV file, a folder or an option of a command that does not hold what it must."""


def command_line(command: str) -> str:
    """A command of this program as whoever runs it types it: after `mammopipe` where that is what is installed and was
    called, else after `python cli.py`, which a checkout has."""
    return f"mammopipe {command}" if Path(sys.argv[0]).name == "mammopipe" else f"python cli.py {command}"
