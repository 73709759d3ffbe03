"""Decoding token by token against the parallel form, which knows nothing of states."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx

from glax.data import load_tokenizer
from glax.errors import UserError
from glax.inference import (
    Sampling,
    TextStream,
    advance,
    complete,
    generate,
    read_prefix,
    save_state,
    start,
    stream,
)
from glax.inference.sampling import sample
from glax.models import PRESETS, LanguageModel

# Large initial weights: an untrained model's tokens then depend on all that was before, and argmax has no near ties.
BASE = dataclasses.replace(
    PRESETS["gla-tiny"], vocab_size=61, mlp_size=96, compute_dtype="float32", initializer_range=0.2
)
MODELS = {
    "gla": BASE,
    "gla, scanned": dataclasses.replace(BASE, scan_layers=True),
    "convolution, grouped heads": dataclasses.replace(BASE, num_kv_heads=1, short_conv_width=4, tie_embeddings=True),
    "hybrid": dataclasses.replace(
        BASE, num_layers=3, attention_layers=(1,), attention_heads=4, attention_kv_heads=2, scan_layers=True
    ),
    "scalar gate": dataclasses.replace(BASE, gate="scalar"),
    "fixed gate": dataclasses.replace(BASE, gate="fixed"),
    "retnet": dataclasses.replace(BASE, mixer="retnet", expand_k=1.0, expand_v=2.0),
    "mamba": dataclasses.replace(BASE, mixer="mamba", expand_v=2.0, mlp_size=0),
    "transformer": dataclasses.replace(BASE, mixer="attention", attention_heads=4),
    "hybrid, window": dataclasses.replace(BASE, attention_layers=(0,), attention_heads=4, attention_window=5),
}
PIECES = ["convolution, grouped heads", "hybrid", "hybrid, window", "scalar gate", "retnet", "mamba"]
# Every kind of mixer, over many tokens.
LONG = {
    "gla, five kernels": dataclasses.replace(BASE, scan_layers=True, num_kv_heads=1),
    "retnet": dataclasses.replace(
        PRESETS["retnet-tiny"],
        **{name: getattr(BASE, name) for name in ("vocab_size", "mlp_size", "compute_dtype", "initializer_range")},
    ),
    "mamba": dataclasses.replace(
        PRESETS["mamba-tiny"], vocab_size=61, compute_dtype="float32", initializer_range=0.2, scan_layers=True
    ),
    "transformer": dataclasses.replace(
        PRESETS["transformer-tiny"], vocab_size=61, mlp_size=96, compute_dtype="float32", initializer_range=0.2
    ),
    "hybrid, convolution": dataclasses.replace(BASE, attention_layers=(0,), attention_window=9, short_conv_width=4),
}
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5], [50, 1, 22, 9]]
NEW = 24


@functools.cache
def model_of(name: str) -> LanguageModel:
    return jax.jit(lambda: LanguageModel((MODELS | LONG)[name], rngs=nnx.Rngs(1)))()


def padded(prompts: list[list[int]], filler: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), lengths.max()), filler, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_is_the_argmax_of_the_parallel_form(name: str):
    """Prompts of three lengths in one batch; what stands in the padding does not matter."""
    model = model_of(name)
    tokens, lengths = padded(PROMPTS, filler=13)
    new = np.asarray(generate(model, tokens, lengths, max_new_tokens=NEW, temperature=0.0))
    rows, row_lengths = padded([prompt + list(row) for prompt, row in zip(PROMPTS, new, strict=True)], filler=0)
    best = np.asarray(jnp.argmax(jax.jit(lambda model, tokens: model(tokens))(model, rows), -1))
    for row, length, chosen in zip(best, row_lengths, new, strict=True):
        np.testing.assert_array_equal(row[length - NEW - 1 : length - 1], chosen)
    assert len(set(new.ravel())) > 10, "the model repeats itself: the comparison would see little"


@pytest.mark.parametrize("name", PIECES)
def test_a_state_goes_on(name: str):
    """Reading in pieces, some rows with nothing in a piece, leaves what reading at once does."""
    model = model_of(name)
    tokens = jax.random.randint(jax.random.key(0), (3, 20), 0, 61)
    read = jax.jit(lambda model, tokens, state, lengths: model.read(tokens, state, lengths=lengths))
    whole = jax.jit(lambda model, tokens: model.hidden(tokens))(model, tokens)
    state = model.init_state(3, 20)
    first = jnp.array([6, 10, 0])
    hidden, state = read(model, tokens[:, :10], state, first)
    for row, count in enumerate(first):
        np.testing.assert_allclose(hidden[row, :count], whole[row, :count], atol=2e-5)
    rest = jnp.stack([jnp.roll(row, -count)[:10] for row, count in zip(tokens, first, strict=True)])
    hidden, _ = read(model, rest, state, jnp.full(3, 10))
    for row, count in enumerate(first):
        np.testing.assert_allclose(hidden[row], whole[row, count : count + 10], atol=2e-5)


@pytest.mark.parametrize("name", PIECES)
def test_a_state_is_of_the_last_segment(name: str):
    """The first segment goes on from the state before, the last one leaves the state after; padding ends no segment."""
    model = model_of(name)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 61)
    read = jax.jit(model.read)
    _, state = read(tokens[:, :6], model.init_state(2, 24))
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
    hidden, state = read(tokens[:, 6:18], state, segment_ids=segments, lengths=jnp.array([11, 12]))
    last, _ = read(tokens[:, 18:], state)

    whole = jax.jit(model.hidden)
    joined = whole(tokens)
    np.testing.assert_allclose(hidden[0, :5], joined[0, 6:11], atol=2e-5)
    np.testing.assert_allclose(hidden[1], joined[1, 6:18], atol=2e-5)
    np.testing.assert_allclose(last[1], joined[1, 18:], atol=2e-5)
    second_segment = jnp.concatenate([tokens[:, 11:17], tokens[:, 18:], jnp.zeros((2, 12), tokens.dtype)], 1)
    alone = whole(second_segment)
    np.testing.assert_allclose(hidden[0, 5:11], alone[0, :6], atol=2e-5)
    np.testing.assert_allclose(last[0], alone[0, 6:12], atol=2e-5)


def test_streaming_is_generation_in_pieces():
    model = model_of("hybrid")
    tokens, lengths = padded(PROMPTS, filler=0)
    sampling = Sampling(temperature=0.8, top_k=20)
    whole = generate(model, tokens, lengths, max_new_tokens=12, temperature=0.8, top_k=20, seed=3)
    decoding = start(model, tokens, lengths, max_new_tokens=12, seed=3)
    pieces = []
    for _ in range(3):
        piece, decoding = advance(model, decoding, count=4, sampling=sampling, stop_token=None)
        pieces.append(piece)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    other = generate(model, tokens, lengths, max_new_tokens=12, temperature=0.8, top_k=20, seed=4)
    assert np.any(np.asarray(other) != np.asarray(whole))


def test_a_stop_token_ends_its_row_alone():
    model = model_of("gla")
    tokens, lengths = padded(PROMPTS, filler=0)
    free = np.asarray(generate(model, tokens, lengths, max_new_tokens=NEW, temperature=0.0))
    stop = int(free[0, 5])
    stopped = np.asarray(generate(model, tokens, lengths, max_new_tokens=NEW, temperature=0.0, stop_token=stop))
    for row, expected in zip(stopped, free, strict=True):
        end = list(expected).index(stop) if stop in expected else NEW
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert np.all(row[end:] == stop)


def test_state_has_one_size():
    """Constant for recurrent layers and windows; softmax attention without one needs to be told its room."""
    sizes = {
        name: [sum(leaf.size for leaf in jax.tree.leaves(model_of(name).init_state(1, length))) for length in (8, 64)]
        for name in ("gla", "retnet", "mamba", "hybrid", "hybrid, window")
    }
    for name in ("gla", "retnet", "mamba", "hybrid, window"):
        assert sizes[name][0] == sizes[name][1]
    assert sizes["hybrid"][0] < sizes["hybrid"][1]
    with pytest.raises(ValueError, match="max_length"):
        model_of("hybrid").init_state(1)


LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [25 / 34.5, 6.25 / 34.5, 2.25 / 34.5, 1 / 34.5]),
        (Sampling(temperature=0.0), [1, 0, 0, 0]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # 0.5 and 0.25 are 5/9 + 2.5/9 > 0.8 of what top_k leaves
    ],
)
def test_sampled_frequencies(sampling: Sampling, expected: list[float]):
    draws = sample(jnp.tile(LOGITS, (20000, 1)), jax.random.key(0), sampling)
    frequencies = np.bincount(draws, minlength=4) / 20000
    np.testing.assert_allclose(frequencies, expected, atol=0.015)
    np.testing.assert_array_equal(frequencies == 0, np.array(expected) == 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": jnp.array([1, 4, 0])}, "lengths are 0 to 4: they must be 1 to 9"),
        ({"lengths": jnp.array([1, 4])}, "one for each of the 3 prompts"),
        ({"tokens": jnp.full((3, 9), 61)}, "tokens from 61 to 61: the model knows 0 to 60"),
        ({"tokens": jnp.zeros(3, jnp.int32)}, "give \\[batch, length\\]"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_requests(change: dict, message: str):
    tokens, lengths = padded(PROMPTS, filler=0)
    arguments = {"tokens": tokens, "lengths": lengths, "max_new_tokens": 4} | change
    with pytest.raises(UserError, match=message):
        generate(model_of("gla"), **arguments)


class Words:
    """A tokenizer of few words, to see texts end where they should."""

    name, fingerprint, vocab_size, bos_id, eos_id = "words", "words", 61, 0, 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f"{int(i)} " for i in ids)


def test_text_streams_to_its_stop():
    """Pieces join to the completion; a stop string across tokens ends its row alone, and is no part of the text."""
    model, words = model_of("gla"), Words()
    prompts = ["7", "3 1 4 1 5 9"]
    options = {"max_new_tokens": 40, "sampling": Sampling(temperature=0.0)}
    free = complete(model, words, prompts, **options)
    assert [row.reason for row in free] == ["length", "length"]
    assert [len(row.tokens) for row in free] == [40, 40]
    third, fourth = free[0].tokens[20:22]
    stop = f"{third} {fourth} "
    pieces = [""] * 2
    for texts, so_far, _ in stream(model, words, prompts, stop=[stop], **options):
        streams = so_far
        pieces = [before + text for before, text in zip(pieces, texts, strict=True)]
    for row, (text, wanted) in enumerate(zip(pieces, free, strict=True)):
        assert text == wanted.text.split(stop)[0]
        assert streams[row].text == text
    assert streams[0].reason == "stop string" and len(pieces[0]) < len(free[0].text)
    ended = complete(model, words, prompts, end_token=int(free[0].tokens[5]), **options)
    first = free[0].tokens.index(free[0].tokens[5])
    assert ended[0].reason == "end" and ended[0].tokens == free[0].tokens[:first]
    sampled = {"max_new_tokens": 20, "sampling": Sampling(temperature=1.0, top_p=0.9)}
    same = [complete(model, words, prompts, seed=seed, **sampled) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_a_stream_keeps_back_what_is_not_certain():
    """The bytes of half a character, and the beginning of a stop string, until it is none."""
    text_stream = TextStream(load_tokenizer("bytes"), stop=["END"], limit=100)
    given = [text_stream.add([byte]) for byte in "aé EN EEND tail".encode()]
    assert given[:6] == ["a", "", "é", " ", "", ""]
    assert "".join(given) == "aé EN E" and text_stream.text == "aé EN E"
    assert text_stream.reason == "stop string"
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(load_tokenizer("bytes"), stop=[""])
    cut = TextStream(load_tokenizer("bytes"), stop=["xyz"], limit=3)
    assert cut.add(b"axyq") == "axy" and cut.reason == "length"


def test_the_space_before_a_first_word():
    """It is the word's with SentencePiece, which leaves it out at the beginning of a text."""
    model = io.BytesIO()
    options = {"vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 2}
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(["red cat sees red cat"] * 9), model_writer=model, **options)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "cat sees red"
    tokens = tokenizer.encode(text)
    for count in range(len(tokens)):
        text_stream = TextStream(tokenizer, before=tokens[:count][-1:], stop=["never"])
        rest = "".join(text_stream.add([token]) for token in tokens[count:])
        assert tokenizer.decode(tokens[:count]) + rest == text


def test_a_state_without_room_is_refused():
    """Keys beyond the cache would take the place of the first ones, without a word."""
    model, prompt = model_of("transformer"), np.array([[9]])
    state = read_prefix(model, np.array([[3, 1, 4]]), room=4)
    assert generate(model, prompt, max_new_tokens=3, prefix=state).shape == (1, 3)
    with pytest.raises(UserError, match="has room for 4 tokens more, and 5 are to follow"):
        generate(model, prompt, max_new_tokens=4, prefix=state)
    with pytest.raises(UserError, match="has room for 4 tokens more, and 6 are to follow"):
        read_prefix(model, np.ones((1, 6), int), room=0, state=state)
    with pytest.raises(UserError, match="has room for 4 tokens more, and 9 are to follow"):
        complete(model, load_tokenizer("bytes"), ["\t"], max_new_tokens=8, prefix=state)


def test_a_state_in_no_folder(tmp_path):
    model = model_of("gla")
    with pytest.raises(UserError, match="cannot write the state"):
        save_state(tmp_path / "absent" / "state", model, model.init_state(1))
