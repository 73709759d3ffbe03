"""The adapter to lm-evaluation-harness (needs glax[eval])."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glax.errors import UserError
from glax.evaluation.perplexity import log_likelihoods, scored
from glax.models import Decoder, LanguageModel, choose_rows

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError('lm-evaluation-harness is not installed: run pip install "glax[eval]"') from error

# complete(contexts, until, max_new_tokens, temperature) -> texts
Complete = Callable[[Sequence[str], tuple[str, ...], int, float], list[str]]


class HarnessModel(LM):
    """A model as the harness sees it.

    Requests go in batches of ``batch_size``, longest first. A context that several requests share, as the choices of a
    question do, is read once, and its state is used for each.

    Args:
        model: the model, or a ``decoder`` of it.
        tokenizer: see ``glax.data.Tokenizer``.
        complete: continues texts, for generate_until.
        batch_size: rows at once.
        start_token: put before every text, as in training; None: only where there is no context.
    """

    def __init__(
        self,
        model: LanguageModel | Decoder,
        tokenizer,
        complete: Complete,
        *,
        batch_size: int = 16,
        start_token: int | None = None,
    ):
        super().__init__()
        self._model, self._tokenizer, self._complete = model, tokenizer, complete
        self._batch_size, self._start = batch_size, start_token

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        pairs = [self._encoded(*request.args) for request in requests]
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            contexts.setdefault(context, []).append(index)
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(contexts, key=lambda context: (-len(context), context))
        for first in range(0, len(order), self._batch_size):
            batch = order[first : first + self._batch_size]
            asked = [(row, index) for row, context in enumerate(batch) for index in contexts[context]]
            asked.sort(key=lambda item: -len(pairs[item[1]][1]))
            room = _size(max(len(pairs[index][1]) for _, index in asked))
            read = self._read(batch, room)
            for begin in range(0, len(asked), self._batch_size):
                part = asked[begin : begin + self._batch_size]
                rows, continuations = [row for row, _ in part], [pairs[index][1] for _, index in part]
                results |= zip((index for _, index in part), self._score(read, rows, continuations), strict=True)
        answers = [results[index] for index in range(len(pairs))]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Each text whole, with the state carried on: no token is predicted from a shortened context."""
        texts = [np.asarray(self._tokenizer.encode(request.args[0]), np.int32) for request in requests]
        start = self._tokenizer.eos_id if self._start is None else self._start
        scores = log_likelihoods(self._model, texts, start_token=start, batch_size=self._batch_size)
        answers = [float(np.sum(row, dtype=np.float64)) for row in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests) -> list[str]:
        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(index)
        answers: dict[int, str] = {}
        for settings, indices in groups.items():
            indices = sorted(indices, key=lambda index: -len(requests[index].args[0]))
            for first in range(0, len(indices), self._batch_size):
                batch = indices[first : first + self._batch_size]
                answers |= zip(batch, self._complete([requests[i].args[0] for i in batch], *settings), strict=True)
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _encoded(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of both, the continuation's as they are after the context; white space goes to the continuation."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole = [int(token) for token in self._tokenizer.encode(context + continuation)]
        count = len(self._tokenizer.encode(context)) if context else 0
        count = min(count, len(whole) - 1)
        first = [] if self._start is None else [self._start]
        if not first and not count:
            first = [self._tokenizer.eos_id]
        return (*first, *whole[:count]), tuple(whole[count:])

    def _read(self, contexts, room):
        rows = [*contexts, *[contexts[-1]] * (self._batch_size - len(contexts))]
        tokens, lengths = _padded(rows)
        return _read_contexts(self._model, tokens, lengths, room=room)

    def _score(self, read, rows, continuations) -> list[tuple[float, bool]]:
        count = len(rows)
        rows = np.array([*rows, *[rows[-1]] * (self._batch_size - count)], np.int32)
        tokens, lengths = _padded([*continuations, *[continuations[-1]] * (self._batch_size - count)])
        sums, greedy = _score_continuations(self._model, read, rows, tokens, lengths)
        return [(float(a), bool(b)) for a, b in zip(sums[:count], greedy[:count], strict=True)]


@functools.partial(jax.jit, static_argnames="room")
def _read_contexts(model, tokens, lengths, *, room):
    """Log probabilities of the token after each context, and the states after them."""
    state = model.init_state(tokens.shape[0], tokens.shape[1] + room)
    logits, state = model.prefill(tokens, state, lengths=lengths)
    return jax.nn.log_softmax(logits), state


@jax.jit
def _score_continuations(model, read, rows, tokens, lengths):
    """Of each continuation the log likelihood, and whether greedy decoding would have given it."""
    first, state = read
    first, state = first[rows], choose_rows(model, state, rows)
    hidden, _ = model.read(tokens, state, lengths=lengths)
    language_model = model.model if isinstance(model, Decoder) else model
    after, best_after = scored(language_model, hidden[:, :-1], tokens[:, 1:])
    begin = jnp.take_along_axis(first, tokens[:, :1], 1)
    best_begin = jnp.argmax(first, -1)[:, None] == tokens[:, :1]
    there = jnp.arange(tokens.shape[1]) < lengths[:, None]
    scores = jnp.where(there, jnp.concatenate([begin, after], 1), 0)
    best = jnp.where(there, jnp.concatenate([best_begin.astype(jnp.float32), best_after], 1), 1)
    return jnp.sum(scores, 1), jnp.all(best > 0, 1)


def _settings(options: dict[str, Any]) -> tuple[tuple[str, ...], int, float]:
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
    return tuple(s for s in until if s), int(options.get("max_gen_toks", options.get("max_tokens", 256))), temperature


def _padded(rows):
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), _size(lengths.max())), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def _size(length) -> int:
    """A power of two, so that few shapes are compiled."""
    return max(8, 1 << int(length - 1).bit_length())


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    include_defaults: bool = True,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """The harness's metrics of each task. Raises UserError for an unknown task, or one whose data cannot be had."""
    manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f'the harness knows no task "{unknown[0]}": see lm-eval ls tasks')
    try:
        results = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the data of these tasks cannot be had ({reason}): check the network") from error
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in results["results"].items()
    }
