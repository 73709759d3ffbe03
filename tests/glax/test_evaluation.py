"""Perplexity and the harness's adapter against sums by hand."""

import dataclasses
import functools
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.data import load_tokenizer
from glax.errors import UserError
from glax.evaluation import TABLES, log_likelihoods, perplexity, table_text
from glax.evaluation.tables import row
from glax.inference import complete
from glax.models import PRESETS, LanguageModel, decoder

TEXTS = ["A first  document,\nof some length: é.", "Short.", "And a third one that is the longest of all of them."]
KINDS = {
    "gla": dataclasses.replace(PRESETS["gla-tiny"], short_conv_width=4, scan_layers=True),
    "hybrid": dataclasses.replace(PRESETS["gla-tiny"], attention_layers=(1,)),
}
bytes_ = load_tokenizer("bytes")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: glax[eval]"
)


@functools.cache
def model_of(kind: str) -> LanguageModel:
    config = dataclasses.replace(KINDS[kind], compute_dtype="float32", initializer_range=0.2, mlp_size=96)
    return LanguageModel(config, rngs=nnx.Rngs(0))


forward = jax.jit(LanguageModel.__call__)


def by_hand(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
    """Log likelihood of each token of a continuation, from one pass over all, and whether all are the argmax."""
    tokens = [*context, *continuation]
    logits = np.asarray(forward(model, jnp.asarray(tokens + [0] * (128 - len(tokens)))[None])[0], np.float64)
    rows = logits[len(context) - 1 : len(tokens) - 1]
    chosen = rows[np.arange(len(continuation)), continuation] - np.log(np.sum(np.exp(rows), -1))
    return chosen, bool(np.all(rows.argmax(-1) == continuation))


@pytest.mark.parametrize("kind", KINDS)
def test_segments_and_single_tokens_are_one_piece(kind: str):
    documents = [bytes_.encode(text) for text in TEXTS]
    wanted = [by_hand(model_of(kind), [bytes_.eos_id], list(map(int, document)))[0] for document in documents]
    for segment, batch_size in ((64, 2), (8, 3), (1, 3)):
        options = {"start_token": bytes_.eos_id, "segment": segment, "batch_size": batch_size}
        for got, want in zip(log_likelihoods(model_of(kind), documents, **options), wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_perplexity_by_token_word_byte_and_position():
    model = model_of("gla")
    wanted = [by_hand(model, [bytes_.eos_id], list(map(int, bytes_.encode(text))))[0] for text in TEXTS]
    nats = -sum(scores.sum() for scores in wanted)
    result = perplexity(model, bytes_, [*TEXTS, ""], segment=16, batch_size=2, bucket=32).as_json()
    size = sum(len(text.encode()) for text in TEXTS)
    words = 7 + 1 + 12
    assert (result["tokens"], result["bytes"], result["words"]) == (size, size, words)
    assert result["token_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    second = np.concatenate([scores[32:64] for scores in wanted])
    assert [bucket["first"] for bucket in result["by_position"]] == [0, 32]
    assert result["by_position"][1]["tokens"] == len(second)
    assert result["by_position"][1]["token_perplexity"] == pytest.approx(math.exp(-second.mean()), rel=1e-5)
    with pytest.raises(UserError, match="no text to evaluate"):
        perplexity(model, bytes_, [""])
    nothing = types.SimpleNamespace(encode=lambda text: [], eos_id=0)  # as SentencePiece makes of white space
    with pytest.raises(UserError, match="no text to evaluate"):
        perplexity(model, nothing, [" "])


CONTEXTS = ["The sky is", "Two and two make", "The sky is"]
CHOICES = [[" blue", " a very long answer", "x"], [" four", " five"], [" red", " green"]]


@pytest.fixture(scope="module")
def harness_model():
    from glax.evaluation.harness import HarnessModel

    fast = decoder(model_of("hybrid"))

    def continued(contexts, until, max_new_tokens, temperature):
        options = {"max_new_tokens": max_new_tokens, "start_token": bytes_.eos_id, "stop": until}
        return [done.text for done in complete(fast, bytes_, contexts, sampling=greedy(temperature), **options)]

    return HarnessModel(fast, bytes_, continued, batch_size=3, start_token=bytes_.eos_id)


def greedy(temperature):
    from glax.inference import Sampling

    return Sampling(temperature=temperature)


@pytest.fixture
def local_tasks(tmp_path):
    """A multiple-choice, a rolling and a generating task over local files, in the harness's own format."""
    rows = [
        {"q": context, "choices": choices, "answer": index % 2, "text": text}
        for index, (context, choices, text) in enumerate(zip(CONTEXTS, CHOICES, TEXTS, strict=True))
    ]
    (tmp_path / "data.json").write_text("\n".join(json.dumps(row) for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/data.json\ntest_split: train\n"
    (tmp_path / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\n" + common + 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: answer\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    (tmp_path / "roll.yaml").write_text(
        "task: roll\noutput_type: loglikelihood_rolling\n" + common + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (tmp_path / "go.yaml").write_text(
        "task: go\noutput_type: generate_until\n" + common + 'doc_to_text: "{{q}}"\ndoc_to_target: "{{text}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n  do_sample: false\nmetric_list:\n'
        "  - metric: exact_match\n"
    )
    return tmp_path


@needs_harness
def test_the_harness_gives_the_scores_computed_by_hand(harness_model, local_tasks, monkeypatch):
    from glax.evaluation.harness import evaluate

    monkeypatch.setenv("HF_HOME", str(local_tasks / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    results = evaluate(harness_model, ["choose", "roll", "go"], include_path=str(local_tasks), include_defaults=False)
    model = model_of("hybrid")
    right, right_normed = [], []
    for index, (context, choices) in enumerate(zip(CONTEXTS, CHOICES, strict=True)):
        before = [bytes_.eos_id, *map(int, bytes_.encode(context))]
        sums = [by_hand(model, before, list(map(int, bytes_.encode(choice))))[0].sum() for choice in choices]
        right.append(int(np.argmax(sums)) == index % 2)
        right_normed.append(int(np.argmax([s / len(c) for s, c in zip(sums, choices, strict=True)])) == index % 2)
    assert results["choose"]["acc"] == pytest.approx(np.mean(right))
    assert results["choose"]["acc_norm"] == pytest.approx(np.mean(right_normed))
    nats = -sum(by_hand(model, [bytes_.eos_id], list(map(int, bytes_.encode(text))))[0].sum() for text in TEXTS)
    assert results["roll"]["word_perplexity"] == pytest.approx(math.exp(nats / 20), rel=1e-4)
    size = sum(len(text.encode()) for text in TEXTS)
    assert results["roll"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
    assert results["go"]["exact_match"] == 0.0


@needs_harness
def test_requests_one_by_one(harness_model):
    """Sums, greedy flags and continuations of each request, contexts shared, empty, and ending in white space."""
    from lm_eval.api.instance import Instance

    pairs = [(c, choice) for c, choices in zip(CONTEXTS, CHOICES, strict=True) for choice in choices]
    pairs += [("", "alone"), ("with space ", "after")]
    model = model_of("hybrid")
    context = [bytes_.eos_id, *map(int, bytes_.encode("The sky is"))]
    best = int(np.argmax(forward(model, jnp.asarray(context + [0] * 100)[None])[0, len(context) - 1]))
    if best < 128:
        pairs.append(("The sky is", chr(best)))

    def ask(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]

    got = harness_model.loglikelihood(ask("loglikelihood", pairs))
    for (before, after), (score, is_greedy) in zip(pairs, got, strict=True):
        kept = before.rstrip()
        ids = [bytes_.eos_id, *map(int, bytes_.encode(kept))]
        want, want_greedy = by_hand(model, ids, list(map(int, bytes_.encode(before[len(kept) :] + after))))
        assert score == pytest.approx(want.sum(), abs=2e-4), (before, after)
        assert is_greedy == want_greedy
    rolled = harness_model.loglikelihood_rolling(ask("loglikelihood_rolling", [(text,) for text in TEXTS]))
    for text, score in zip(TEXTS, rolled, strict=True):
        want = by_hand(model, [bytes_.eos_id], list(map(int, bytes_.encode(text))))[0].sum()
        assert score == pytest.approx(want, abs=1e-3)
    options = {"until": ["zz"], "max_gen_toks": 5, "do_sample": False}
    texts = harness_model.generate_until(ask("generate_until", [(c, options) for c in CONTEXTS[:2]]))
    for before, text in zip(CONTEXTS, texts, strict=False):
        ids = [bytes_.eos_id, *map(int, bytes_.encode(before))]
        for _ in range(5):
            ids.append(int(np.argmax(forward(model, jnp.asarray(ids + [0] * (128 - len(ids)))[None])[0, len(ids) - 1])))
        assert text == bytes_.decode(ids[-5:])


@needs_harness
def test_the_papers_tasks_are_in_the_harness(harness_model):
    from lm_eval.tasks import TaskManager

    from glax.evaluation.harness import evaluate

    known = TaskManager().all_tasks
    for table in TABLES.values():
        assert set(table.tasks) <= set(known)
    with pytest.raises(UserError, match='knows no task "no_such_task"'):
        evaluate(harness_model, ["no_such_task"], include_defaults=False)


def test_a_table_has_this_model_and_the_papers():
    table = TABLES["table2"]
    results = {column.task: {} for column in table.columns}
    for number, column in enumerate(table.columns):
        results[column.task][column.metric] = 0.1 * (number + 1)
    values = row(table, results)
    assert values == pytest.approx((0.1, 0.2, 30, 40, 50, 60, 70, 80, 55))
    lines = table_text(table, "ours", values).splitlines()
    assert lines[2] == "| ours | 0.10 | 0.20 | 30.0 | 40.0 | 50.0 | 60.0 | 70.0 | 80.0 | 55.0 |"
    gla = "| GLA 1.3B, 100B (paper) | 17.22 | 14.47 | 46.9 | 71.8 | 49.8 | 53.9 | 57.2 | 26.6 | 51.0 |"
    assert lines[-1] == gla
    for name, numbers in table.paper.items():
        assert np.mean(numbers[2:8]) == pytest.approx(numbers[8], abs=0.11), name
    assert all(len(numbers) == 3 for numbers in TABLES["table3"].paper.values())
