"""Which files are pictures by their endings, and what it takes to read them. Imports nothing heavy."""

import importlib
import itertools
import lzma
import os
import shlex
import tarfile
import zipfile
import zlib
from functools import cache
from importlib.util import find_spec

# Of the formats that Pillow reads those of pictures: no films, documents, icons or tables of numbers.
_FORMATS = {
    *("BMP", "DDS", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
    *("XBM", "XPM"),
}
# Ending -> (module that teaches Pillow to read it, what installs the module).
_PLUGINS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "pip install 'samtune[heif]'")),
    ".jxl": ("pillow_jxl", "pip install 'samtune[jxl]'"),
    ".avif": ("", "pip install --upgrade pillow"),  # a part of Pillow, where it was built with it
}
# Pictures that nothing here reads.
_FOREIGN = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".psd", ".svg", ".dcm", ".exr")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
_FOREIGN_ARCHIVES = (".7z", ".rar", ".tar.zst", ".tar.lz4", ".tar.lzma", ".tar.z")  # no package here reads them

_LOOKED_AT = 300  # members of a tar


def is_readable(name: str) -> bool:
    """Whether a file is a picture by its ending, of a format that can be decoded here."""
    ending = _ending(name)
    return ending in _built_in() or (ending in _PLUGINS and _is_installed(ending))


def is_unreadable(name: str) -> bool:
    """Whether a file is a picture by its ending, of a format that cannot be decoded here."""
    ending = _ending(name)
    return ending in _FOREIGN or (ending in _PLUGINS and not _is_installed(ending))


def installation(name: str) -> str:
    """The command after which a picture of this ending can be decoded; "" where there is none, or no need."""
    return _PLUGINS[_ending(name)][1] if _ending(name) in _PLUGINS and is_unreadable(name) else ""


def archive_ending(name: str) -> str:
    """The ending that makes an archive of a file, as .tar.gz; "" where it is none. It need not be readable here."""
    lower = name.lower()
    return max((end for end in (*ARCHIVES, *_FOREIGN_ARCHIVES) if lower.endswith(end)), key=len, default="")


def unpacking(name: str) -> str:
    """The command that unpacks an archive into a folder of its name."""
    ending = archive_ending(name)
    file, folder = shlex.quote(name), shlex.quote(name[: -len(ending)])
    if ending.startswith((".tar", ".t")):
        return f"mkdir {folder} && tar -xf {file} -C {folder}"
    unzips = {".zip": f"unzip {file} -d {folder}", ".7z": f"7z x {file} -o{folder}"}
    return unzips.get(ending, f"unrar x {file} {folder}/")


def names_in_archive(path: str) -> list[str] | None:
    """The names in an archive, of a tar the first ones: it has no index. None where it cannot be opened here."""
    try:
        if path.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as zipped:
                return zipped.namelist()
        with tarfile.open(path) as tar:
            return [member.name for member in itertools.islice(tar, _LOOKED_AT)]
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile):
        return None


def is_picture(path: str) -> bool:
    """Whether a file is a picture by its first bytes, whatever its ending."""
    from PIL import Image

    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return False
        with Image.open(path) as image:
            return image.format in _FORMATS
    except Exception:  # what is no picture has a family of errors
        return False


@cache
def register_plugins() -> None:
    """Have Pillow read what the installed plugins can read."""
    if _is_installed(".heic"):
        importlib.import_module("pillow_heif").register_heif_opener()
    if _is_installed(".jxl"):
        importlib.import_module("pillow_jxl")  # registers itself


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@cache
def _built_in() -> frozenset[str]:
    from PIL import Image

    return frozenset(ending for ending, form in Image.registered_extensions().items() if form in _FORMATS)


@cache
def _is_installed(ending: str) -> bool:
    module = _PLUGINS[ending][0]
    if module:
        return find_spec(module) is not None
    from PIL import features

    return bool(features.check("avif"))
