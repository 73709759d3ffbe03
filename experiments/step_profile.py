"""Where the time of a training step goes on a GPU: the kernels of a profiler trace, added up by part of the model."""

import re
from pathlib import Path

import jax

# Scopes of the model and the training step, the innermost first. XLA fuses across them as it likes: what it fused
# counts where its result belongs. "rest" is the embedding, casts of parameters, and what carries no scope.
SCOPES = ("operator", "mixer", "mlp", "norm", "loss", "optimizer")


def kernel_times(folder: Path, steps: int) -> dict[tuple[str, str], list[float]]:
    """The device's kernels in a profiler trace: milliseconds and launches per step, by kernel and XLA's instruction."""
    [file] = folder.rglob("*.xplane.pb")
    times: dict[tuple[str, str], list[float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                instruction = next((str(value) for name, value in event.stats if name == "hlo_op"), event.name)
                entry = times.setdefault((event.name[:90], instruction), [0.0, 0])
                entry[0] += event.duration_ns / 1e6 / steps
                entry[1] += 1 / steps
    return times


def scopes_of(hlo: str) -> dict[str, str]:
    """Of each instruction in a compiled program's text the part of the model or the step that it belongs to."""
    scopes = {}
    for instruction, operation in re.findall(r"%([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo):
        names = re.split(r"[/()]", operation)
        scopes[instruction] = next((scope for scope in SCOPES if scope in names), "rest")
    return scopes


def profile_by_part(times: dict[tuple[str, str], list[float]], scopes: dict[str, str], count: int = 40) -> dict:
    """Milliseconds and launches per step of each part, and of the kernels that take longest."""
    parts, kernels = {}, {}
    for (kernel, instruction), value in times.items():
        for sums, name in ((parts, scopes.get(instruction, "rest")), (kernels, kernel)):
            sums[name] = [total + one for total, one in zip(sums.get(name, (0, 0)), value, strict=True)]
    kernels = sorted(kernels.items(), key=lambda item: -item[1][0])
    rest = [sum(value[i] for _, value in kernels[count:]) for i in (0, 1)]
    kernels = dict(kernels[:count]) | {"all others": rest}
    rounded = [{name: [round(x, 3) for x in value] for name, value in sums.items()} for sums in (parts, kernels)]
    return {"profile_ms": rounded[0], "kernels_ms": rounded[1]}
