"""The model hub: patience with it, its cache, and its errors in plain words. The only user of `huggingface_hub`."""

import errno
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CacheNotFound, HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from samtune import console
from samtune.errors import MachineError, ModelError, SamtuneError, UsageError, first_line

T = TypeVar("T")

# Seconds before each new try. The library has patience of its own with a download that is cut off, late or put off
# (429), but none with one that gets a 5xx, and none at all with the first question, whether there is the repository.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
_DOWNLOAD_PAUSES = (1.0, 4.0)
_LONGEST_PAUSE = 300.0  # the hub counts requests in windows of five minutes
_PASSING = {500, 502, 503, 504}

# A repository of which only such files are there is of no use.
_DESCRIPTIONS = {"", ".md", ".json", ".txt", ".py", ".yaml", ".yml"}


@dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    what: the thing that a user asked for, and instead: where else it may come from, both for messages. revision: a
    branch or a commit; None is the main branch.
    """

    id: str
    kind: Literal["model", "dataset"]
    what: str
    instead: str
    revision: str | None = None

    @property
    def fetch(self) -> str:
        """The command that brings it into the cache."""
        options = "--repo-type dataset " if self.kind == "dataset" else ""
        options += f"--revision {self.revision} " if self.revision else ""
        return f"hf download {options}{self.id}"

    @property
    def folder(self) -> Path:
        """Its place in the cache: blobs, refs and snapshots."""
        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.id.replace('/', '--')}"

    @property
    def is_cached(self) -> bool:
        """Whether weights, tables or pictures are there; a part of them, perhaps."""
        files = (path for path in self.folder.glob("snapshots/*/**/*") if path.is_file())
        return any(path.suffix.lower() not in _DESCRIPTIONS for path in files)


def cache_folder() -> Path:
    """Where repositories of the hub are kept here."""
    return Path(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The hub's address."""
    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the hub shall not be asked."""
    return bool(constants.HF_HUB_OFFLINE)


def cached() -> list[dict[str, Any]]:
    """What the cache holds: kind (model, dataset, space), id, bytes."""
    try:
        found = scan_cache_dir().repos
    except CacheNotFound:
        return []
    rows = [{"kind": repo.repo_type, "id": repo.repo_id, "bytes": repo.size_on_disk} for repo in found]
    return sorted(rows, key=lambda row: (row["kind"], row["id"]))


def load(repository: Repository, read: Callable[[bool], T]) -> T:
    """What `read` makes of a repository's files, fetched where the cache does not hold them.

    read: is told whether the hub answers; if not, the cache must do. It may be called more than once: after an answer
    that passes (5xx), and after a damaged file of the cache is thrown away.

    Raises ModelError where neither hub nor cache has it, and lets TypeError and AssertionError through: they are about
    the arguments inside `read`. Errors of samtune's own go through, too, unless a file of the cache is damaged.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    trouble = _ask(repository)
    if trouble is not None:
        if not repository.is_cached:
            raise _error(repository, trouble) from None
        if not _is_offline(trouble):
            console.warn(f"{_answer(trouble)}; taking {repository.what} from the cache")
    damaged: list[str] = []
    while True:
        try:
            return _patiently(lambda: read(trouble is None), _DOWNLOAD_PAUSES, _PASSING, silence=("ReadError",))
        except (TypeError, AssertionError, UsageError):
            raise
        except Exception as error:  # network, cache and file formats have a family of errors each
            found = [] if damaged else _discard_damaged(repository)
            if isinstance(error, SamtuneError) and not (damaged or found):
                raise
            if trouble is not None or not found:
                raise _error(repository, trouble or error, damaged or found) from None
            damaged = found
            console.warn(f"{repository.what}: {', '.join(found)} in the cache is damaged and is fetched again")


def snapshot(repository: Repository, *, online: bool) -> Path:
    """The folder of the cache that holds a data set's files, after fetching those that are missing.

    Tables, where the repository has some; else everything: pictures, archives, WebDataset shards.
    """

    def fetch(patterns: list[str] | None) -> Path:
        place = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
            local_files_only=not online,
        )
        return Path(place)

    folder = fetch(["*.parquet", "README.md", "dataset_infos.json"])
    return folder if any(folder.rglob("*.parquet")) else fetch(None)


def _ask(repository: Repository) -> Exception | None:
    """What keeps the hub from telling about the repository, or None.

    The library asks before each download too, but without a limit of time, or with one of minutes; and what it then
    raises hides the answer.
    """
    timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
    try:
        _patiently(
            lambda: HfApi().repo_info(
                repository.id, repo_type=repository.kind, revision=repository.revision, timeout=timeout
            ),
            () if repository.is_cached else _PAUSES,
            _PASSING | {408, 429},
            silence=("Timeout", "ReadError", "ProtocolError"),
        )
    except Exception as error:  # each of its versions stands on another library for the network
        return error
    return None


# ----------------------------------------------------------------------------------------------------------- patience


def _patiently(call: Callable[[], T], pauses: tuple[float, ...], statuses: set[int], silence: tuple[str, ...]) -> T:
    """Call again after the pauses as long as the answer is one of the statuses.

    silence: parts of the names of errors for "no answer, or only its beginning"; after these one more try, since a
    time-out has been a long wait itself.
    """
    tried = 0
    while True:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            allowed = pauses if status in statuses else pauses[:1] if status is None and _is(error, *silence) else ()
            if tried >= len(allowed):
                raise
            asked = _asked_pause(error)
            pause = allowed[tried] if asked is None else min(asked, _LONGEST_PAUSE)
            console.warn(f"{_answer(error)}; next try in {pause:.0f} s")
            time.sleep(pause)
            tried += 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    """The hub's answer, if one came."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _asked_pause(error: BaseException) -> float | None:
    """Seconds that the hub asks us to wait."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        if headers is not None:
            window = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) if _status(error) == 429 else None
            seconds = window[1] if window else headers.get("retry-after", "")
            return float(seconds) if seconds.isdigit() else None
    return None


def _is(error: BaseException, *names: str) -> bool:
    """Whether the error, or one that it came from, has one of the names in its own."""
    return any(name in type(link).__name__ for link in _chain(error) for name in names)


# -------------------------------------------------------------------------------------------------------------- cache


def _discard_damaged(repository: Repository) -> list[str]:
    """Delete the repository's cached files that are not what their names say; returns their names in the repository.

    The cache names a large file by its sha256 and a small one by git's sum, as the hub states them.
    """
    found = []
    for blob in repository.folder.glob("blobs/*"):
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            digest = hashlib.sha256()
        elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
            digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
        else:
            continue
        with blob.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != blob.name:
            links = [path for path in repository.folder.glob("snapshots/*/**/*") if path.resolve() == blob.resolve()]
            found += sorted({path.name for path in links}) or [blob.name]
            blob.unlink()
    return found


# ------------------------------------------------------------------------------------------------------------- errors


def _error(repository: Repository, error: Exception, damaged: list[str] | None = None) -> MachineError | ModelError:
    """What a user can do about an error of the hub."""
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in _chain(error)):
        return MachineError("the disk of the cache is full", first_line(error), "make room, or set HF_HOME")
    lost = f"; {', '.join(damaged)} in the cache was damaged" if damaged else ""
    cache = f"{lost} (cache: {constants.HF_HUB_CACHE})"
    status = _status(error)
    if status is None and not _is_from_network(error):  # files are there, and cannot be read
        return ModelError(
            f"{repository.what}: what came from the hub cannot be read",
            first_line(error) + cache,
            f"`{repository.fetch} --force-download` fetches it anew; or {repository.instead}",
        )
    hint = f"`{repository.fetch}` fetches it into the cache; or {repository.instead}"
    if status in (401, 403, 404):
        hint = (
            f"if you have access, `hf auth login` or set HF_TOKEN, then `{repository.fetch}`; or {repository.instead}"
        )
    elif _is_offline(error):
        hint = f"with a network and without HF_HUB_OFFLINE, {hint}"
    what = f"{repository.what}: neither in the cache nor to be had from the hub"
    return ModelError(what, _answer(error) + cache, hint)


def _answer(error: BaseException) -> str:
    """What the hub did, in words."""
    status, hub = _status(error), f"hub {constants.ENDPOINT}"
    if status in (401, 403):
        return f"{hub} answers {status}: gated or private, or not there"
    if status == 404:
        return f"{hub} answers 404: not there, or private"
    if status == 429:
        return f"{hub} answers 429: too many requests"
    if status is not None:
        return f"{hub} answers {status}"
    if _is_offline(error):
        return "the hub was not asked: HF_HUB_OFFLINE is set"
    if _is(error, "Timeout"):
        return f"{hub} does not answer in time"
    return f"{hub} cannot be reached: {first_line(error)}"


def _is_offline(error: BaseException) -> bool:
    return _is(error, "Offline")


def _is_from_network(error: BaseException) -> bool:
    libraries = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
    return any(type(link).__module__.startswith(libraries) for link in _chain(error))
