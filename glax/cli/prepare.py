"""Tokenize text ahead of training, check it, and say what there is."""

from glax.data.__main__ import report


def run(argv: list[str]) -> None:
    report(argv, prog="glax prepare")
