"""Imports run one way: experiments -> glax -> kernels, and what uses models knows nothing of what else does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "glax/layers": {"kernels"},
    "glax/models": {"kernels", "glax/layers"},
    "glax/data": set(),
    "glax/training": {"kernels", "glax/data", "glax/models"},
    "glax/inference": {"glax/models"},
    "glax/interop": {"glax/models"},
    "glax/evaluation": {"glax/models"},
}


def imported(file: Path) -> Iterator[str]:
    """Modules of glax, kernels and experiments that a file imports by name, anywhere in it."""
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        yield from (name for name in names if name.split(".")[0] in {"glax", "kernels", *experiments})


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            path = name.replace(".", "/")
            near = {path.split("/")[0], "/".join(path.split("/")[:2])}
            assert near & {room, "glax/errors", *MAY_IMPORT[room]}, f"{file.relative_to(ROOT)} imports {name}"
