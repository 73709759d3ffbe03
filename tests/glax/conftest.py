import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glax.data import DataConfig
from glax.models import PRESETS
from glax.training import OptimizerConfig, TrainConfig


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of words, some shorter and some longer than a row, and one folder to validate on."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "a", "one", "two", "red", "blue", "cat", "dog", "bird", "sees", "hears", "finds", "and", "never"]
    draw = random.Random(0)
    for part, documents in (("train", 60), ("validation", 5)):
        (folder / part).mkdir()
        for index in range(documents):
            text = " ".join(draw.choices(words, k=draw.randrange(5, 120)))
            (folder / part / f"{index:02}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_config(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """``tiny_config(**fields)``: a run of twenty steps of a tiny float32 model.

    The length, 192, is the only size in it that is a multiple of 3: an array whose number of elements is one has a
    token axis, whatever it was reshaped to.
    """
    data = DataConfig(
        train=str(text_folder / "train"),
        validation=str(text_folder / "validation"),
        cache=str(tmp_path_factory.mktemp("cache")),
        sequence_length=192,
        batch_size=8,
    )
    model = dataclasses.replace(PRESETS["gla-tiny"], vocab_size=320, compute_dtype="float32", scan_layers=True)
    config = TrainConfig(
        model=model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        steps=20,
        evaluate_every=10,
        checkpoint_every=10,
    )
    return lambda **fields: dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory: pytest.TempPathFactory):
    """For modules that start one training run after another: what the first compiles, the others read."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_remove_custom_partitioning_ptr_from_cache_key": True,  # an address: every trace has its own
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
