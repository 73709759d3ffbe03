"""The whole model: what its config promises, whatever the layers are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.errors import UserError
from glax.models import PRESETS, LanguageModel, ModelConfig
from glax.models.blocks import MIXERS, Block
from glax.models.config import Mixer

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    short_conv_width=3,
    attention_layers=(1,),
    attention_window=9,
    mlp_size=48,
    initializer_range=0.2,
    compute_dtype="float32",
    scan_layers=False,
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, TINY.vocab_size)
SEGMENTS = jnp.where(jnp.arange(24) < jnp.array([[10], [17]]), 1, 2)


def model_of(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0))


def loss(model: LanguageModel) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(model(TOKENS, segment_ids=SEGMENTS))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, jnp.roll(TOKENS, -1, 1)[..., None], -1))


loss_and_gradients = jax.jit(jax.value_and_grad(loss))
logits = jax.jit(LanguageModel.__call__)


def by_layer(model: LanguageModel) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by a name that does not depend on how blocks are stored."""
    arrays, depth = {}, 0
    for block in model.blocks:
        stacked = hasattr(block, "count")
        for index in range(block.count if stacked else 1):
            for path, leaf in jax.tree_util.tree_leaves_with_path(block.block if stacked else block):
                arrays[f"{depth}{jax.tree_util.keystr(path)}"] = leaf[index] if stacked else leaf
            depth += 1
    for name in ("embedding", "norm", "lm_head"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(model, name)):
            arrays[f"{name}{jax.tree_util.keystr(path)}"] = leaf
    return arrays


@pytest.fixture(scope="module")
def plain() -> tuple[float, dict[str, np.ndarray]]:
    value, gradients = loss_and_gradients(model_of(TINY))
    return value, by_layer(gradients)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": True, "unroll_layers": False},
        {"scan_layers": True, "unroll_layers": True},
        {"scan_layers": True, "remat": "full"},
        {"remat": "matmuls"},
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(plain, changes: dict):
    """The same initial parameters, loss and gradients as blocks in a loop that keep everything."""
    model = model_of(dataclasses.replace(TINY, **changes))
    parameters, expected = by_layer(model), by_layer(model_of(TINY))
    assert parameters.keys() == expected.keys()
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    value, gradients = loss_and_gradients(model)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    for name, gradient in by_layer(gradients).items():
        np.testing.assert_allclose(gradient, plain[1][name], atol=2e-6, err_msg=name)


def test_gpus_run_stacked_blocks_one_by_one(monkeypatch):
    """And however many there are, one is traced."""
    config = dataclasses.replace(TINY, scan_layers=True, mixer="attention", attention_layers=(), attention_window=None)
    model = jax.eval_shape(lambda: model_of(config))
    traced, forward = [], Block._forward

    def scans(model):
        jax.clear_caches()
        monkeypatch.setattr(Block, "_forward", lambda *arguments: traced.append(1) or forward(*arguments))
        return " scan[" in str(jax.make_jaxpr(lambda model: model.hidden(TOKENS))(model))

    assert scans(model)
    monkeypatch.setattr("glax.models.blocks.platform_of", lambda x: "gpu")
    traced.clear()
    assert not scans(model) and traced == [1]
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced.clear()
        assert not scans(model) and traced == [1]
        assert scans(jax.eval_shape(lambda: model_of(dataclasses.replace(config, remat="full"))))


def test_remat_keeps_less():
    """Counts what the backward pass is given: everything, the matrix products, or each block's input."""

    def kept(remat: str) -> int:
        config = dataclasses.replace(TINY, remat=remat, implementation="reference")
        model = jax.eval_shape(lambda: model_of(config))
        _, pullback = jax.eval_shape(lambda model: jax.vjp(lambda m: m.hidden(TOKENS), model), model)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("none") > 1.5 * kept("matmuls") > 1.5 * kept("full")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_runs_of_equal_blocks_are_stacked(scan_layers: bool):
    config = dataclasses.replace(TINY, num_layers=6, attention_layers=[5, 2], scan_layers=scan_layers)
    assert config.mixers == ("gla", "gla", "attention", "gla", "gla", "attention")
    model = jax.eval_shape(lambda: model_of(config))
    expected = [2, 1, 2, 1] if scan_layers else [1] * 6
    assert [getattr(block, "count", 1) for block in model.blocks] == expected


def test_nothing_passes_between_tokens_that_should_not():
    """The derivative of a hidden vector in later embeddings, or another segment's, is 0.0 exactly; else it is not."""
    config = dataclasses.replace(TINY, attention_window=None)
    model = model_of(config)
    first, length = 9, 24  # the last token of the first segment of row 0

    def influence(embeddings, position):
        one_token_each = dataclasses.replace(config, vocab_size=length)
        model_of_embeddings = model_of(one_token_each)
        for name in ("blocks", "norm"):
            setattr(model_of_embeddings, name, getattr(model, name))
        model_of_embeddings.embedding = nnx.Param(embeddings)
        hidden = model_of_embeddings.hidden(jnp.arange(length)[None], segment_ids=SEGMENTS[:1])
        return jnp.sum(jnp.sin(hidden[0, position]))

    embeddings = model.embedding[...][TOKENS[0]]
    gradient = jax.jit(jax.grad(influence))
    for position in (first, first + 1, 15, 23):
        seen = np.any(np.asarray(gradient(embeddings, position)) != 0, 1)
        expected = np.arange(length) <= position
        if position > first:
            expected &= np.arange(length) > first
        np.testing.assert_array_equal(seen, expected)


def test_segments_equal_rows_of_their_own():
    model = model_of(TINY)
    packed, alone = logits(model, TOKENS, segment_ids=SEGMENTS), logits(model, jnp.roll(TOKENS, -10, 1))
    np.testing.assert_allclose(packed[0, 10:], alone[0, :14], atol=2e-5)
    np.testing.assert_allclose(packed[1, :17], logits(model, TOKENS)[1, :17], atol=2e-5)


@pytest.mark.parametrize(
    "preset, millions", [("gla-340m", 374.475776), ("gla-1.3b", 1365.51424)], ids=["gla-340m", "gla-1.3b"]
)
def test_paper_sizes(preset: str, millions: float):
    """The counts of the published configurations: 374.5 M and 1365.5 M; with tied embeddings 341.7 M for the first."""
    config = PRESETS[preset]
    assert config.num_parameters() == round(millions * 1e6)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert config.num_parameters() - tied.num_parameters() == 32000 * config.hidden_size
    assert dataclasses.replace(config, scan_layers=False).num_parameters() == config.num_parameters()


@pytest.mark.parametrize("size", ["340m", "1.3b", "small-bytes"])
@pytest.mark.parametrize("model", ["transformer", "retnet", "mamba"])
def test_compared_models_have_as_many_parameters(model: str, size: str):
    assert PRESETS[f"{model}-{size}"].num_parameters() == pytest.approx(
        PRESETS[f"gla-{size}"].num_parameters(), rel=0.02
    )


def test_parameters_are_all_there_is():
    """Nothing but Params in the model, all float32: what trains is what is saved."""
    model = model_of(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    _, parameters = nnx.split(model, nnx.Param)
    leaves = jax.tree.leaves(parameters)
    assert sum(leaf.size for leaf in leaves) == model.config.num_parameters()
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_flops():
    """Counted by hand for one block of each kind."""
    config = ModelConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=2, attention_layers=(1,), mlp_size=32)
    gla = 4 * 64 * 64 + 64 * 16 + 16 * 32 + 3 * 64 * 32
    attention = 4 * 64 * 64 + 3 * 64 * 32
    mixing = 2 * (2 * 16 * 32 * 2) + 4 * 64 * (1 + 2 + 3 + 4 + 5) / 5
    expected = 6 * (gla + attention + 64 * 100) + 3 * mixing
    assert config.flops_per_token(5) == pytest.approx(expected)
    tied = dataclasses.replace(config, tie_embeddings=True, scan_layers=False)
    assert tied.flops_per_token(5) == pytest.approx(expected)
    window = dataclasses.replace(config, attention_window=2)
    assert window.flops_per_token(5) == pytest.approx(expected - 3 * 4 * 64 * (15 - (1 + 2 + 2 + 2 + 2)) / 5)


COMPARED = {
    "retnet": dataclasses.replace(TINY, mixer="retnet", attention_layers=(), short_conv_width=None),
    "mamba": dataclasses.replace(TINY, mixer="mamba", attention_layers=(), mlp_size=0),
    "scalar gate": dataclasses.replace(TINY, gate="scalar", num_kv_heads=None, attention_layers=(), num_layers=1),
}
AXES_COMPARED = {
    "gk_proj.kernel": ("embed", "heads"),
    "gk_proj.bias": ("heads",),
    "in_proj.kernel": ("embed", "mlp"),
    "z_proj.kernel": ("embed", "mlp"),
    "conv.weight": ("mlp", None),
    "conv.bias": ("mlp",),
    "x_proj.kernel": ("mlp", None),
    "dt_proj.kernel": (None, "mlp"),
    "dt_proj.bias": ("mlp",),
    "mixer.a_log": ("mlp", "state"),
    "mixer.d": ("mlp",),
    "out_proj.kernel": ("mlp", "embed"),
}
AXES = {
    "embedding": ("vocab", "embed"),
    "norm.weight": ("embed",),
    "lm_head.kernel": ("embed", "vocab"),
    "mixer_norm.weight": ("embed",),
    "mlp_norm.weight": ("embed",),
    "q_proj.kernel": ("embed", "heads"),
    "k_proj.kernel": ("embed", "kv_heads"),
    "v_proj.kernel": ("embed", "kv_heads"),
    "g_proj.kernel": ("embed", "heads"),
    "o_proj.kernel": ("heads", "embed"),
    "o_norm.weight": (None,),
    "gk_down.kernel": ("embed", "gate"),
    "gk_up.kernel": ("gate", "kv_heads"),
    "gk_up.bias": ("kv_heads",),
    "q_conv.weight": ("heads", None),
    "k_conv.weight": ("kv_heads", None),
    "v_conv.weight": ("kv_heads", None),
    "gate_proj.kernel": ("embed", "mlp"),
    "up_proj.kernel": ("embed", "mlp"),
    "down_proj.kernel": ("mlp", "embed"),
}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_names_its_axes(scan_layers: bool):
    model = jax.eval_shape(lambda: model_of(dataclasses.replace(TINY, scan_layers=scan_layers)))
    found = set()
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path[-2:]))
        found.add(name)
        stacked = ("layers",) if scan_layers and path[0] == "blocks" else ()
        assert parameter.get_metadata("out_sharding") == (*stacked, *AXES[name]), path
        assert len(parameter.get_metadata("out_sharding")) == parameter.ndim
    assert found == set(AXES)


@pytest.mark.parametrize("name", COMPARED)
def test_every_parameter_of_the_compared_names_its_axes(name: str):
    # Retention's keys and values have heads of their own number.
    axes = AXES | AXES_COMPARED | {f"{part}_proj.kernel": ("embed", "heads") for part in "kv" if name == "retnet"}
    for path, parameter in nnx.to_flat_state(nnx.state(jax.eval_shape(lambda: model_of(COMPARED[name])))):
        found, wanted = parameter.get_metadata("out_sharding"), axes[".".join(map(str, path[-2:]))]
        assert found == wanted and len(found) == parameter.ndim, path


@pytest.mark.parametrize("name", COMPARED)
def test_compared_models_keep_tokens_apart(name: str):
    """The later tokens of a row change nothing before them, another segment's nothing at all."""
    model, changed = model_of(COMPARED[name]), TOKENS.at[0, 12].add(1) % TINY.vocab_size
    before, after = (logits(model, tokens, segment_ids=SEGMENTS) for tokens in (TOKENS, changed))
    same = np.all(np.asarray(before) == np.asarray(after), -1)
    assert np.all(same[0, :12]) and np.all(same[1]) and not np.any(same[0, 12:])


def test_bfloat16_is_close():
    """Half precision in the products, float32 logits, the same answer but for rounding."""
    half = model_of(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    rounded, exact = logits(half, TOKENS), logits(model_of(TINY), TOKENS)
    assert jax.eval_shape(half.hidden, TOKENS).dtype == half.unembedding().dtype == jnp.bfloat16
    assert rounded.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_are_hidden_times_unembedding(tie_embeddings: bool):
    model = model_of(dataclasses.replace(TINY, num_layers=1, attention_layers=(0,), tie_embeddings=tie_embeddings))
    product = jax.jit(lambda model: model.hidden(TOKENS) @ model.unembedding())(model)
    np.testing.assert_allclose(product, logits(model, TOKENS), atol=1e-5)
    if tie_embeddings:
        np.testing.assert_array_equal(model.unembedding(), model.embedding[...].T)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_size": 0},
        {"mixer": "attention", "attention_heads": 4, "attention_kv_heads": 2},
        {"mixer": "retnet", "num_kv_heads": None},
        {"mixer": "mamba"},
        {"mixer": "mamba", "state_size": 8},
        {"gate": "scalar", "num_kv_heads": None},
        {"gate": "fixed", "num_kv_heads": None},
        {"gate": "none", "num_kv_heads": None},
        {"output_gate": False},
        {"feature_map": "relu"},
        {"clamp_min": -0.01},
        {"gate_temperature": 1.0},
        {"gate_rank": 4},
        {"expand_k": 1.0},
        {"expand_v": 2.0},
        {"num_kv_heads": None},
        {"short_conv_width": None},
        {"norm_eps": 0.1},
        {"initializer_range": 0.1},
        {"rope_base": 10.0},
        {"attention_window": 2},
    ],
    ids=str,
)
def test_every_option_arrives_in_the_computation(changes: dict):
    """The traced loss is another one. What each option computes is the layers' tests' business."""

    def traced(**changes):
        return str(jax.make_jaxpr(lambda: loss(model_of(dataclasses.replace(TINY, num_layers=2, **changes))))())

    assert traced() == traced()
    assert traced(**changes) != traced()


def test_implementation_is_the_operators():
    config = dataclasses.replace(TINY, implementation="no such kernel")
    with pytest.raises(ValueError, match="no such kernel"):
        jax.eval_shape(lambda: model_of(config)(TOKENS))


def test_mixers_have_makers():
    assert set(MIXERS) == set(Mixer.__args__)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 0}, "num_heads is 0: it must be at least 1"),
        ({"short_conv_width": 0}, "short_conv_width is 0"),
        ({"expand_k": 0.3}, "expand_k 0.3 x hidden_size 32 is 9.6: it must be a whole multiple of num_heads 2"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"attention_heads": 3}, "hidden_size 32 over 3 attention heads is no even width"),
        ({"attention_heads": 4, "attention_kv_heads": 3}, "attention_kv_heads 3 does not divide attention_heads 4"),
        ({"attention_layers": (3,)}, "attention_layers has 3: the model's 3 layers are 0 to 2"),
        ({"feature_map": "tanh"}, 'feature_map is "tanh": choose one of relu, sigmoid'),
        ({"remat": "some"}, 'remat is "some": choose one of none, full, matmuls'),
        ({"mixer": "mamba9"}, 'mixer is "mamba9": choose one of gla'),
        ({"compute_dtype": "int8"}, 'compute_dtype is "int8": choose one of bfloat16'),
        ({"gate_temperature": 0.0}, "gate_temperature is 0.0: it must be positive"),
        ({"mlp_size": -1}, "mlp_size is -1"),
        ({"clamp_min": 1.0}, "clamp_min is 1.0: it must not be positive"),
        ({"gate": "open"}, 'gate is "open": choose one of channel, scalar, fixed, none'),
        ({"gate": "fixed"}, 'gate "fixed" needs as many kv heads as heads: leave num_kv_heads out'),
        ({"mixer": "retnet", "num_heads": 32, "num_kv_heads": None, "expand_k": 1.0}, "heads of odd width"),
    ],
    ids=str,
)
def test_bad_configs(changes: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)
