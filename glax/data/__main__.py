"""Prepare data ahead of training (``python -m glax.data``), check it, and say what there is."""

import sys

import tyro

from glax.data.config import DataConfig
from glax.data.preparation import prepare
from glax.errors import UserError


def main(args: list[str] | None = None) -> int:
    config = tyro.cli(DataConfig, args=args, prog="python -m glax.data", description=__doc__)
    try:
        data = prepare(config)
        for name, store in (("train", data.train), ("validation", data.validation)):
            store.verify()
            print(
                f"{name}: {store.num_documents} documents, {store.num_bytes} bytes, {store.num_tokens} tokens "
                f"in {store.path}"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
