"""The ``glax`` command."""

import importlib
import sys

from glax.errors import UserError, exit_code

COMMANDS = {
    "train": "train a language model on your text; a run is a folder that continues when it is started again",
    "generate": "continue a prompt with the model of a run, or of a checkpoint of the Hub, as the tokens come",
    "evaluate": "perplexity of text, tasks of lm-evaluation-harness, and the paper's Tables 2 and 3",
    "convert": "write a run, or a checkpoint of the Hub, in the Hub's format",
    "prepare": "tokenize text ahead of training, check it, and say what there is",
}
USAGE = "\n".join([
    "usage: glax COMMAND ...",
    "",
    *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
    "",
    "glax COMMAND --help lists every setting with its default. A first round, on a CPU, in minutes:",
    "",
    "  glax train --name first",
    '  glax generate runs/first --prompt "import "',
    "  glax evaluate runs/first --text README.md",
    "  glax convert runs/first first-for-the-hub",
])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it is done, 2 after bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    code = exit_code(lambda: run(argv[0], argv[1:]))
    if argv[0] == "train":
        from glax.training import abandon

        abandon(code)
    return code


def run(command: str, argv: list[str]) -> None:
    if command not in COMMANDS:
        raise UserError(f'"{command}" is no command: choose one of {", ".join(COMMANDS)}')
    importlib.import_module(f"glax.cli.{command}").run(argv)
