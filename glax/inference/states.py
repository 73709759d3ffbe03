"""States of models, saved to a file and read again."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glax.errors import UserError
from glax.models import Decoder, LanguageModel, ModelConfig

# Fields of a config that change neither what a model computes nor what its state is.
INDIFFERENT = ("remat", "scan_layers", "unroll_layers", "implementation", "initializer_range")


def save_state(path: str | Path, model: LanguageModel | Decoder, state: list[Any]) -> None:
    """Write a state, so that ``load_state`` reads it back bit for bit, into the same model or a ``decoder`` of it."""
    layers = model.by_layer(state)
    tensors = {name: np.asarray(leaf) for name, leaf in _named(layers).items()}
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, {"glax_state": json.dumps(_identity(model))})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the state {path} ({error}): choose another place") from error


def load_state(path: str | Path, model: LanguageModel | Decoder) -> list[Any]:
    """The state in ``path``. Raises UserError where it is none, or is of another model."""
    try:
        with safe_open(path, "np") as file:
            written = json.loads((file.metadata() or {}).get("glax_state", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read the state {path} ({error}): save it again") from error
    if written is None:
        raise UserError(f"{path} is no saved state: give a file that --save-state wrote")
    here = _identity(model)
    if written != here:
        differing = [name for name in here if written.get(name) != here[name]]
        raise UserError(f"the state {path} is of another model ({', '.join(differing)} differ): read the text again")
    abstract = jax.eval_shape(lambda model: model.by_layer(model.init_state(1, 1)), model)
    names = list(_named(abstract))
    if set(names) != set(tensors):
        raise UserError(f"the state {path} lacks {(set(names) ^ set(tensors)).pop()}: save it again")
    layers = jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(tensors[name]) for name in names])
    return model.by_element(layers)


def _named(layers: list[Any]) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(layers)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _identity(model: LanguageModel | Decoder) -> dict[str, Any]:
    """What must be equal for a state to be of use: the config, and a few numbers that stand for the weights."""
    config: ModelConfig = model.config
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in INDIFFERENT}
    language_model = model.model if isinstance(model, Decoder) else model
    # In the compute dtype, which a decoder's copy has.
    some = language_model.embedding[:8].astype(config.dtype).astype(jnp.float32)
    norm = language_model.norm.weight[...].astype(jnp.float32)
    return json.loads(json.dumps(fields)) | {"weights": [float(jnp.sum(some)), float(jnp.sum(jnp.square(norm)))]}
