"""A local HTTP server that serves files from memory and misbehaves on request, for tests of whatever downloads.

    with MisbehavingServer({"/shard_00000.parquet": content}) as server:
        server.misbehave("/shard_00000.parquet", "cut", "503")  # the first two requests; the third is served well
        download_file(f"{server.url}/shard_00000.parquet", path)
        server.ranges("/shard_00000.parquet")                   # -> [None, "bytes=65536-", "bytes=65536-"]

Served well means: an ETag of the content, Content-Length, and Range with If-Range. The ways to misbehave are the
methods of _Handler that begin with `serve_`, and any status code as digits.
"""

import gzip
import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MisbehavingServer:
    """Serves a dict of path -> content on 127.0.0.1; see the module docstring."""

    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)
        self.faults: dict[str, list[str]] = {}  # path -> what to do with the next requests
        self.lasting: dict[str, str] = {}  # path -> what to do with every request
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header)
        self.retry_after = "0"  # goes with 429 and 503
        self.location = "/elsewhere"  # goes with "redirect"
        self.released = threading.Event()  # ends "stall"
        self.stalled = threading.Event()  # a request has reached "stall"

    def __enter__(self) -> "MisbehavingServer":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.daemon_threads = True
        self.http.script = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def misbehave(self, path: str, *faults: str) -> None:
        """Do these things with the next requests for a path, in this order."""
        self.faults.setdefault(path, []).extend(faults)

    def always(self, path: str, fault: str) -> None:
        """Do this with every request for a path."""
        self.lasting[path] = fault

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a path so far."""
        return [header for requested, header in self.requests if requested == path]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        script: MisbehavingServer = self.server.script
        script.requests.append((self.path, self.headers["Range"]))
        faults = script.faults.get(self.path)
        fault = faults.pop(0) if faults else script.lasting.get(self.path, "well")
        content = script.files.get(self.path)
        if content is None:
            fault = "404"
        try:
            if fault.isdigit():
                self.serve_status(int(fault))
            else:
                getattr(self, f"serve_{fault}")(content)
        except (BrokenPipeError, ConnectionResetError):  # the client went away
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass

    def respond(self, status: int, body: bytes, sent: bytes | None = None, **headers: str | None) -> None:
        """Send a status and headers for body (None drops one, `_` stands for `-`), then sent instead of body."""
        defaults = {"Content_Length": str(len(body)), "ETag": _etag(self.server.script.files.get(self.path, b""))}
        self.send_response(status)
        for name, value in (defaults | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if sent is None else sent)

    def part(self, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of a good answer to this request."""
        header = self.headers["Range"]
        if header is None or self.headers["If-Range"] not in (None, _etag(content)):
            return 200, content, {}
        start = int(header.removeprefix("bytes=").split("-")[0])
        if start >= len(content):
            return 416, b"", {"Content_Range": f"bytes */{len(content)}"}
        return 206, content[start:], {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}

    def serve_status(self, status: int) -> None:
        body = b"<html>no</html>"
        self.respond(status, body, Retry_After=self.server.script.retry_after if status in (429, 503) else None)

    def serve_well(self, content: bytes) -> None:
        status, body, headers = self.part(content)
        self.respond(status, body, **headers)

    def serve_cut(self, content: bytes) -> None:
        """Close the connection half-way through the body."""
        status, body, headers = self.part(content)
        self.respond(status, body, sent=body[: len(body) // 2], **headers)

    def serve_cut_without_etag(self, content: bytes) -> None:
        """The same from a server that gives nothing to recognise its file by."""
        self.respond(200, content, sent=content[: len(content) // 2], ETag=None)

    def serve_stall(self, content: bytes) -> None:
        """Send half of the body, then nothing."""
        status, body, headers = self.part(content)
        self.respond(status, body, sent=body[: len(body) // 2], **headers)
        self.wfile.flush()
        self.server.script.stalled.set()
        self.server.script.released.wait(60)

    def serve_announces_more(self, content: bytes) -> None:
        """A Content-Length that is larger than the body."""
        self.respond(200, content, Content_Length=str(len(content) + 100))

    def serve_announces_less(self, content: bytes) -> None:
        """A Content-Length that is smaller than the body."""
        self.respond(200, content, Content_Length=str(len(content) // 2))

    def serve_garbage(self, content: bytes) -> None:
        """A page of a captive portal, with status 200."""
        self.respond(200, b"<html>please log in</html>", ETag=None)

    def serve_ignoring_range(self, content: bytes) -> None:
        """The whole file whatever part was asked for."""
        self.respond(200, content)

    def serve_wrong_range(self, content: bytes) -> None:
        """Another part than the one that was asked for."""
        self.respond(206, content[10:], Content_Range=f"bytes 10-{len(content) - 1}/{len(content)}")

    def serve_ignoring_if_range(self, content: bytes) -> None:
        """The part that was asked for, even though the file is no longer the one that the client began with."""
        del self.headers["If-Range"]
        self.serve_well(content)

    def serve_gzip(self, content: bytes) -> None:
        """Compressed, though the client did not ask for it; the Content-Length is of the compressed bytes."""
        self.respond(200, gzip.compress(content, 1), Content_Encoding="gzip")

    def serve_gzip_cut(self, content: bytes) -> None:
        """Compressed and cut."""
        code = gzip.compress(content, 1)
        self.respond(200, code, sent=code[: len(code) // 2], Content_Encoding="gzip")

    def serve_redirect(self, content: bytes) -> None:
        """To where the server's location says."""
        self.respond(302, b"", Location=self.server.script.location)

    def serve_slowly(self, content: bytes) -> None:
        """A trickle that takes minutes."""
        self.respond(200, content, sent=b"")
        for start in range(0, len(content), 1000):
            self.wfile.write(content[start : start + 1000])
            self.server.script.stalled.set()
            if self.server.script.released.wait(0.1):
                return


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
