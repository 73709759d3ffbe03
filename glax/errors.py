"""Errors that a user can cause and mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from the user. The message is one complete line that says what is wrong and what to do about it.

    Command-line entry points print it as ``error: <message>`` and exit with code 2; anything else is a bug and keeps
    its traceback.
    """


def exit_code(command: Callable[[], None]) -> int:
    """Run ``command`` and give the exit code of the process: 0, 2 after a UserError, 130 after Ctrl-C."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0
