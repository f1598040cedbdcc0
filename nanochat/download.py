"""The one downloader of the project: whole files or nothing, whatever the network does.

A file is received under a unique temporary name and renamed when it is complete and its content has passed the checks.
Connections that break are resumed where they broke, with growing pauses; a server that asks to be left alone for a
while is; one that answers nonsense is not believed. Two downloaders of one file do not collide. A host that cannot be
reached at all is given up within seconds.

It knows nothing of what it fetches: callers pass a check of the content.
"""

import contextlib
import email.utils
import fcntl
import glob
import hashlib
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
import requests.utils
from urllib3.exceptions import NewConnectionError

from nanochat.common import Progress, UserError

HUB = "https://huggingface.co"
CONNECT_SECONDS = 4.0  # for one address of a host; a host may have several
REACH_SECONDS = 6.0  # until a host that does not answer is given up at first contact
READ_SECONDS = 30.0  # without a byte until a connection is given up
ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with every further one
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 300.0
CHUNK_BYTES = 1 << 16
PROGRESS_BYTES = 1 << 20  # an attempt that got this much further is not held against the server


class BlockedError(UserError):
    """A failure that the next file would meet as well: the host cannot be reached, or the disk takes no more."""


class _AttemptError(Exception):
    """Why one attempt at a download failed, and what that means for the next one."""

    def __init__(
        self,
        reason: str,
        is_final: bool = False,  # trying again is useless
        is_unreachable: bool = False,  # nobody answers at the address
        keeps_bytes: bool = True,  # what has been received so far is good
        wait_seconds: float | None = None,  # what the server asks for
    ):
        super().__init__(reason)
        self.is_final, self.is_unreachable = is_final, is_unreachable
        self.keeps_bytes, self.wait_seconds = keeps_bytes, wait_seconds


def hub_url(path: str) -> str:
    """The address of a path on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    return f"{(os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/{path}"


def download_file(
    url: str,
    path: str | Path,
    check: Callable[[Path], Any] | None = None,
    expected_size: int | None = None,
    sha256: str | None = None,
    report: Callable[[int, int], None] | None = None,
    first_contact: bool = True,
) -> Path:
    """Download url to path and return path, which is the whole file or does not exist (or is the old one).

    check: called with the temporary file before it gets its name; a ValueError says what is wrong with the content.
    expected_size: bytes. sha256: hex digest. report: called from this thread with (bytes so far, bytes in all or 0);
    what it raises ends the download and is passed on. Without it a download of several seconds shows its progress.
    first_contact: a host that cannot be reached is told within 10 seconds; False says that it was reached a moment
    ago, so that losing it is a disturbance to wait out like any other.

    Connections that break or stall, 408, 425, 429 (with Retry-After) and 5xx answers, and contents that fail a check
    are tried again with growing random pauses, taking up the download where it broke off if the server can and its
    file is still the same. Raises UserError with the address and the reason when that does not help or cannot.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path.parent, path.name)
    if first_contact:
        require_reachable(url)
    progress = Progress(0, path.name, unit="B") if report is None else None
    try:
        with partial_file(path) as file:
            transfer = _Transfer(url, file, expected_size, report or _show_on(progress))
            _receive_patiently(transfer, first_contact, lambda: _check_content(file, check, expected_size, sha256))
            os.fsync(file.fileno())
            os.replace(file.name, path)
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror or error})"
        raise BlockedError(f"{reason}: free some space, or set NANOCHAT_BASE_DIR to another disk") from None
    finally:
        if progress:
            progress.close()
    return path


def require_reachable(url: str) -> None:
    """Raise BlockedError, within 10 seconds, when nobody answers at the host of an address (or at the proxy to it).

    The connection is made on a thread of its own because looking up a name has no time limit.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none, or brackets around what is no IPv6 address
        is_address = False
    if not is_address:
        raise UserError(f"{url} is no address: https://host/path is wanted")
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    if proxy:
        parts = urlsplit(requests.utils.prepend_scheme_if_needed(proxy, "http"))
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            outcome.append("")
        except OSError as error:
            outcome.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    reason = outcome[0] if outcome else f"no answer within {REACH_SECONDS:.0f} seconds"
    if reason:
        raise _unreachable(url, f"{address[0]} port {address[1]}: {reason}")


def remove_stale_partials(folder: Path, name: str | None = None) -> None:
    """Delete what killed downloads left in a folder, of one file name or of all.

    A running download holds a lock on its temporary file, so the files that can be locked are nobody's.
    """
    for stale in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.part"):
        with contextlib.suppress(OSError), open(stale, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink(missing_ok=True)


partial_paths: set[Path] = set()  # the temporary files of this process


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """Open a unique temporary file beside path, locked while it is in use; it is deleted unless it was renamed."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        with open(partial, "x+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # remove_stale_partials saw it between its creation and its locking
                continue
            except OSError:  # a file system without locks: there remove_stale_partials deletes nothing either
                pass
            if not partial.exists():
                continue
            partial_paths.add(partial)
            try:
                yield file
            finally:
                partial_paths.discard(partial)
                partial.unlink(missing_ok=True)
            return


class _Transfer:
    """A download under way: what has been received into the file, and what is known about the server's file."""

    def __init__(self, url: str, file: BinaryIO, expected_size: int | None, report: Callable[[int, int], None]):
        self.url, self.file, self.expected_size, self.report = url, file, expected_size, report
        self.total: int | None = expected_size
        self.validator = ""  # ETag or Last-Modified of the file that the received bytes belong to
        self.furthest = 0  # most bytes that any attempt reached

    @property
    def received(self) -> int:
        return self.file.tell()

    def start_over(self) -> None:
        """Forget what has been received."""
        self.file.seek(0)
        self.file.truncate()
        self.total, self.validator = self.expected_size, ""

    def receive(self) -> None:
        """One request: append to the file until it is whole. Raises _AttemptError."""
        headers = {"Accept-Encoding": "identity"}
        if self.received and self.validator:
            headers |= {"Range": f"bytes={self.received}-", "If-Range": self.validator}
        else:
            self.start_over()
        try:
            timeouts = (CONNECT_SECONDS, READ_SECONDS)
            with requests.get(self.url, headers=headers, stream=True, timeout=timeouts) as response:
                _check_status(response)
                self._begin(response)
                for chunk in response.iter_content(CHUNK_BYTES):
                    self.file.write(chunk)
                    self.furthest = max(self.furthest, self.received)
                    self.report(self.received, self.total or 0)
        except requests.RequestException as error:
            raise _explain(error, self.received) from None
        finally:
            self.file.flush()
        if self.total is not None and self.received != self.total:
            reason = f"{self.received:,} of {self.total:,} bytes arrived"
            raise _AttemptError(reason, keeps_bytes=self.received < self.total)

    def _begin(self, response: requests.Response) -> None:
        """Place the file for the answer: at its end for the rest that was asked for, at 0 for a whole file."""
        validator = _validator(response)
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            is_rest = match and int(match[1]) == self.received and match[2] in ("*", str(self.total))
            if not is_rest or validator != self.validator:
                raise _AttemptError("the server sent another part than the one asked for", keeps_bytes=False)
            return
        self.start_over()
        self.validator = validator
        is_encoded = response.headers.get("Content-Encoding", "identity") != "identity"  # then lengths are of the code
        length = response.headers.get("Content-Length", "")
        if is_encoded or not length.isdigit():
            return
        if self.expected_size is not None and int(length) != self.expected_size:
            reason = f"the server announces {int(length):,} bytes, not {self.expected_size:,}"
            raise _AttemptError(reason, keeps_bytes=False)
        self.total = int(length)


def _receive_patiently(transfer: _Transfer, first_contact: bool, check: Callable[[], None]) -> None:
    """Make attempts until the whole file is there and passes its check; UserError when that is hopeless."""
    failures = 0
    while True:
        reached = transfer.furthest
        try:
            transfer.receive()
            check()
            return
        except _AttemptError as error:
            failures = 1 if transfer.furthest - reached >= PROGRESS_BYTES else failures + 1
            if error.is_unreachable and (failures == ATTEMPTS or (first_contact and not transfer.furthest)):
                raise _unreachable(transfer.url, str(error)) from None
            if error.is_final:
                raise UserError(f"{transfer.url}: {error}") from None
            if failures == ATTEMPTS:
                advice = f"{failures} attempts failed, run the command again later"
                raise UserError(f"{transfer.url}: {error}; {advice}") from None
            if not error.keeps_bytes:
                transfer.start_over()
            backoff = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            time.sleep(max(backoff, error.wait_seconds or 0.0))


def _check_status(response: requests.Response) -> None:
    """Raise _AttemptError unless the answer carries the file or the part of it that was asked for."""
    status, reason = response.status_code, f"the server answers {response.status_code} {response.reason}"
    if status == 200 or (status == 206 and "Range" in response.request.headers):
        return
    if status == 416:  # nothing follows what we have, and yet it is not the whole file
        raise _AttemptError(reason, keeps_bytes=False)
    wait_seconds = _retry_after_seconds(response.headers.get("Retry-After", ""))
    if wait_seconds > MAX_RETRY_AFTER_SECONDS:
        raise _AttemptError(f"{reason} and asks to come back in {wait_seconds:.0f} seconds", is_final=True)
    raise _AttemptError(reason, is_final=status < 500 and status not in (408, 425, 429), wait_seconds=wait_seconds)


def _retry_after_seconds(value: str) -> float:
    """The pause that a Retry-After header asks for, given in seconds or as a date; 0 where there is none."""
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _validator(response: requests.Response) -> str:
    """What tells whether the server's file is still the same; '' where a download cannot be taken up again."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return ""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _explain(error: requests.RequestException, received: int) -> _AttemptError:
    """The reason of a failure of requests in a few words."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(error, requests.ConnectTimeout):
        return _AttemptError(f"no answer within {CONNECT_SECONDS:.0f} seconds", is_unreachable=True)
    if isinstance(cause, NewConnectionError):  # refused, no route, unknown name
        return _AttemptError(str(cause).rpartition(": ")[2], is_unreachable=True)
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return _AttemptError(f"no data for {READ_SECONDS:.0f} seconds after {received:,} bytes")
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, requests.ConnectionError)):
        return _AttemptError(f"the connection broke after {received:,} bytes")
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return _AttemptError("the content is damaged", keeps_bytes=False)
    return _AttemptError(str(error), is_final=True)  # such as a malformed address or a redirection without end


def _check_content(
    file: BinaryIO, check: Callable[[Path], Any] | None, expected_size: int | None, sha256: str | None
) -> None:
    """Raise _AttemptError unless a received file is what it should be."""
    size = file.tell()
    if expected_size is not None and size != expected_size:
        raise _AttemptError(f"{size:,} bytes arrived, not {expected_size:,}", keeps_bytes=False)
    if sha256 is not None:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise _AttemptError(f"its SHA-256 is {digest}, not {sha256}", keeps_bytes=False)
    if check is not None:
        try:
            check(Path(file.name))
        except ValueError as error:
            raise _AttemptError(f"the server sent something else than expected: {error}", keeps_bytes=False) from None


def _unreachable(url: str, reason: str) -> BlockedError:
    mirror = ", or set HF_ENDPOINT to a mirror" if url.startswith(hub_url("")) else ""
    return BlockedError(f"{url} cannot be reached ({reason}): check the network and run the command again{mirror}")


def _show_on(progress: Progress | None) -> Callable[[int, int], None]:
    """A report function for download_file that shows the bytes on a Progress."""

    def report(received: int, total: int) -> None:
        progress.total = total
        progress.update(received - progress.done)

    return report
