"""Checkpoints of the Hub: read, written, refused."""

import dataclasses
import functools
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from glax.errors import UserError
from glax.interop import load_model, save_model
from glax.interop.configs import model_config, read_config
from glax.models import LanguageModel, ModelConfig
from glax.training import MeshConfig
from glax.training.sharding import make_mesh, use_mesh

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_size": 48,
    "compute_dtype": "float32",
}
MODELS = {
    "gla": ModelConfig(**SMALL),
    "gla, everything": ModelConfig(
        num_kv_heads=1, short_conv_width=3, tie_embeddings=True, clamp_min=-0.5, feature_map="relu", **SMALL
    ),
    "gla, no output gate": ModelConfig(output_gate=False, **SMALL),
    "hybrid": ModelConfig(attention_layers=(1,), attention_heads=4, attention_kv_heads=2, attention_window=7, **SMALL),
    "retnet": ModelConfig(mixer="retnet", expand_k=1.0, expand_v=2.0, **SMALL),
    "transformer": ModelConfig(mixer="attention", attention_window=5, rope_base=5000.0, **SMALL),
    "llama": ModelConfig(mixer="attention", attention_kv_heads=1, rope_base=500000.0, **SMALL),
}
forward = jax.jit(LanguageModel.__call__)


@functools.cache
def drawn(config: ModelConfig, scan_layers: bool = True) -> LanguageModel:
    """A model whose norms and biases are drawn too: ones and zeros would hide where they go."""
    model = LanguageModel(dataclasses.replace(config, scan_layers=scan_layers), rngs=nnx.Rngs(3))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape), leaf.dtype), model)


def flat(model: LanguageModel) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_same(a: LanguageModel, b: LanguageModel):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_is_the_same_model(name: str, tmp_path: Path):
    """Bit for bit, through one file and through many, with the config's every field."""
    model = drawn(MODELS[name])
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=9000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    in_many = {}
    for path in (tmp_path / "many").glob("*.safetensors"):
        in_many |= (part := load_file(path))
        assert all(index["weight_map"][tensor] == path.name for tensor in part)
    in_one = load_file(tmp_path / "one/model.safetensors")
    assert in_one.keys() == in_many.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in in_one.values())
    for folder in ("one", "many") if name == "hybrid" else ("many",):
        read = load_model(tmp_path / folder, compute_dtype="float32")
        assert_same(model, read)
        defaulted = dataclasses.replace(read.config, **dict.fromkeys(("attention_heads", "attention_kv_heads")))
        wanted = dataclasses.replace(model.config, **dict.fromkeys(("attention_heads", "attention_kv_heads")))
        assert defaulted == wanted
    tokens = jnp.arange(11)[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(read, tokens))


@pytest.mark.parametrize("name", ["gla, everything", "llama"])
def test_bfloat16_and_old_mlps(name: str, tmp_path: Path):
    """bfloat16 goes through unchanged; so does float32 through a fused gate and up, where the format knows it."""
    model = drawn(MODELS[name], scan_layers=False)
    save_model(model, tmp_path / "half", dtype="bfloat16")
    half = load_model(tmp_path / "half", dtype=jnp.bfloat16, scan_layers=False)
    for path, array in flat(half).items():
        np.testing.assert_array_equal(array, flat(model)[path].astype(jnp.bfloat16), err_msg=path)
    save_model(half, tmp_path / "again")
    first, again = (load_file(tmp_path / part / "model.safetensors") for part in ("half", "again"))
    assert all(np.array_equal(first[tensor], again[tensor]) for tensor in first)
    save_model(model, tmp_path / "fused", fused_mlp=True)
    fused = load_file(tmp_path / "fused/model.safetensors")
    if name != "llama":
        assert fused["model.layers.2.mlp.gate_proj.weight"].shape == (96, 32)
        assert not any("up_proj" in tensor for tensor in fused)
    assert_same(model, load_model(tmp_path / "fused", scan_layers=False))


@pytest.mark.parametrize("name", ["gla-base", "gla-conv-gqa-tied"])
def test_a_published_checkpoint_is_written_as_it_was(name: str, tmp_path: Path):
    """config.json, and the names, shapes and values of the tensors."""
    if not (SHARED / name).is_dir():
        pytest.skip("the golden checkpoints are not here")
    save_model(load_model(SHARED / name), tmp_path / "kept", like=read_config(SHARED / name))
    assert read_config(tmp_path / "kept") == read_config(SHARED / name)
    save_model(load_model(SHARED / name), tmp_path / "new")
    assert model_config(read_config(tmp_path / "new")) == model_config(read_config(SHARED / name))
    theirs = load_file(SHARED / name / "model.safetensors")
    for folder in ("kept", "new"):
        ours = load_file(tmp_path / folder / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for tensor in theirs:
            np.testing.assert_array_equal(ours[tensor], theirs[tensor])


LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 64,
}


def test_llama_of_transformers(tmp_path: Path):
    """A model of the transformers library, with the logits that it gave."""
    kept = load_file(Path(__file__).with_name("golden") / "llama.safetensors")
    tokens, logits = jnp.asarray(kept.pop("tokens")), kept.pop("logits")
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = load_model(tmp_path)
    np.testing.assert_allclose(forward(model, tokens), logits, atol=2e-4, rtol=1e-4)
    save_model(model, tmp_path / "again", like=LLAMA)
    assert LLAMA.items() <= read_config(tmp_path / "again").items()
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == kept.keys() and all(np.array_equal(again[name], kept[name]) for name in kept)


def retnet_logits(weights: dict[str, np.ndarray], config: dict, tokens: np.ndarray) -> np.ndarray:
    """fla's RetNet in NumPy, float64, from its tensors by name: one sequence, attention in its parallel form."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    norm = lambda x, weight: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config["norm_eps"]) * weight  # noqa: E731
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    heads, length = config["num_heads"], len(tokens)
    width = round(config["hidden_size"] * config["expand_k"]) // heads
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(width // 2) * 2 / width)
    cosine, sine = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    rotate = lambda x: x * cosine + np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], -1) * sine  # noqa: E731
    lag = np.arange(length)[:, None] - np.arange(length)
    decay = np.where(lag >= 0, (1 - 2.0 ** (-5 - np.arange(heads)))[:, None, None] ** np.maximum(lag, 0), 0)
    x = w["model.embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        of = lambda name, layer=layer: w[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
        h = norm(x, of("attn_norm"))
        q, k, v = ((h @ of(f"attn.{p}_proj").T).reshape(length, heads, -1) for p in "qkv")
        scores = np.einsum("thk,shk->hts", rotate(q), rotate(k)) * width**-0.5 * decay
        o = norm(np.einsum("hts,shv->thv", scores, v), of("attn.g_norm_swish_gate")).reshape(length, -1)
        x = x + (o * silu(h @ of("attn.g_proj").T)) @ of("attn.o_proj").T
        h = norm(x, of("mlp_norm"))
        x = x + (silu(h @ of("mlp.gate_proj").T) * (h @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_retnet_is_flas(tmp_path: Path):
    model = drawn(dataclasses.replace(MODELS["retnet"], initializer_range=0.2))
    save_model(model, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, 23)
    want = retnet_logits(load_file(tmp_path / "model.safetensors"), read_config(tmp_path), tokens)
    got = forward(load_model(tmp_path), jnp.asarray(tokens)[None])[0]
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 1e-5


@pytest.mark.parametrize("name", ["gla, everything", "llama"])
def test_into_a_mesh(name: str, tmp_path: Path):
    """Each parameter lies as training would have it, with the values that one device has; and is written from there."""
    save_model(drawn(MODELS[name]), tmp_path / "one")
    want = load_model(tmp_path / "one")
    tensor = 2 if MODELS[name].num_kv_heads is None and name != "llama" else 1
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=tensor))):
        got = load_model(tmp_path / "one")
        assert_same(want, got)
        kernel = flat_arrays(got)["blocks.0.block.mlp.down_proj.kernel"]
        assert kernel.addressable_shards[0].data.shape == (3, 48 // tensor, 16)
        save_model(got, tmp_path / "two")
    one, two = (load_file(tmp_path / part / "model.safetensors") for part in ("one", "two"))
    assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)


def flat_arrays(model):
    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("fsdp", [1, 4])
def test_host_memory_is_that_of_the_largest_part(fsdp: int, tmp_path: Path):
    """NumPy's allocations while a model is read, and while it is written, which is many times as large."""
    config = ModelConfig(vocab_size=4096, hidden_size=256, num_layers=3, num_heads=2, mlp_size=4096)
    largest, others = 4 * 4096 * 256, 2**19
    assert 4 * config.num_parameters() > 11 * largest
    save_model(drawn(config), tmp_path)

    def peak(run) -> int:
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with use_mesh(make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:fsdp])):
        model = load_model(tmp_path)  # compiles
        assert peak(lambda: load_model(tmp_path)) < largest / fsdp + others
        assert peak(lambda: save_model(model, tmp_path / "again")) < largest + others


def damaged(folder: Path, change) -> Path:
    save_model(drawn(MODELS["gla"]), folder)
    tensors, config = load_file(folder / "model.safetensors"), read_config(folder)
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NORM = "model.layers.1.attn_norm.weight"
DAMAGE = {
    "missing": (lambda t, c: t.pop(NORM), f"lacks 1 tensors of this model, the first {NORM}"),
    "extra": (lambda t, c: t.update({"model.layers.9.x": t[NORM]}), "no use for, the first model.layers.9.x"),
    "misshaped": (
        lambda t, c: t.update({NORM: t[NORM][:5]}),
        f"{NORM} has shape \\[5\\] and config.json makes it \\[32",
    ),
    "dtype": (lambda t, c: t.update({NORM: t[NORM].astype(np.int32)}), f"{NORM} has dtype I32"),
    "unknown model": (lambda t, c: c.update(model_type="rwkv6"), 'model_type "rwkv6": the models known here are gla'),
    "unknown field": (lambda t, c: c.update(window="7"), 'window "7", which is not known for gla'),
    "value gates": (lambda t, c: c.update(use_gv=True), "use_gv true: only false is supported"),
    "no weights in norms": (lambda t, c: c.update(elementwise_affine=False), "elementwise_affine false: only true"),
    "activation": (lambda t, c: c.update(hidden_act="powlu"), 'hidden_act "powlu": only "swish"'),
    "attention biases": (
        lambda t, c: c.update(attn={"layers": [0], "num_heads": 2, "qkv_bias": True}),
        "attn.qkv_bias true",
    ),
    "shared convolution": (
        lambda t, c: c.update(use_short_conv=True, share_conv_kernel=True),
        "share_conv_kernel true",
    ),
    "bad value": (lambda t, c: c.update(num_kv_heads=3), "num_kv_heads 3 does not divide"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path):
    change, message = DAMAGE[name]
    with pytest.raises(UserError, match=message):
        load_model(damaged(tmp_path, change))


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    save_model(drawn(MODELS["gla"]), tmp_path, max_shard_bytes=20000)
    path = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model-00002.*model.layers.* is cut short, 100 bytes are missing"):
        load_model(tmp_path)
    path.write_bytes(whole[:5])
    with pytest.raises(UserError, match=r"model-00002.*cannot be read"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing, with .* tensors, the first model.layers"):
        load_model(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        load_model(tmp_path / "absent")


def test_old_names_and_buffers_are_understood(tmp_path: Path):
    def change(tensors, config):
        config["rms_norm_eps"] = config.pop("norm_eps")
        config["share_conv_kernel"] = True
        tensors["model.layers.0.attn.rotary.inv_freq"] = np.ones(4, np.float32)

    assert load_model(damaged(tmp_path, change)).config.norm_eps == 1e-6


@pytest.mark.parametrize(
    "config, kind, message",
    [
        (ModelConfig(mixer="mamba", **SMALL), None, "mamba has no format"),
        (ModelConfig(gate_rank=8, **SMALL), None, "gate_rank 8, which the gla format cannot hold"),
        (MODELS["gla"], "llama", "cannot hold|no place"),
        (MODELS["gla"], "rwkv", '"rwkv" is no format'),
        (MODELS["transformer"], "llama", "window, which the llama format cannot hold"),
    ],
)
def test_what_a_format_cannot_hold_is_named(config: ModelConfig, kind: str | None, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        save_model(drawn(config), tmp_path, kind=kind)
