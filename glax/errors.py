"""Errors that a user can cause and mend."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from the user. The message is one complete line that says what is wrong and what to do about it.

    Command-line entry points print it as ``error: <message>`` and exit with code 2; anything else is a bug and keeps
    its traceback.
    """


class Stopped(Exception):
    """A run ended before its last step because it was told to, with all it has done saved. The message is a line."""


def exit_code(command: Callable[[], None]) -> int:
    """Run ``command`` and give the process's exit code: 0, 2 after a UserError, 130 after Ctrl-C, 143 after SIGTERM.

    141, without a word, where whoever read the output has left, as ``head`` does.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor a word at exit, of what was not written
        return 141
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0
