r"""Continue a prompt with the model of a run folder, or of a checkpoint of the Hub, and print the tokens as they come.

    glax generate runs/gla-small-bytes --prompt "import "
    glax generate gla-1.3B-100B/ --prompt "The capital of France is" --temperature 0 --stop $'\n'

A long text is read once and its state kept; prompts then go on from there:

    glax generate MODEL --read book.txt --save-state book.state
    glax generate MODEL --state book.state --prompt "In the end,"
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from glax.cli.sources import Source, check_place, open_source
from glax.errors import UserError
from glax.inference import Sampling, load_state, read_prefix, save_state, stream


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is continued, and how."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder, the folder of a checkpoint in the Hub's format, or OWNER/NAME on the Hub."""

    prompt: tuple[str, ...] = ()
    """Text to continue; several are one batch. None: standard input, unless a state is only to be saved."""

    max_new_tokens: int = 256
    """Tokens to generate, at most."""

    temperature: float = 0.7
    """0: always the most likely token."""

    top_k: int | None = None
    """Only the k most likely tokens."""

    top_p: float | None = None
    """Only the most likely tokens that together have this probability."""

    stop: tuple[str, ...] = ()
    """Strings that end the text where they appear."""

    seed: int = 0
    """Seed of the draws."""

    read: Path | None = None
    """Text file that stands before the prompt: its state is kept, not its tokens."""

    state: Path | None = None
    """State to go on from, as --save-state wrote it."""

    save_state: Path | None = None
    """Where to write the state after --read (and --state), before the prompt."""

    tokenizer: str | None = None
    """"bytes", "mistral" or a SentencePiece file. None: the run's, or the checkpoint's tokenizer.model."""

    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """None: the run's; for a checkpoint bfloat16, float32 on a CPU."""

    implementation: str | None = None
    """Kernel that reads the prompt. None: the fastest that runs here."""


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="glax generate", description=__doc__)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    check_place(arguments.save_state)
    source = open_source(arguments.model, arguments.tokenizer, arguments.compute_dtype, arguments.implementation)
    model = source.decoder()
    prefix = _prefix(arguments, source, model)
    prompts = arguments.prompt
    if not prompts:
        if arguments.save_state is not None:
            return
        prompts = (_decoded(sys.stdin.buffer.read(), "the standard input"),)
    options = {"max_new_tokens": arguments.max_new_tokens, "sampling": sampling, "stop": arguments.stop}
    options |= {"seed": arguments.seed, "end_token": source.tokenizer.eos_id, "prefix": prefix}
    options["start_token"] = source.start_token if prefix is None else None
    for prompt in prompts:
        _decoded(os.fsencode(prompt), "the prompt")
    begun = time.monotonic()
    alone = len(prompts) == 1
    if alone:
        print(prompts[0], end="", flush=True)
    rows = []
    for texts, so_far, _ in stream(model, source.tokenizer, prompts, **options):
        rows = so_far
        if alone:
            print(texts[0], end="", flush=True)
    print("" if alone else "\n".join(f"--- {prompt}{row.text}" for prompt, row in zip(prompts, rows, strict=True)))
    seconds, count = time.monotonic() - begun, sum(len(row.tokens) for row in rows)
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _prefix(arguments: Arguments, source: Source, model):
    state = None if arguments.state is None else load_state(arguments.state, model)
    if arguments.read is not None:
        try:
            data = arguments.read.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {arguments.read} ({error.strerror}): give a text file") from error
        tokens = np.asarray(source.tokenizer.encode(_decoded(data, arguments.read)), np.int32)
        if state is None:
            tokens = np.concatenate([[source.start_token], tokens]).astype(np.int32)
        # Room for a prompt of any likely length, where softmax attention needs to be told.
        state = read_prefix(model, tokens[None], room=arguments.max_new_tokens + 4096, state=state)
    if arguments.save_state is not None:
        if state is None:
            raise UserError("--save-state keeps the state after --read: give a text file to read")
        save_state(arguments.save_state, model, state)
        print(f"state: {arguments.save_state}", file=sys.stderr)
    return state


def _decoded(data: bytes, name: str | Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text at byte {error.start}: convert it") from error
