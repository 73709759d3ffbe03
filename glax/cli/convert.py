"""Write the model of a run folder, or of a checkpoint of the Hub, as a checkpoint in the Hub's format.

glax convert runs/books books-hub
glax convert gla-1.3B-100B/ gla-1.3B-bf16/ --dtype bfloat16
"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

from glax.errors import UserError
from glax.interop import checkpoint_folder, load_model, read_config, save_model
from glax.training.restore import is_run, restore_run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """From where, to where, and how it is written."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, the folder of a checkpoint in the Hub's format, or OWNER/NAME on the Hub."""

    target: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it is made."""

    kind: Literal["gla", "retnet", "transformer", "llama"] | None = None
    """Format. None: the model's own; llama for softmax attention."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the tensors."""

    fused_mlp: bool = False
    """Gate and up of the MLP as one tensor, as in checkpoints before February 2025."""

    max_shard_gb: float = 5.0
    """A larger model is cut into files with an index."""


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="glax convert", description=__doc__)
    if not 0 < arguments.max_shard_gb < math.inf:
        raise UserError(f"max_shard_gb is {arguments.max_shard_gb}: it must be positive")
    if is_run(arguments.target):
        raise UserError(f"{arguments.target} is the folder of a run: choose another one to write")
    like = folder = None
    if is_run(arguments.source):
        model, _ = restore_run(arguments.source)
    else:
        folder = checkpoint_folder(arguments.source)
        if folder.resolve() == arguments.target.resolve():
            raise UserError(f"{arguments.target} is what is read: choose another folder to write")
        model, like = load_model(folder, dtype=jnp.dtype(arguments.dtype)), read_config(folder)
    save_model(
        model,
        arguments.target,
        kind=arguments.kind,
        dtype=arguments.dtype,
        fused_mlp=arguments.fused_mlp,
        max_shard_bytes=round(arguments.max_shard_gb * 1e9),
        like=like,
    )
    for path in sorted(folder.glob("*token*")) if folder is not None else ():
        shutil.copy(path, arguments.target)
    print(f"{arguments.target}: {model.config.num_parameters() / 1e6:.1f} M parameters in {arguments.dtype}")
