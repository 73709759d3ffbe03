"""A checkpoint by its name on the Hub."""

import re
from pathlib import Path

from glax.errors import UserError

FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*token*")


def checkpoint_folder(source: str | Path, revision: str | None = None) -> Path:
    """``source`` where it is a folder; else the local copy of OWNER/NAME, fetched on first use (needs glax[hub])."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or folder.exists():
        raise UserError(f"{source} is no folder: give the folder of a checkpoint, or its OWNER/NAME on the Hub")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f'{source} is no folder here, and to fetch it from the Hub: run pip install "glax[hub]"'
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the library raises many kinds for a name, a network or a permission
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot fetch {source} from the Hub ({reason}): check the name and the network") from error
