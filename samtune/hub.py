"""The model hub: retries, its cache, and its errors in plain words. The only user of `huggingface_hub`."""

import errno
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from huggingface_hub import CacheNotFound, constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status, http_backoff

from samtune import console
from samtune.errors import MachineError, ModelError, SamtuneError, UsageError, first_line

T = TypeVar("T")

_SERVER_ERRORS = (500, 502, 503, 504)
# Seconds before a download is tried again. The library retries downloads that are cut off, late or refused by 429,
# but not those that get a 5xx.
_DOWNLOAD_PAUSES = (1.0, 4.0)

# Suffixes of files that describe a repository. One that has no others in the cache is not cached.
_DESCRIPTIONS = {"", ".md", ".json", ".txt", ".py", ".yaml", ".yml"}


@dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    label: what the user asked for; alternative: where else it may come from. Both are for messages. revision: a branch
    or a commit; None is the main branch. part: the folder of the tables that are used; "" for all of them.
    """

    id: str
    kind: Literal["model", "dataset"]
    label: str
    alternative: str
    revision: str | None = None
    part: str = ""

    @property
    def download_command(self) -> str:
        """The command that downloads it into the cache."""
        options = "--repo-type dataset " if self.kind == "dataset" else ""
        options += f"--revision {self.revision} " if self.revision else ""
        return f"hf download {options}{self.id}"

    @property
    def folder(self) -> Path:
        """Its folder in the cache, with blobs, refs and snapshots."""
        return cache_folder() / f"{self.kind}s--{self.id.replace('/', '--')}"

    @property
    def is_cached(self) -> bool:
        """Whether the cache has weights, tables or pictures of it, all or some."""
        files = (path for path in self.folder.glob("snapshots/*/**/*") if path.is_file())
        return any(path.suffix.lower() not in _DESCRIPTIONS for path in files)


def cache_folder() -> Path:
    """The folder of all cached repositories."""
    return Path(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The address of the hub."""
    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    return bool(constants.HF_HUB_OFFLINE)


def cached() -> list[dict[str, Any]]:
    """All cached repositories: kind (model, dataset, space), id, bytes."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    rows = [{"kind": repo.repo_type, "id": repo.repo_id, "bytes": repo.size_on_disk} for repo in repositories]
    return sorted(rows, key=lambda row: (row["kind"], row["id"]))


def load(repository: Repository, read: Callable[[bool], T]) -> T:
    """Call `read`, which downloads and reads files of the repository, and return its result.

    read: its argument says whether the hub answers; if not, it must use the cache. It is called again after a 5xx, and
    after a damaged file of the cache has been deleted.

    Raises ModelError where neither hub nor cache has the repository. TypeError and AssertionError are about the
    arguments inside `read` and pass through, and so do samtune's own errors unless a file of the cache is damaged.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub_error = _hub_error(repository)
    if hub_error is not None:
        if not repository.is_cached:
            raise _user_error(repository, hub_error) from None
        if not _is(hub_error, "Offline"):
            console.warn(f"{_answer(hub_error)}; taking {repository.label} from the cache")
    damaged: list[str] = []
    while True:
        try:
            return _with_retries(lambda: read(hub_error is None))
        except (TypeError, AssertionError, UsageError):
            raise
        except Exception as error:  # network, cache and file formats have a family of errors each
            deleted = [] if damaged else _delete_damaged(repository)
            if isinstance(error, SamtuneError) and not (damaged or deleted):
                raise
            if hub_error is not None or not deleted:
                raise _user_error(repository, hub_error or error, damaged or deleted) from None
            damaged = deleted
            console.warn(f"{repository.label}: {', '.join(damaged)} in the cache is damaged and is fetched again")


def snapshot(repository: Repository, *, online: bool) -> Path:
    """The folder of the cache that holds a data set's files, after downloading those that are missing.

    Only tables, and only those of its part, where the repository has some; else all files: pictures, archives,
    WebDataset shards.
    """

    def download(patterns: list[str] | None) -> Path:
        folder = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
            local_files_only=not online,
        )
        return Path(folder)

    folder = download([f"{repository.part}*.parquet", "README.md", "dataset_infos.json"])
    return folder if any((folder / repository.part).rglob("*.parquet")) else download(None)


def _hub_error(repository: Repository) -> Exception | None:
    """Ask the hub for the repository; return the error, or None.

    Downloads ask for it too, but without retries or a time limit, and the errors that they raise hide the answer.
    """
    url = f"{constants.ENDPOINT}/api/{repository.kind}s/{repository.id}"
    url += f"/revision/{quote(repository.revision, safe='')}" if repository.revision else ""

    def ask() -> None:
        response = http_backoff(
            "GET",
            url,
            max_retries=0 if repository.is_cached else 5,
            retry_on_exceptions=(),  # without a network nobody should wait
            retry_on_status_codes=(408, 429, *_SERVER_ERRORS),
            headers=build_hf_headers(),
            timeout=float(constants.HF_HUB_ETAG_TIMEOUT),
        )
        hf_raise_for_status(response)

    try:
        try:
            ask()
        except Exception as error:  # versions of the library differ in the HTTP library whose errors they raise
            if repository.is_cached or not _is(error, "Timeout", "ReadError", "ProtocolError"):
                raise
            console.warn(f"{_answer(error)}; next try now")
            ask()
    except Exception as error:
        return error
    return None


def _with_retries(download: Callable[[], T]) -> T:
    """Call again after a 5xx, and once after an answer that broke off."""
    for tried, pause in enumerate(_DOWNLOAD_PAUSES):
        try:
            return download()
        except Exception as error:
            status = _status(error)
            if status not in _SERVER_ERRORS and not (tried == 0 and status is None and _is(error, "ReadError")):
                raise
            console.warn(f"{_answer(error)}; next try in {pause:.0f} s")
            time.sleep(pause)
    return download()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _is(error: BaseException, *names: str) -> bool:
    """Whether the type of the error, or of one of its causes, has one of these in its name."""
    return any(name in type(link).__name__ for link in _chain(error) for name in names)


def _delete_damaged(repository: Repository) -> list[str]:
    """Delete cached files of the repository whose checksum is wrong; return their names in the repository.

    A blob's name is its checksum: sha256 of a large file, git's sha1 of a small one.
    """
    deleted = []
    for blob in repository.folder.glob("blobs/*"):
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            digest = hashlib.sha256()
        elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
            digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
        else:
            continue
        with blob.open("rb") as file:
            hashlib.file_digest(file, lambda digest=digest: digest)  # type: ignore[misc]
        if digest.hexdigest() != blob.name:
            links = [path for path in repository.folder.glob("snapshots/*/**/*") if path.resolve() == blob.resolve()]
            deleted += sorted({path.name for path in links}) or [blob.name]
            blob.unlink()
    return deleted


def _user_error(
    repository: Repository, error: Exception, damaged: list[str] | None = None
) -> MachineError | ModelError:
    """The error of the hub as one that says what the user can do."""
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in _chain(error)):
        return MachineError("the disk of the cache is full", first_line(error), "make room, or set HF_HOME")
    cache = f"; {', '.join(damaged)} in the cache was damaged" if damaged else ""
    cache += f" (cache: {constants.HF_HUB_CACHE})"
    status = _status(error)
    libraries = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
    from_network = any(type(link).__module__.startswith(libraries) for link in _chain(error))
    if status is None and not from_network:  # files are there, and cannot be read
        return ModelError(
            f"{repository.label}: what came from the hub cannot be read",
            first_line(error) + cache,
            f"`{repository.download_command} --force-download` fetches it anew; or {repository.alternative}",
        )
    hint = f"`{repository.download_command}` fetches it into the cache; or {repository.alternative}"
    if status in (401, 403, 404):
        login = "if you have access, `hf auth login` or set HF_TOKEN"
        hint = f"{login}, then `{repository.download_command}`; or {repository.alternative}"
    elif _is(error, "Offline"):
        hint = f"with a network and without HF_HUB_OFFLINE, {hint}"
    message = f"{repository.label}: neither in the cache nor to be had from the hub"
    return ModelError(message, _answer(error) + cache, hint)


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
    if _is(error, "Offline"):
        return "the hub was not asked: HF_HUB_OFFLINE is set"
    if _is(error, "Timeout"):
        return f"{hub} does not answer in time"
    return f"{hub} cannot be reached: {first_line(error)}"
