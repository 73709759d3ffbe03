"""Prepare data ahead of training (``python -m glax.data``), check it, and say what there is."""

import sys

import tyro

from glax.data.config import DataConfig
from glax.data.preparation import prepare
from glax.errors import exit_code


def report(args: list[str] | None, prog: str) -> None:
    """Prepare what the command line names, verify it, and print its sizes."""
    data = prepare(tyro.cli(DataConfig, args=args, prog=prog, description=__doc__))
    for name, store in (("train", data.train), ("validation", data.validation)):
        store.verify()
        sizes = f"{store.num_documents} documents, {store.num_bytes} bytes, {store.num_tokens} tokens"
        print(f"{name}: {sizes} in {store.path}")


def main(args: list[str] | None = None) -> int:
    return exit_code(lambda: report(args, prog="python -m glax.data"))


if __name__ == "__main__":
    sys.exit(main())
