"""The model that a command is given: a run's folder, a checkpoint's, or its name on the Hub."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from glax.data import Tokenizer, check_vocabulary, load_tokenizer
from glax.errors import UserError
from glax.interop import checkpoint_folder, load_model, read_config
from glax.models import Decoder, LanguageModel, cast, decoder
from glax.training.restore import is_run, restore_run


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to be used, with its tokenizer.

    Attributes:
        model: parameters in the compute dtype.
        start_token: what a text starts with: the end token for our runs, as in training; bos for the Hub's.
        name: of the folder.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    start_token: int
    name: str

    def decoder(self) -> Decoder | LanguageModel:
        """The model for generation."""
        return decoder(self.model)


def open_source(path: str, tokenizer: str | None, compute_dtype: str | None, implementation: str | None) -> Source:
    """Load what ``path`` names. Raises UserError where it names nothing, or its tokenizer is not there."""
    if is_run(path):
        model, config = restore_run(path)
        changes = {"compute_dtype": compute_dtype or config.model.compute_dtype, "implementation": implementation}
        model = _with(cast(model, jnp.dtype(changes["compute_dtype"])), changes)
        chosen = load_tokenizer(tokenizer or config.data.tokenizer)
        _check(model, chosen)
        return Source(model, chosen, chosen.eos_id, Path(path).name)
    folder = checkpoint_folder(path)
    read_config(folder)  # says what is wrong with a folder that is no checkpoint's
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options = {"compute_dtype": compute_dtype, "implementation": implementation}
    if tokenizer is None and not (folder / "tokenizer.model").is_file():
        raise UserError(f'{path} has no tokenizer.model: give --tokenizer "mistral", "bytes" or a SentencePiece file')
    chosen = load_tokenizer(tokenizer or str(folder / "tokenizer.model"))
    model = load_model(folder, dtype=jnp.dtype(compute_dtype), **options)
    _check(model, chosen)
    return Source(model, chosen, chosen.bos_id, Path(path).name)


def check_place(path: Path | None) -> None:
    """Raises UserError where no file can stand at ``path``: what would be written there may take hours."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{path} is no place for a file: choose one in a folder that exists")


def _check(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raises UserError where the model lacks tokens, or its named implementation does not run here."""
    check_vocabulary(tokenizer, model.config.vocab_size)
    if model.config.implementation is None:
        return
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    try:
        jax.eval_shape(lambda model, tokens: model.prefill(tokens, model.init_state(1, 16)), model, tokens)
    except (NotImplementedError, ValueError) as error:
        raise UserError(str(error)) from error


def _with(model: LanguageModel, changes: dict) -> LanguageModel:
    """The same parameters in a model whose config has these changes."""
    from flax import nnx

    from glax.models.accounting import abstract_model

    graph, _ = nnx.split(abstract_model(dataclasses.replace(model.config, **changes)), nnx.Param)
    return nnx.merge(graph, nnx.state(model, nnx.Param))
