"""The model of a run, from its folder alone."""

import dataclasses
import logging
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from glax.errors import UserError
from glax.models import LanguageModel
from glax.training.config import TrainConfig
from glax.training.run_folder import read_run_config
from glax.training.sharding import make_mesh, use_mesh
from glax.training.state import plan_state


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(folder) / "checkpoints").is_dir() and (Path(folder) / "config.json").is_file()


def restore_run(folder: str | Path, step: int | None = None) -> tuple[LanguageModel, TrainConfig]:
    """The model of the newest checkpoint in a run folder, or of the one after ``step``, and the run's config.

    The optimiser's moments are not read. Raises UserError where there is no checkpoint, or none that can be read.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet: train until the first is written")
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint {step}: there are {', '.join(map(str, steps))}")
    logging.getLogger("absl").setLevel(logging.ERROR)
    mesh = make_mesh(dataclasses.replace(config.mesh, data=None, fsdp=1, tensor=1, sequence=1), jax.devices()[:1])
    with use_mesh(mesh):
        plan = plan_state(config, mesh)
        wanted = {name: getattr(plan.abstract, name) for name in plan.abstract.__dataclass_fields__}
        wanted = {
            name: value if name == "params" else jax.tree.map(lambda _: ocp.PLACEHOLDER, value)
            for name, value in wanted.items()
        }
        problem = None
        for number in reversed(steps if step is None else [step]):
            try:
                loaded = ocp.load_checkpointables((folder / "checkpoints" / str(number)).absolute(), {"state": wanted})
                return plan.build(loaded["state"]["params"]), config
            except Exception as error:  # orbax raises many kinds for a damaged file
                problem = error
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
    raise UserError(f"no checkpoint in {folder} can be read ({reason})") from problem
