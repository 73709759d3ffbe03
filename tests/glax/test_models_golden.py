"""Logits, loss and every gradient of two checkpoints, against the PyTorch implementation that made them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glax.interop import load_model
from glax.interop.configs import read_config
from glax.interop.names import layout_of, ours, tensors

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"


def relative_rms(got, want) -> float:
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


@pytest.mark.parametrize("name, scan_layers", [("gla-base", False), ("gla-conv-gqa-tied", True)])
def test_golden_checkpoint(name: str, scan_layers: bool):
    checkpoint = GOLDEN / name
    if not checkpoint.is_dir():
        pytest.skip(f"the golden checkpoints are not here ({checkpoint.parent.name}/{name})")
    expected = np.load(checkpoint / "io.npz")
    model = load_model(checkpoint, scan_layers=scan_layers)
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)

    def loss(model):
        logits = model(tokens)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)
        return -jnp.mean(chosen), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    assert relative_rms(np.asarray(logits), expected["logits"]) < 1e-4
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(gradients, nnx.Param))}
    hub = read_config(checkpoint)
    compared = set()
    for tensor in tensors(model.config, layout_of(hub, {})):
        gradient = flat[tensor.path] if tensor.layer is None else flat[tensor.path][tensor.layer]
        error = relative_rms(np.asarray(gradient), np.asarray(ours(tensor.turn, expected[f"grad/{tensor.name}"])))
        assert error < 1e-3, f"{tensor.name}: {error}"
        compared.add(f"grad/{tensor.name}")
    assert compared == {name for name in expected.files if name.startswith("grad/")}
