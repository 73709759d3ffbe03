"""A model into a checkpoint of the Hub's format, one tensor at a time."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from glax.errors import UserError
from glax.interop.configs import DEFAULTS, written_config
from glax.interop.files import NAMES, write_files
from glax.interop.names import Checkpoint, Tensor, tensors, theirs
from glax.models import LanguageModel, ModelConfig


def save_model(
    model: LanguageModel,
    folder: str | Path,
    *,
    kind: str | None = None,
    dtype: DTypeLike | None = None,
    fused_mlp: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    like: dict[str, Any] | None = None,
) -> None:
    """Write config.json and safetensors, which ``load_model``, fla or transformers read; with its dtype, bit for bit.

    Args:
      model: on one device or sharded over many, of one process or all.
      folder: made if need be; a checkpoint in it is replaced.
      kind: "gla", "retnet", "transformer" (fla's) or "llama"; None: the model's own, llama for softmax attention.
      dtype: of the tensors; the parameters' own when None.
      fused_mlp: gate and up of the MLP as one tensor, as checkpoints before February 2025 have it.
      max_shard_bytes: a larger model is cut into files with an index.
      like: a config.json whose fields that change nothing are kept.

    Raises:
      UserError: a model that the format cannot hold, by what; a folder that cannot be written.
    """
    config = model.config
    kind = kind or default_kind(config)
    if kind not in DEFAULTS:
        raise UserError(f'"{kind}" is no format: choose one of {", ".join(DEFAULTS)}')
    dtype = np.dtype(model.embedding.dtype if dtype is None else dtype)
    if dtype not in NAMES:
        raise UserError(f"dtype {dtype} cannot be written: choose float32, bfloat16 or float16")
    written = written_config(config, kind, str(dtype), like)
    fused_norm = written.get("fuse_norm", True) and config.output_gate
    wanted = tensors(config, Checkpoint(kind, fused_norm, fused_mlp and kind != "llama"))
    parts: dict[str, list[Tensor]] = {}
    for tensor in wanted:
        parts.setdefault(tensor.name, []).append(tensor)
    flat = {".".join(str(p) for p in path): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    def value(name: str):
        for tensor in parts[name]:
            yield _on_host(tensor, flat[tensor.path][...], dtype)

    folder = Path(folder)
    first = jax.process_index() == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = [(name, of_name[0].shape) for name, of_name in parts.items()]
        write_files(folder, shapes, dtype, value, max_shard_bytes, writes=first)
        if first:
            (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error}): choose another folder") from error


def default_kind(config: ModelConfig) -> str:
    """The format that a model is written in unless another is asked for."""
    kinds = {"gla": "gla", "retnet": "retnet", "attention": "transformer" if config.attention_window else "llama"}
    if config.mixer not in kinds:
        raise UserError(f"a model of {config.mixer} has no format of the Hub that can be written here")
    return kinds[config.mixer]


def _on_host(tensor: Tensor, parameter: jax.Array, dtype) -> np.ndarray:
    layer = 0 if tensor.layer is None else tensor.layer
    value = _turned(parameter, layer, tensor.turn, tensor.layer is not None, jnp.dtype(dtype))
    return np.asarray(value) if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True)


@functools.partial(jax.jit, static_argnames=("turn", "stacked", "dtype"))
def _turned(parameter, layer, turn, stacked, dtype):
    value = jax.lax.dynamic_index_in_dim(parameter, layer, 0, keepdims=False) if stacked else parameter
    return theirs(turn, value).astype(dtype)
