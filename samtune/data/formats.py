"""Which files are pictures by their endings, and what it takes to read them. Imports nothing heavy."""

import importlib
from functools import cache
from importlib.util import find_spec
from pathlib import PurePath

_BUILT_IN = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")
# Ending -> (module that teaches Pillow to read it, what installs the module).
_PLUGINS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "pip install 'samtune[heif]'")),
    ".jxl": ("pillow_jxl", "pip install 'samtune[jxl]'"),
    ".avif": ("", "pip install --upgrade pillow"),  # a part of Pillow, where it was built with it
}
# Pictures that nothing here reads.
_FOREIGN = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".psd", ".svg", ".dcm", ".exr")


def is_readable(name: str) -> bool:
    """Whether a file is a picture by its ending, of a format that can be decoded here."""
    ending = _ending(name)
    return ending in _BUILT_IN or (ending in _PLUGINS and _is_installed(ending))


def is_unreadable(name: str) -> bool:
    """Whether a file is a picture by its ending, of a format that cannot be decoded here."""
    ending = _ending(name)
    return ending in _FOREIGN or (ending in _PLUGINS and not _is_installed(ending))


def installation(name: str) -> str:
    """The command after which a picture of this ending can be decoded; "" where there is none, or no need."""
    return _PLUGINS[_ending(name)][1] if _ending(name) in _PLUGINS and is_unreadable(name) else ""


@cache
def register_plugins() -> None:
    """Have Pillow read what the installed plugins can read."""
    if _is_installed(".heic"):
        importlib.import_module("pillow_heif").register_heif_opener()
    if _is_installed(".jxl"):
        importlib.import_module("pillow_jxl")  # registers itself


def _ending(name: str) -> str:
    return PurePath(name).suffix.lower()


@cache
def _is_installed(ending: str) -> bool:
    module = _PLUGINS[ending][0]
    if module:
        return find_spec(module) is not None
    from PIL import features

    return bool(features.check("avif"))
