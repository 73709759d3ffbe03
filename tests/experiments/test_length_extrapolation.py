"""Reading past the training length: segments carry the state and stop the gradient; the smallest run is whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byte_text import window_loss
from glax.models import LanguageModel, ModelConfig
from length_extrapolation import Arguments, main, model_config, parse, segment_loss

CONFIG = ModelConfig(
    vocab_size=19,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    mlp_size=0,
    compute_dtype="float32",
    initializer_range=0.3,
    implementation="reference",  # compiles fastest
)
WINDOWS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 13)), jnp.int32)


def test_segments_carry_the_state_and_no_gradient():
    graph, params = nnx.split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)

    def whole(params):
        return window_loss(nnx.merge(graph, params), WINDOWS)

    def in_segments(params):
        return segment_loss(nnx.merge(graph, params), WINDOWS, 3)

    def with_states_of(others, params):
        """The loss of three segments whose initial states other parameters made."""
        model, frozen, total = nnx.merge(graph, params), nnx.merge(graph, others), 0.0
        for segment in range(3):
            tokens = WINDOWS[:, : 4 * segment + 5]
            state = frozen.init_state(2, 12)
            if segment:
                _, state = frozen.read(tokens[:, : 4 * segment], state)
            hidden, _ = model.read(tokens[:, 4 * segment : -1], state)
            log_probability = jax.nn.log_softmax(hidden @ model.unembedding())
            total -= jnp.mean(jnp.take_along_axis(log_probability, tokens[:, 4 * segment + 1 :, None], -1)) / 3
        return total

    whole_loss, whole_gradient = jax.jit(jax.value_and_grad(whole))(params)
    loss, gradient = jax.jit(jax.value_and_grad(in_segments))(params)
    expected = jax.jit(jax.grad(with_states_of, 1))(params, params)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), gradient, whole_gradient)
    assert max(jax.tree.leaves(differences)) > 1e-3


def test_models_have_glas_parameters_within_two_percent():
    arguments = Arguments(width=256, layers=4)
    gla, *others = (model_config(m, arguments).num_parameters() for m in ("gla", "retnet", "mamba", "transformer"))
    assert [abs(other / gla - 1) < 0.02 for other in others] == [True] * 3


def test_forms():
    assert parse("gla") == ("gla", 1, 1)
    assert parse("mamba:x4") == ("mamba", 4, 1)
    assert parse("gla:12s") == ("gla", 12, 12)


def test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the cat sees the dog and the dog sees the cat. " * 400)
    command = ["--data", str(tmp_path / "text.txt"), "--trainings", "gla:2s", "--width", "32"]
    command += ["--layers", "1", "--length", "16", "--batch", "8", "--steps", "60", "--times", "4"]
    command += ["--implementation", "reference"]  # compiles fastest
    assert main([*command, "--results", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "length_extrapolation.json").read_text())
    [segmented] = content["rows"]
    assert (segmented["training"], segmented["segments"], segmented["training_length"]) == ("gla:2s", 2, 32)
    perplexity = np.array(segmented["perplexity"])
    assert perplexity.shape == (2, 8) and segmented["tokens"] == 60 * 128
    assert 1 < perplexity[:, 1].max() < 12 < 264
    past = perplexity[:, 2:].mean()
    assert past < 1.2 * perplexity[:, 1].mean(), "the state is used as trained, and stays good"
    assert (tmp_path / "length_extrapolation.png").exists()
    assert "gla:2s: step 60/60" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trainings", "gla:8"], 'trainings has "gla:8": write gla, retnet'),
        (["--trainings", "transformer:2s"], "a transformer no segments"),
        (["--times", "1"], "times is 1"),
        (["--length", "7"], "length an even number"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
