"""Folders for what can be made again: decoded images, tables of data sets, fonts of charts.

Containers and batch systems run commands without a home, as a user without a name, or with a home that is read-only.
"""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """The user's folder for caches; a temporary one where there is none that can be written."""
    folder = _given_or_home()
    return folder if is_writable(folder) else _temporary()


def prepare() -> str | None:
    """Let the libraries that a run uses write where it is possible; what there is to say of it, if there is something.

    To be called before they are imported. What can be read stays in use: a shared cache of the hub may be read-only.
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
    """Whether files can be made in a folder, or the folder itself."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    return folder.is_absolute() and there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _given_or_home() -> Path:
    """Not absolute where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")


def _temporary() -> Path:
    """A folder of this user's that lasts until the machine clears its temporary files."""
    return Path(tempfile.gettempdir()) / f"samtune-{os.getuid()}"
