"""A folder of objects on any file system that fsspec knows: read, listed, and written whole or not at all.

    a file system    a temporary file, then a hard link to the final name, which fails if the name is taken
    an object store  one PUT that the store refuses if the name is taken (`If-None-Match: *` on S3)

Whoever loses that race learns so and changes nothing. Credentials come from the environment of the process that
opens a store, never from a URL or a message.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from embedq.core.errors import InvalidInput, StoreFailed

#: Folder of a target that holds everything but its parts; readers of Parquet pass over names that begin so.
META = "_embedq"

#: Below it, objects that are being written. What is there for longer was left by a process that died.
TEMPORARY = f"{META}/writing"

#: Errors of a file system without hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}

#: Bytes of one PUT: an upload in pieces becomes visible at its end only, but leaves its pieces if it is broken off.
_MAX_PUT_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a store."""

    #: Relative to the store's root, with slashes.
    name: str
    size: int
    #: Changes when the content does: the object's etag, or the file's modification time in nanoseconds.
    version: str
    #: Unix time of the last change; 0 where the store does not say.
    changed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Location:
    """A protocol of fsspec and a path in it."""

    protocol: str
    path: str

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.protocol}://{self.path}"


def locate(url: str) -> Location:
    """The location of a path or URL; a local one becomes absolute, with `..` and links resolved.

    InvalidInput for URLs that lead elsewhere than they say: chained ones (`filecache::…`), credentials, `..`.
    """
    if "::" in url:
        raise InvalidInput(f"a chained URL ({url.partition('::')[0]:.40}::…) cannot be used; give the file's own URL")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        path = rest if separator else url
        if not path or "\0" in path:
            raise InvalidInput("a path is empty, or holds a zero byte")
        return Location("file", os.path.realpath(Path(path).expanduser()))
    if "@" in urlsplit(url).netloc:
        raise InvalidInput(
            f"a {scheme} URL holds a password or user name; credentials come from each process's environment"
        )
    parts = rest.strip("/").split("/")
    if not scheme.isalnum() or not parts[0] or any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"a {scheme:.20} URL must name a bucket and a path without empty parts, '.' and '..'")
    return Location(scheme, "/".join(parts))


class Store:
    """The objects under one location. Every error of the file system is raised as StoreFailed, naming the object."""

    def __init__(self, location: Location, is_conditional: bool = True) -> None:
        """`is_conditional` false writes without asking the store whether the name is taken."""
        self.location = location
        self._is_conditional = is_conditional
        self._files = file_system(location.protocol)

    def path(self, name: str = "") -> str:
        """The path of an object in its file system."""
        return f"{self.location.path.rstrip('/')}/{name}" if name else self.location.path

    def entries(self, under: str = "") -> dict[str, Entry]:
        """The objects in one folder by name; empty if there is no such folder."""
        with failing(f"{self.location}/{under} cannot be listed"):
            try:
                found = self._files.ls(self.path(under), detail=True)
            except FileNotFoundError:
                return {}
        entries = (self._entry(info) for info in found if info["type"] == "file")
        return {one.name: one for one in entries if not one.name.endswith("/")}  # some stores keep folders as objects

    def entry(self, name: str) -> Entry | None:
        """One object as it is now; None if there is none."""
        with failing(f"{self.location}/{name} cannot be looked at"):
            try:
                return self._entry(_fresh_info(self._files, self.path(name)))
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None if there is none."""
        with failing(f"{self.location}/{name} cannot be read"):
            try:
                return bytes(self._files.cat_file(self.path(name)))
            except FileNotFoundError:
                return None

    def open(self, name: str) -> IO[bytes]:
        """An object for random access."""
        with failing(f"{self.location}/{name} cannot be opened"):
            return open_location(Location(self.location.protocol, self.path(name)))

    def create(self, name: str, write: Callable[[IO[bytes]], Any]) -> bool:
        """Write an object whole under a name that is free; false, and nothing changed, if it is taken."""
        return self._write(name, write, self._is_conditional)

    def replace(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Write an object whole, over one of that name if there is one."""
        self._write(name, write, False)

    def tidy(self, name: str) -> None:
        """Remove what was left of earlier tries to write an object that is there."""
        if self.location.is_local:
            with failing(f"what is left of {self.location}/{name} cannot be removed"):
                _tidy(Path(self.path(TEMPORARY)), name.rpartition("/")[2])

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with failing(f"{self.location}/{name} cannot be removed"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self.path(name))

    def check(self) -> None:
        """Write, and write again under the same name: StoreFailed if the store lets the second in.

        Some object stores ignore the condition, and two workers would then overwrite each other's parts unseen.
        """
        name = f"{TEMPORARY}/probe-{secrets.token_hex(8)}"
        try:
            first, second = (self._write(name, lambda file: file.write(b"probe"), True) for _ in range(2))
        finally:
            self.remove(name)
        if not first or second:
            raise StoreFailed(
                f"{self.location} ignores the condition that a name must be free (If-None-Match: *); "
                "use another store, or ask for --unconditional if no two workers may ever run the same part"
            )

    def leftovers(self, older_s: float) -> list[str]:
        """Temporary objects older than so many seconds; nobody writes them any more."""
        before_s = time.time() - older_s
        return [entry.name for entry in self.entries(TEMPORARY).values() if entry.changed_s <= before_s]

    def broken_uploads(self) -> list[tuple[str, str]]:
        """(name, id) of uploads in pieces that nobody ended, on S3; empty for other stores."""
        if self.location.protocol not in ("s3", "s3a"):
            return []
        bucket, _, prefix = self.location.path.partition("/")
        with failing(f"uploads below {self.location} cannot be listed"):
            found = self._files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        return [(one["Key"], one["UploadId"]) for one in found.get("Uploads", [])]

    def abort_uploads(self) -> int:
        """Abort them; returns how many."""
        uploads, bucket = self.broken_uploads(), self.location.path.partition("/")[0]
        for key, upload in uploads:
            with failing(f"an upload of {key} cannot be aborted"):
                self._files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        return len(uploads)

    def _write(self, name: str, write: Callable[[IO[bytes]], Any], must_be_free: bool) -> bool:
        with failing(f"{self.location}/{name} cannot be written"):
            if self.location.is_local:
                return _write_file(Path(self.path(name)), Path(self.path(TEMPORARY)), write, must_be_free)
            buffer = io.BytesIO()
            write(buffer)
            # "create" is fsspec's name for the condition; it is If-None-Match on S3 and ifGenerationMatch on GCS.
            how = {"mode": "create" if must_be_free else "overwrite", "chunksize": _MAX_PUT_BYTES}
            try:
                self._files.pipe_file(self.path(name), buffer.getvalue(), **how)
            except FileExistsError:
                return False
            except OSError as error:
                if must_be_free and _is_refused_condition(error):
                    return False
                raise
            return True

    def _entry(self, info: dict[str, Any]) -> Entry:
        name = str(info["name"])[len(self.location.path.rstrip("/")) + 1 :]
        return Entry(name, int(info["size"] or 0), version_of(info), changed_s_of(info))


def file_system(protocol: str) -> Any:
    """fsspec's file system, made after any fork, which never answers from what it saw earlier."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise InvalidInput("datasets need the extra embedq[datasets]: pip install 'embedq[datasets]'") from None
    try:
        return fsspec.filesystem(protocol, **({} if protocol == "file" else {"use_listings_cache": False}))
    except (ValueError, ImportError) as error:
        raise InvalidInput(f"files on {protocol}:// cannot be reached: {error}") from None


def open_location(location: Location) -> IO[bytes]:
    """A file for random access. OSError where it cannot be opened."""
    if location.is_local:
        return Path(location.path).open("rb")
    opened: IO[bytes] = file_system(location.protocol).open(location.path, "rb")
    return opened


def entry_of(location: Location) -> Entry | None:
    """One file as it is now, under its whole path; None if there is none."""
    with failing(f"{location} cannot be looked at"):
        try:
            info = _fresh_info(file_system(location.protocol), location.path)
        except FileNotFoundError:
            return None
    return Entry(location.path, int(info["size"] or 0), version_of(info), changed_s_of(info))


def version_of(info: dict[str, Any]) -> str:
    """A file's version, which changes when its content does: its etag, or else the time when it was last written."""
    for name in ("ETag", "etag", "content_md5", "md5Hash", "generation"):
        if info.get(name):
            return f"etag {str(info[name]).strip(chr(34))}"
    if "ino" in info:  # a local file: fsspec gives seconds as a float, which loses nanoseconds
        with contextlib.suppress(OSError):
            return f"mtime {Path(info['name']).stat().st_mtime_ns}"
    return f"mtime {info.get('LastModified') or info.get('last_modified') or info.get('mtime') or ''}"


def changed_s_of(info: dict[str, Any]) -> float:
    """Unix time of the last change; 0 where the store does not say."""
    changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("created")
    if isinstance(changed, int | float):
        return float(changed)
    return float(changed.timestamp()) if isinstance(changed, datetime) else 0.0


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn errors of a file system into StoreFailed: what could not be done, and the system's own words."""
    try:
        yield
    except (StoreFailed, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError):
            raise StoreFailed(f"{what}: there is no such file or folder") from None
        raise
    except OSError as error:
        raise StoreFailed(f"{what}: {error.strerror or error or type(error).__name__}") from error
    except Exception as error:  # clients of object stores have classes of their own
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure"):
            raise
        raise StoreFailed(f"{what}: {type(error).__name__}: {error}"[:500]) from error


def _fresh_info(files: Any, path: str) -> dict[str, Any]:
    info: dict[str, Any] = files.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(path)
    return info


def _is_refused_condition(error: OSError) -> bool:
    """S3 answers 412 where the name is taken, and 409 to one of two that write it at the same moment."""
    return any(word in str(error) for word in ("PreconditionFailed", "pre-conditions", "ConditionalRequestConflict"))


def _write_file(path: Path, temporary: Path, write: Callable[[IO[bytes]], Any], must_be_free: bool) -> bool:
    temporary.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = temporary / f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with written.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        is_new = True
        if not must_be_free:
            written.replace(path)
        else:
            is_new = _link(written, path)
        _sync_folder(path.parent)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    _tidy(temporary, path.name)
    return is_new


def _tidy(temporary: Path, name: str) -> None:
    """Remove what workers left that died while they wrote an object; whoever still writes it has lost the race."""
    for left in temporary.glob(f"{glob.escape(name)}.*"):
        left.unlink(missing_ok=True)


def _link(written: Path, path: Path) -> bool:
    try:
        os.link(written, path)
    except FileExistsError:
        return False
    except FileNotFoundError:  # removed by whoever won
        if path.exists():
            return False
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        written.replace(path)  # the loser of a race in this moment overwrites a part with an equal one
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
