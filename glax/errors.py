"""Errors that a user can cause and mend."""


class UserError(ValueError):
    """Bad input from the user. The message is one complete line that says what is wrong and what to do about it.

    Command-line entry points print it as ``error: <message>`` and exit with code 2; anything else is a bug and keeps its
    traceback.
    """
