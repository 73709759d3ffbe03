"""Continuing prompts: they are read at once by the parallel form, then a compiled loop goes token by token."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from glax.errors import UserError
from glax.inference.sampling import Sampling, sample
from glax.models import Decoder, LanguageModel, check_room, repeat_rows

Model = LanguageModel | Decoder
State = list[Any]


class Decoding(NamedTuple):
    """Where the rows of a batch stand.

    Attributes:
        state: the model's, after all tokens so far.
        logits: of the next token.
        done: rows that have had their stop token.
        key: of the random draws to come.
    """

    state: State
    logits: Float[Array, "B vocab"]
    done: Bool[Array, "B"]
    key: PRNGKeyArray


def generate(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    prefix: State | None = None,
) -> Int[Array, "B max_new_tokens"]:
    """Continue each prompt.

    Args:
      model: the model, or ``glax.models.decoder`` of it, which is faster at GLA's steps.
      tokens: prompts, each from the start of its row; what follows is padding and has no influence.
      lengths: of the prompts, 1 to T; T when None.
      max_new_tokens: tokens to generate.
      temperature, top_k, top_p: see ``Sampling``. Temperature 0 takes the most likely token.
      seed: of the draws.
      stop_token: a row ends with it; the rest of the row is filled with it. None: no row ends early.
      prefix: state after what stands before the prompts, see ``read_prefix``; one for each prompt, or one for all.

    Returns:
      the new tokens, int32.

    Raises:
      UserError: prompts, lengths or settings that cannot be used.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    check_seed(seed)
    check_prompts(model, tokens, lengths)
    if prefix is not None:
        check_room(model, prefix, max_new_tokens + int(tokens.shape[1] if lengths is None else np.max(lengths)))
    decoding = start(model, tokens, lengths, max_new_tokens=max_new_tokens, seed=seed, prefix=prefix)
    return advance(model, decoding, count=max_new_tokens, sampling=sampling, stop_token=stop_token)[0]


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def start(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None,
    *,
    max_new_tokens: int,
    seed: int | Int[Array, ""],
    prefix: State | None = None,
) -> Decoding:
    """Read the prompts, with room for ``max_new_tokens`` more where a state grows with them.

    ``prefix``, the state before the prompts, stays as it is; it must have been made with the room.
    """
    batch, length = tokens.shape
    fresh = prefix is None
    state = model.init_state(batch, length + max_new_tokens) if fresh else repeat_rows(model, prefix, batch)
    logits, state = model.prefill(tokens, state, lengths=lengths)
    return Decoding(state, logits, jnp.zeros(batch, bool), jax.random.key(seed))


def read_prefix(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    *,
    room: int,
    state: State | None = None,
    piece: int = 8192,
) -> State:
    """The state after ``tokens``, to be gone on from many times.

    ``lengths``: as in ``generate``, 0 included. ``room``: tokens that may follow, prompts included; it matters to
    softmax attention without a window only. ``state``: after what stands before. At most ``piece`` tokens are read at
    once, so that a long text takes no more memory than a short one.
    """
    check_prompts(model, tokens, None)
    batch, length = tokens.shape
    lengths = np.full(batch, length, np.int32) if lengths is None else np.asarray(lengths)
    piece = min(piece, 2 ** max(4, (length - 1).bit_length()))
    tokens = np.pad(np.asarray(tokens), ((0, 0), (0, -length % piece)))
    if state is not None:
        check_room(model, state, int(lengths.max()))
    else:
        state = _fresh(model, batch, length + room)
    for first in range(0, tokens.shape[1], piece):
        state = _read(model, tokens[:, first : first + piece], state, np.clip(lengths - first, 0, piece))
    return state


@functools.partial(jax.jit, static_argnames=("batch", "max_length"))
def _fresh(model, batch, max_length):
    return model.init_state(batch, max_length)


@jax.jit
def _read(model, tokens, state, lengths):
    return model.read(tokens, state, lengths=lengths)[1]


@functools.partial(jax.jit, static_argnames=("count", "sampling", "stop_token"), donate_argnames="decoding")
def advance(
    model: Model, decoding: Decoding, *, count: int, sampling: Sampling, stop_token: int | None
) -> tuple[Int[Array, "B count"], Decoding]:
    """The next ``count`` tokens, by one loop that ends early once all rows are done. ``decoding`` is used up.

    A second call goes on where the first one ended, with the draws that one longer call would have made.
    """
    batch = decoding.done.shape[0]
    filler = 0 if stop_token is None else stop_token

    def unfinished(carry):
        index, _, decoding = carry
        return (index < count) & ~jnp.all(decoding.done)

    def step(carry):
        index, tokens, decoding = carry
        greedy = sampling.temperature == 0  # draws nothing
        key, draw = (decoding.key, decoding.key) if greedy else jax.random.split(decoding.key)
        token = sample(decoding.logits, draw, sampling)
        done = decoding.done
        if stop_token is not None:
            token = jnp.where(done, filler, token)
            done |= token == stop_token
        logits, state = model.step(token, decoding.state)
        return index + 1, tokens.at[:, index].set(token), Decoding(state, logits, done, key)

    carry = (jnp.int32(0), jnp.full((batch, count), filler, jnp.int32), decoding)
    if stop_token is None:
        # The number of steps is known, so that a GPU need not ask the host after each.
        carry = jax.lax.fori_loop(0, count, lambda _, carry: step(carry), carry)
    else:
        carry = jax.lax.while_loop(unfinished, step, carry)
    return carry[1], carry[2]


def check_prompts(model: Model, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None) -> None:
    """Raises UserError for shapes, lengths or tokens that cannot be used."""
    if tokens.ndim != 2 or min(tokens.shape) < 1:
        raise UserError(f"prompts have shape {tokens.shape}: give [batch, length], both at least 1")
    if lengths is not None:
        if lengths.shape != tokens.shape[:1]:
            raise UserError(f"lengths have shape {lengths.shape}: give one for each of the {tokens.shape[0]} prompts")
        if np.min(lengths) < 1 or np.max(lengths) > tokens.shape[1]:
            raise UserError(f"lengths are {np.min(lengths)} to {np.max(lengths)}: they must be 1 to {tokens.shape[1]}")
    least, most, vocab_size = np.min(tokens), np.max(tokens), model.config.vocab_size
    if least < 0 or most >= vocab_size:
        raise UserError(f"prompts have tokens from {least} to {most}: the model knows 0 to {vocab_size - 1}")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that jax cannot take."""
    if not -(2**31) <= seed < 2**31:
        raise UserError(f"seed is {seed}: give a number from 0 to {2**31 - 1}")
