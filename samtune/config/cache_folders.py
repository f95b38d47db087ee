"""Cache folders: for decoded images, tables of data sets and fonts of charts.

Containers and batch systems run commands without a home, as a user without a name, or with a read-only home.
"""

import os
import tempfile
from pathlib import Path

from samtune.files import first_existing_parent


def user_cache() -> Path:
    """The user's cache folder, or a temporary one where that cannot be written."""
    folder = _given_or_home()
    return folder if is_writable(folder) else _temporary()


def prepare() -> str | None:
    """Set the cache variables of the libraries so that they can write; returns a note for the user if that moves one.

    Call it before the libraries are imported. A read-only cache of the hub stays in use.
    """
    home = Path(os.environ["HF_HOME"]) if "HF_HOME" in os.environ else _given_or_home() / "huggingface"
    tables = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    if is_writable(tables) and is_writable(_given_or_home()):
        return None
    temporary = _temporary()
    os.environ["HF_HOME"] = str(home if home.is_dir() else temporary / "huggingface")
    if not is_writable(tables):
        os.environ["HF_DATASETS_CACHE"] = str(temporary / "huggingface" / "datasets")
    if not is_writable(_given_or_home()):
        os.environ.setdefault("MPLCONFIGDIR", str(temporary / "matplotlib"))
        os.environ["XDG_CACHE_HOME"] = str(temporary)
    return f"{tables if tables.is_absolute() else 'the home folder'} cannot be written: caches lie in {temporary}"


def is_writable(folder: Path) -> bool:
    """Whether the folder, or files in it, can be made."""
    parent = first_existing_parent(folder)
    return folder.is_absolute() and parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def _given_or_home() -> Path:
    """The cache folder of the environment; a relative path where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"samtune-{os.getuid()}"
