"""Downloading from servers that misbehave."""

import hashlib
import os
import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from misbehaving_server import MisbehavingServer, closed_port

from nanochat import download
from nanochat.common import UserError
from nanochat.download import BlockedError, download_file

CONTENT = random.Random(0).randbytes(400_000)  # several chunks, so that something is kept when a connection is cut
HALF = "bytes=196608-"  # the whole chunks in the first half of it
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server():
    with MisbehavingServer({"/file": CONTENT}) as server:
        yield server


@pytest.mark.parametrize(
    "faults, ranges",
    [
        ([], [None]),
        (["cut"], [None, HALF]),
        (["503", "429"], [None, None, None]),
        (["cut", "503"], [None, HALF, HALF]),
        (["cut_without_etag"], [None, None]),
        (["cut", "ignoring_range"], [None, HALF]),
        (["cut", "wrong_range"], [None, HALF, None]),
        (["announces_more"], [None, "bytes=393216-", None]),
        (["announces_less"], [None, None]),
        (["garbage", "garbage"], [None, None, None]),
        (["gzip"], [None]),
        (["gzip_cut"], [None, None]),
        (["redirect"], [None]),
    ],
)
def test_whole_file_arrives_despite(server, tmp_path, faults, ranges):
    server.files["/elsewhere"] = CONTENT
    server.misbehave("/file", *faults)
    path = tmp_path / "new" / "file"
    assert download_file(f"{server.url}/file", path, sha256=hashlib.sha256(CONTENT).hexdigest()) == path
    assert path.read_bytes() == CONTENT
    assert server.ranges("/file") == ranges
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("answer", ["well", "ignoring_if_range"])
def test_content_that_changes_between_attempts_is_not_mixed(server, tmp_path, monkeypatch, answer):
    changed = random.Random(1).randbytes(len(CONTENT))
    server.misbehave("/file", "cut", answer)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: server.files.update({"/file": changed}))
    download_file(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == changed
    assert server.ranges("/file")[1] == HALF


def test_stalled_connection_is_taken_up_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "READ_SECONDS", 0.2)
    server.misbehave("/file", "stall")
    download_file(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "fault, message, requests",
    [
        ("404", "404 Not Found", 1),
        ("401", "401 Unauthorized", 1),
        ("503", "503 Service Unavailable; 6 attempts failed", 6),
        ("cut_without_etag", "the connection broke after", 6),
        ("announces_less", "its SHA-256 is", 6),
        ("garbage", "its SHA-256 is", 6),
    ],
)
def test_hopeless_downloads_end_with_a_reason_and_without_a_trace(server, tmp_path, fault, message, requests):
    server.always("/file", fault)
    old = tmp_path / "file"
    old.write_text("old")
    with pytest.raises(UserError, match=message) as error:
        download_file(f"{server.url}/file", old, sha256="0" * 64)
    assert f"{server.url}/file" in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) == requests
    assert os.listdir(tmp_path) == ["file"] and old.read_text() == "old"


def test_expected_size_is_checked_before_anything_is_received(server, tmp_path):
    with pytest.raises(UserError, match="announces 400,000 bytes, not 400,001"):
        download_file(f"{server.url}/file", tmp_path / "file", expected_size=400_001)
    download_file(f"{server.url}/file", tmp_path / "file", expected_size=400_000)


def test_steady_progress_is_not_counted_against_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS_BYTES", 20_000)
    content = random.Random(2).randbytes(3_000_000)
    with MisbehavingServer({"/file": content}) as server:
        server.misbehave("/file", *["cut"] * (download.ATTEMPTS + 1))
        monkeypatch.setattr(download, "CHUNK_BYTES", 1 << 12)
        download_file(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("status", ["429", "503"])
def test_retry_after_is_honoured(server, tmp_path, monkeypatch, status):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.retry_after = "7"
    server.misbehave("/file", status)
    download_file(f"{server.url}/file", tmp_path / "file")
    assert pauses == [7.0]


def test_retry_after_may_be_a_date_or_too_long_to_wait(server, tmp_path):
    in_a_minute = (datetime.now(UTC) + timedelta(seconds=60)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 55 < download._retry_after_seconds(in_a_minute) <= 60
    assert download._retry_after_seconds("soon") == download._retry_after_seconds("") == 0
    server.retry_after = "86400"
    server.misbehave("/file", "429")
    with pytest.raises(UserError, match="asks to come back in 86400 seconds"):
        download_file(f"{server.url}/file", tmp_path / "file")


def test_pauses_grow_and_are_bounded(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 8.0)
    monkeypatch.setattr(download.random, "uniform", lambda low, high: 1.0)
    server.always("/file", "500")
    with pytest.raises(UserError, match="500"):
        download_file(f"{server.url}/file", tmp_path / "file")
    assert pauses == [8, 16, 32, 60, 60]


def test_a_host_that_refuses_is_told_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(BlockedError, match="cannot be reached .*refused"):
        download_file(f"http://127.0.0.1:{closed_port()}/file", tmp_path / "file")
    assert time.monotonic() - start < 2


def test_a_host_that_does_not_answer_is_told_within_ten_seconds(tmp_path, monkeypatch):
    def hang(*args, **kwargs):
        time.sleep(1)
        raise OSError("too late")

    assert download.REACH_SECONDS <= 9
    monkeypatch.setattr(download, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", hang)  # as with a name server that does not answer
    start = time.monotonic()
    with pytest.raises(BlockedError, match="no answer within"):
        download_file("https://huggingface.co/file", tmp_path / "file")
    assert time.monotonic() - start < 0.9


def test_a_redirection_to_a_host_out_of_reach_is_told_at_once(server, tmp_path):
    server.always("/file", "redirect")
    server.location = f"http://127.0.0.1:{closed_port()}/file"
    with pytest.raises(BlockedError, match="refused"):
        download_file(f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 1


def test_a_full_disk_is_told(server, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(BlockedError, match="No space left on device.*NANOCHAT_BASE_DIR"):
        download_file(f"{server.url}/file", tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_malformed_addresses_are_told(tmp_path):
    for url in (
        "ftp://host/file",
        "file",
        "https://",
        "http://host:80a/file",
        "http://host:99999/file",
        "http://[host/file",
    ):
        with pytest.raises(UserError, match="is no address"):
            download_file(url, tmp_path / "file")


def test_stale_temporary_files_go_and_those_in_use_stay(tmp_path):
    stale = tmp_path / ".file.0123.part"
    stale.write_bytes(b"left by a killed run")
    with download.partial_file(tmp_path / "file") as file:
        download.remove_stale_partials(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [os.path.basename(file.name)]
    assert list(tmp_path.iterdir()) == []


def test_two_downloads_of_one_file_do_not_collide(server, tmp_path):
    server.misbehave("/file", "slowly", "well")
    slow = threading.Thread(target=download_file, args=(f"{server.url}/file", tmp_path / "file"))
    slow.start()
    server.stalled.wait()
    download_file(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    server.released.set()  # the first is cut, taken up again, and replaces the file by the same
    slow.join()
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
