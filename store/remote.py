"""Folders behind fsspec URLs: whole files in and out, with retries, time limits and names that stay inside.

``s3://``, ``gs://``, ``http(s)://`` (read only), ``memory://`` and whatever else fsspec knows. Only whole files
are read and written, so an object that is there is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tcsae.store.errors import ConfigError, RemoteError

Result = TypeVar("Result")

log = logging.getLogger(__name__)

LISTED_BYTES = 1000
"""about what a listing says of a file"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """How patient a transfer is."""

    attempts: int = 5
    """tries of one file before it is given up"""
    wait: float = 0.5
    """seconds before the second try; doubled for each further one, and varied by up to a half"""
    timeout: float = 30.0
    """seconds that a request may take, and longer for large files as `slowest` says"""
    slowest: int = 262_144
    """bytes a second that a connection must at least reach"""

    def __post_init__(self) -> None:
        for name in ("attempts", "wait", "timeout", "slowest"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"transfer: {name}: expected more than 0, got {getattr(self, name)}")


def is_url(path: str | Path) -> bool:
    """Whether ``path`` is a URL such as ``s3://bucket/store.zarr``; ``file://`` counts as a path."""
    return "://" in str(path) and not str(path).startswith("file://")


def local_path(path: str | Path) -> Path:
    """A plain path or ``file://`` URL as a path; ``~`` is the home folder, which no shell makes of ``--out=~/x``.

    Raises `ConfigError` if its name is not UTF-8.
    """
    return _expanded(Path(str(path).removeprefix("file://")))


def folder_here(path: Path) -> Path:
    """``path``, which something is to be written to, as `local_path`; raises `ConfigError` also for another URL."""
    scheme = path.parts[0] if path.parts else ""
    if scheme == "file:":  # Path("file:///a") is file:/a
        return _expanded(Path("/", *path.parts[1:]))
    if scheme.endswith(":"):
        raise ConfigError(
            f"{scheme}//{'/'.join(path.parts[1:])}: expected a folder on this machine, got a URL; write to a folder "
            "and copy it there afterwards (a store with `tcsae store copy`)"
        )
    return _expanded(path)


def _expanded(path: Path) -> Path:
    try:
        str(path).encode()
        return path.expanduser()
    except UnicodeEncodeError as error:  # pyarrow and torch take paths as text
        raise ConfigError(f"{path}: expected a name in UTF-8; rename it or choose another path") from error
    except RuntimeError:  # a folder of such a name, for no such user is known
        return path


class RemoteFolder:
    """A folder at a URL. Safe to use from several threads; another process opens its own.

    Parameters
    ----------
    url
        any that fsspec knows; credentials come from where its implementation takes them (for S3: the
        environment and ``~/.aws``, ``AWS_ENDPOINT_URL`` for other servers than Amazon's)
    transfer
        patience

    Raises
    ------
    ConfigError
        an unknown protocol, or one whose package is not installed
    """

    def __init__(self, url: str, transfer: Transfer | None = None) -> None:
        import fsspec  # a store on this machine needs none of it

        self.url = url.rstrip("/")
        self.transfer = transfer or Transfer()
        protocol, _, place = self.url.partition("://")
        if not place:
            raise ConfigError(f"{url}: expected more than a protocol, such as s3://bucket/store.zarr")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, **_options(protocol))
        except (ImportError, ValueError) as error:
            extra = {"s3": "tcsae[s3]", "http": "tcsae[http]", "https": "tcsae[http]"}.get(protocol)
            advice = f"pip install '{extra}'" if extra else "install the package that fsspec names"
            raise ConfigError(f"{self.url}: cannot be opened ({error}); {advice}") from error
        self.is_read_only = protocol in ("http", "https")

    def read(self, name: str, expected_bytes: int = 0) -> bytes:
        """The whole file ``name``.

        Raises
        ------
        FileNotFoundError
            there is none
        RemoteError
            every try failed, or took too long
        """

        def get(path: str, timeout: float) -> bytes:
            return bytes(self._call("cat_file", timeout, path))

        return self._patiently("read", name, get, expected_bytes)

    def write(self, name: str, content: bytes) -> None:
        """Put ``content`` at ``name``, over what is there.

        Raises
        ------
        RemoteError
            every try failed, or took too long; what was there before may be there still
        """
        if self.is_read_only:
            raise ConfigError(f"{self.url}: http cannot be written to; choose another destination")

        def put(path: str, timeout: float) -> None:
            if not getattr(self._files, "async_impl", False):
                self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._call("pipe_file", timeout, path, content)

        self._patiently("write", name, put, len(content))

    def remove(self, name: str) -> None:
        """Delete the file ``name``; raises `RemoteError` as `write` does, also if there is none."""

        def delete(path: str, timeout: float) -> None:
            self._call("rm_file", timeout, path)

        self._patiently("delete", name, delete, 0)

    def exists(self) -> bool:
        """Whether a store's root group is there."""
        try:
            self.read("zarr.json")
        except FileNotFoundError:
            return False
        return True

    def sizes(self, names: Sequence[str]) -> list[int] | None:
        """Bytes of each file, by a listing; None if there is none, as over http, or one of them is not in it."""
        if self.is_read_only:
            return None

        def find(path: str, timeout: float) -> dict[str, Any]:
            found: dict[str, Any] = self._call("find", timeout, path, detail=True)
            return found

        try:
            listed = self._patiently("list", "", find, LISTED_BYTES * len(names))
            return [int(listed[f"{self._root.rstrip('/')}/{name}"]["size"]) for name in names]
        except (RemoteError, KeyError, TypeError):  # a size may be unknown
            return None

    def _call(self, method: str, timeout: float, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system, with a time limit where it can be cut off."""
        if not getattr(self._files, "async_impl", False):
            return getattr(self._files, method)(*arguments, **options)
        from fsspec.asyn import sync

        return sync(
            self._files.loop, getattr(self._files, f"_{method}"), *arguments, timeout=timeout, **options
        )

    def _patiently(self, verb: str, name: str, work: Callable[[str, float], Result], n_bytes: int) -> Result:
        patience = self.transfer
        path = f"{self._root.rstrip('/')}/{name}"
        timeout = patience.timeout + n_bytes / patience.slowest
        for attempt in range(1, patience.attempts + 1):
            try:
                return work(path, timeout)
            except FileNotFoundError as error:
                if verb == "read":
                    raise
                raise RemoteError(f"{self.url}: no such place to write to ({_said(error)})") from error
            except Exception as error:
                # each file system raises its own network errors; what is ours to know is whether trying again helps
                if _is_final(error):
                    raise RemoteError(f"{self.url}/{name}: cannot {verb} ({_said(error)})") from error
                if attempt == patience.attempts:
                    raise RemoteError(
                        f"{self.url}/{name}: cannot {verb} after {attempt} tries ({_said(error)}); run the same "
                        "command again, what is there is kept"
                    ) from error
                pause = patience.wait * 2 ** (attempt - 1) * random.uniform(1, 1.5)
                log.info("%s/%s: %s; try %d in %.1f s", self.url, name, _said(error), attempt + 1, pause)
                time.sleep(pause)
        raise AssertionError("attempts is at least 1")


def _options(protocol: str) -> dict[str, Any]:
    if protocol == "s3":
        # our own tries and time limits hold; botocore's would multiply them
        return {"config_kwargs": {"retries": {"max_attempts": 1}}, "use_listings_cache": False}
    return {"skip_instance_cache": True} if protocol in ("http", "https") else {}


NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""botocore's errors where it is not told who asks, by name: it may not be installed"""


def _is_final(error: Exception) -> bool:
    """Whether another try would fail the same way: no permission or bucket, a full disk, a certificate not trusted."""
    if type(error).__name__ in NO_CREDENTIALS:
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    # NotImplementedError: the file system of the URL cannot do what was asked, such as write over http
    final = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS)
    return isinstance(error, PermissionError | NotImplementedError | ssl.CertificateError) or (
        isinstance(error, OSError) and error.errno in final
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").replace(os.linesep, " ")
