"""Cross entropy of a softmax over a large vocabulary, without the logits of all tokens at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import run_with_auto_axes, vary_alike
from .partition import shard_over_tokens_and_vocabulary


def softmax_cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "D vocab"],
    targets: Int[Array, "N"],
    *,
    block: int = 2048,
) -> Float[Array, "N"]:
    """Negative log likelihood of each target in nats: logsumexp(h W) - (h W)[target], float32.

    The logits of `block` tokens at most (over all devices) are held at a time, forward or backward. Products take
    bfloat16 operands when hidden and unembedding are both bfloat16, else float32 in full precision; sums are float32.
    Under jit each device works on its share of N and of vocab, and sums over devices are taken once: D is gathered.

    Raises ValueError naming argument, got, and wanted for a wrong rank, shape or dtype.
    """
    if hidden.ndim != 2 or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"hidden: got {hidden.dtype} of shape {hidden.shape}, wanted floats of shape [N, D]")
    tokens, width = hidden.shape
    if unembedding.ndim != 2 or unembedding.shape[0] != width:
        raise ValueError(f"unembedding: got shape {unembedding.shape}, wanted [D={width}, vocab]")
    if targets.shape != (tokens,) or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets: got {targets.dtype} of shape {targets.shape}, wanted integers of shape [N={tokens}]"
        )
    if block < 1:
        raise ValueError(f"block: got {block}, wanted at least 1")
    run = functools.partial(_cross_entropy, -(-tokens // block))
    return run_with_auto_axes(run, vary_alike(hidden, unembedding, targets), ["N D", "D vocab", "N"], ["N"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(blocks, hidden, unembedding, targets):
    return _forward(blocks, hidden, unembedding, targets)[0]


def _forward(blocks, hidden, unembedding, targets):
    sharded = shard_over_tokens_and_vocabulary(functools.partial(_forward_shard, blocks), "n d, d v, n -> n, n")
    loss, total = sharded(hidden, unembedding, targets)
    return loss, (hidden, unembedding, targets, total)


def _backward(blocks, residuals, d_loss):
    sharded = shard_over_tokens_and_vocabulary(
        functools.partial(_backward_shard, blocks), "n d, d v, n, n, n -> n d, d v"
    )
    return *sharded(*residuals, d_loss), None


_cross_entropy.defvjp(_forward, _backward)


def _forward_shard(blocks, hidden, unembedding, targets, *, token_axes, vocab_axes):
    """Loss and logsumexp of each token."""
    del token_axes
    first = _first_word(unembedding, vocab_axes)

    def one_block(_, rows):
        h, target = rows
        logits = _product("nd,dv->nv", h, unembedding)
        of_target = jnp.sum(jnp.where(_is_target(target - first, logits), logits, 0), -1)
        return None, (jax.nn.logsumexp(logits, -1), of_target)

    _, (total, of_target) = jax.lax.scan(one_block, None, _blocks(blocks, hidden, targets))
    total, of_target = (x.reshape(-1)[: targets.shape[0]] for x in (total, of_target))
    if vocab_axes:
        largest = jax.lax.pmax(total, vocab_axes)
        total = largest + jnp.log(jax.lax.psum(jnp.exp(total - largest), vocab_axes))
        of_target = jax.lax.psum(of_target, vocab_axes)
    return total - of_target, total


def _backward_shard(blocks, hidden, unembedding, targets, total, d_loss, *, token_axes, vocab_axes):
    """Gradients of hidden and unembedding; the logits are recomputed, block by block."""
    first = _first_word(unembedding, vocab_axes)

    def one_block(d_unembedding, rows):
        h, target, log_total, d = rows
        logits = _product("nd,dv->nv", h, unembedding)
        d_logits = d[:, None] * (jnp.exp(logits - log_total[:, None]) - _is_target(target - first, logits))
        d_logits = d_logits.astype(_operand_dtype(h, unembedding))
        d_hidden = jax.lax.psum(_product("nv,dv->nd", d_logits, unembedding), vocab_axes)
        return d_unembedding + _product("nd,nv->dv", h, d_logits), d_hidden.astype(h.dtype)

    d_unembedding, _ = vary_alike(jnp.zeros(unembedding.shape, jnp.float32), hidden)
    d_unembedding, d_hidden = jax.lax.scan(one_block, d_unembedding, _blocks(blocks, hidden, targets, total, d_loss))
    d_unembedding = jax.lax.psum(d_unembedding, token_axes)
    return d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], d_unembedding.astype(unembedding.dtype)


def _blocks(blocks, *rows):
    """[N, ...] to [blocks, N / blocks, ...], padded with zeros."""
    padding = -rows[0].shape[0] % blocks
    return tuple(jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(blocks, -1, *x.shape[1:]) for x in rows)


def _first_word(unembedding, vocab_axes):
    """The index in the vocabulary of this shard's first column."""
    return jax.lax.axis_index(vocab_axes) * unembedding.shape[1] if vocab_axes else 0


def _is_target(target, logits):
    return target[:, None] == jax.lax.broadcasted_iota(target.dtype, logits.shape, 1)


def _operand_dtype(x, y):
    return jnp.bfloat16 if x.dtype == y.dtype == jnp.bfloat16 else jnp.float32


def _product(equation, x, y):
    x, y = (z.astype(_operand_dtype(x, y)) for z in (x, y))
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
