"""Shards: fetching them, whose a folder is, and reading."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from misbehaving_server import MisbehavingServer, closed_port

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import Config, claim_folder, read_source, write_source

ROOT = Path(__file__).resolve().parents[1]


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 2, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)
    return path


def shard_bytes(tmp_path: Path, index: int) -> bytes:
    texts = [f"document {index}.{row} " + random.Random(index).randbytes(20_000).hex() for row in range(5)]
    return write_parquet(tmp_path / "made" / f"{index}.parquet", texts).read_bytes()


@pytest.fixture
def shards(tmp_path):
    """A server with six shards under /data."""
    files = {f"/data/{dataset.shard_name(index)}": shard_bytes(tmp_path, index) for index in range(6)}
    with MisbehavingServer(files) as server:
        yield server


def fetch(server: MisbehavingServer, num_files: int = -1, num_workers: int = 3) -> None:
    dataset.main(Config(num_files, num_workers, f"{server.url}/data", last_shard=5))


def present() -> list[str]:
    """Everything in the data folder but its records."""
    return sorted(path.name for path in dataset.data_folder().iterdir() if "source.json" not in path.name)


def names(*indices: int) -> list[str]:
    return [dataset.shard_name(index) for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_n_fetches_the_first_shards_and_the_last(shards):
    fetch(shards, num_files=2)
    assert present() == names(0, 1, 5)
    assert (dataset.data_folder() / "shard_00001.parquet").read_bytes() == shards.files["/data/shard_00001.parquet"]
    assert read_source(dataset.data_folder()) == {"source": f"{shards.url}/data/", "last_shard": 5}
    requests = len(shards.requests)
    fetch(shards, num_files=3)
    assert present() == names(0, 1, 2, 5) and len(shards.requests) == requests + 1
    fetch(shards)
    assert present() == names(0, 1, 2, 3, 4, 5)


def test_a_shard_cut_short_is_fetched_again_and_said(shards, capsys):
    fetch(shards, num_files=2)
    path = dataset.data_folder() / "shard_00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    fetch(shards, num_files=2)
    assert path.read_bytes() == shards.files["/data/shard_00001.parquet"]
    assert "shard_00001.parquet: it is cut short" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["garbage", "announces_less", "404"])
def test_shards_that_cannot_be_had_are_named_and_the_others_arrive(shards, capsys, fault):
    shards.always("/data/shard_00001.parquet", fault)
    shards.always("/data/shard_00003.parquet", fault)
    with pytest.raises(SystemExit) as exit:
        fetch(shards)
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert "error: 2 of 6 shards are missing" in error and "shard_00001.parquet, shard_00003.parquet (" in error
    assert present() == names(0, 2, 4, 5)
    assert read_source(dataset.data_folder()) is None
    with pytest.raises(
        UserError, match="not complete.*python -m nanochat.dataset -n 8 --source=.*/data/ --last_shard=5"
    ):
        dataset.list_parquet_files()
    shards.lasting.clear()
    fetch(shards)
    assert present() == names(0, 1, 2, 3, 4, 5) and len(dataset.list_parquet_files()) == 6


def test_a_host_out_of_reach_ends_the_command(capsys):
    with pytest.raises(SystemExit):
        dataset.main(Config(8, 4, f"http://127.0.0.1:{closed_port()}/data", last_shard=5))
    assert "cannot be reached" in capsys.readouterr().err
    assert present() == []
    claim_folder(dataset.data_folder(), {"source": "pocket"})  # nothing has arrived, so the folder is free


def test_a_host_lost_on_the_way_ends_the_fetch_of_all_shards(shards, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "require_reachable", lambda url: shards.http.server_close() or shards.http.shutdown())
    with pytest.raises(SystemExit):
        fetch(shards, num_workers=1)
    error = capsys.readouterr().err
    assert "6 of 6 shards are missing" in error and error.count("cannot be reached") == 1


def test_hf_endpoint_replaces_the_hub(shards, monkeypatch):
    monkeypatch.setitem(dataset.HUB_SOURCES, "fineweb-edu", ("someone/text", 5))
    prefix = "/datasets/someone/text/resolve/main"
    shards.files = {path.replace("/data", prefix): content for path, content in shards.files.items()}
    monkeypatch.setenv("HF_ENDPOINT", shards.url + "/")
    dataset.main(Config(num_files=1))
    assert present() == names(0, 5)
    assert read_source(dataset.data_folder()) == {"source": "fineweb-edu", "last_shard": 5}


def test_published_addresses():
    source = dataset.find_source("fineweb-edu")
    url = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_01822.parquet"
    assert source.base + dataset.shard_name(source.last_shard) == url
    climbmix = dataset.find_source("climbmix")
    assert climbmix.last_shard == 6542 and "karpathy/climbmix-400b-shuffle" in climbmix.base


def test_a_local_folder_is_a_source(tmp_path, capsys):
    folder = tmp_path / "mine"
    for index in range(4):
        write_parquet(folder / f"part-{index}.parquet", [f"text {index}", "more"])
    (folder / "part-1.parquet").write_bytes(b"PAR1")
    dataset.main(Config(num_files=1, source=str(folder)))
    assert present() == names(0, 3)
    assert list(dataset.parquets_iter_batched("val")) == [["text 3", "more"]]
    source = read_source(dataset.data_folder())
    assert len(source.pop("digest")) == 16 and source == {"source": str(folder), "last_shard": 3}
    with pytest.raises(SystemExit):
        dataset.main(Config(num_files=2, source=str(folder)))
    assert "shard_00001.parquet (" in (error := capsys.readouterr().err) and "part-1.parquet" in error


def test_a_local_folder_on_another_disk_is_copied(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(dataset.os, "link", refuse)
    for index in range(2):
        write_parquet(tmp_path / "mine" / f"{index}.parquet", [f"text {index}"])
    dataset.main(Config(source=str(tmp_path / "mine")))
    assert present() == names(0, 1)
    assert list(dataset.parquets_iter_batched("train")) == [["text 0"]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_files": 0}, "--num_files=0"),
        ({"num_files": -2}, "--num_files=-2"),
        ({"num_workers": 0}, "--num_workers=0: at least 1"),
        ({"source": "fineweb"}, "did you mean --source=fineweb-edu"),
        ({"source": "http://127.0.0.1:1/"}, "needs --last_shard"),
        ({"last_shard": 7}, "ends with shard 1822"),
    ],
)
def test_wrong_settings_are_told_before_anything_happens(tmp_path, capsys, settings, message):
    with pytest.raises(SystemExit):
        dataset.main(Config(**settings))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "base" / "base_data").exists()


def test_a_disk_that_is_too_small_is_told_before_the_download(monkeypatch, capsys):
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 400_000_000}))
    with pytest.raises(SystemExit):
        dataset.main(Config(num_files=4))
    assert "about 0.5 GB" in (error := capsys.readouterr().err) and "0.4 GB free" in error


def command(server: MisbehavingServer) -> subprocess.Popen:
    words = [sys.executable, "-m", "nanochat.dataset", f"--source={server.url}/data", "--last_shard=5", "-w", "2"]

    def listen() -> None:  # a job in the background of a shell inherits that it does not hear Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, preexec_fn=listen, **pipes)


def test_two_processes_fetch_into_one_folder(shards):
    for index in (0, 5):
        shards.misbehave(f"/data/{dataset.shard_name(index)}", "stall")
    process = command(shards)
    assert shards.stalled.wait(60)
    fetch(shards)  # while the other one holds two of the shards half-way
    shards.released.set()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert present() == names(0, 1, 2, 3, 4, 5)
    for name in present():
        assert (dataset.data_folder() / name).read_bytes() == shards.files[f"/data/{name}"]


def test_ctrl_c_ends_it_within_moments_and_leaves_no_temporary_file(shards):
    for index in range(6):
        shards.always(f"/data/{dataset.shard_name(index)}", "stall")
    process = command(shards)
    assert shards.stalled.wait(60)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == 130 and error.strip() == "interrupted"
    assert present() == []


# ---------------------------------------------------------------------------------------------------------------------
# Whose a folder is


def test_a_folder_belongs_to_one_source(tmp_path):
    folder = tmp_path / "base" / "base_data"
    claim_folder(folder, {"source": "pocket", "seed": 1})
    assert read_source(folder) is None  # not finished
    with pytest.raises(
        UserError, match="holds pocket .seed 1., not fineweb-edu.*NANOCHAT_BASE_DIR=.*base-fineweb-edu "
    ):
        claim_folder(folder, {"source": "fineweb-edu"})
    claim_folder(folder, {"source": "pocket", "seed": 1})
    write_source(folder, {"source": "pocket", "seed": 1, "digest": "abc"})
    claim_folder(folder, {"source": "pocket", "seed": 1})
    assert read_source(folder) == {"source": "pocket", "seed": 1, "digest": "abc"}
    with pytest.raises(UserError, match="seed 1.*seed 2"):
        claim_folder(folder, {"source": "pocket", "seed": 2})
    assert not (folder / "source.json.unfinished").exists()


def test_a_folder_of_the_users_own_is_read_and_never_written(tmp_path):
    folder = tmp_path / "base" / "base_data"
    for index in range(2):
        write_parquet(folder / f"{index}.parquet", ["text"])
    with pytest.raises(UserError, match="parquet files of your own: set NANOCHAT_BASE_DIR="):
        claim_folder(folder, {"source": "fineweb-edu"})
    assert len(dataset.list_parquet_files()) == 2
    assert not list(folder.glob("source.json*"))


def test_the_advised_base_directory_is_free(tmp_path):
    (tmp_path / "base-pocket").mkdir()
    advice = dataset._elsewhere(tmp_path / "base" / "base_data", {"source": "pocket"})
    assert f"NANOCHAT_BASE_DIR={tmp_path / 'base-pocket-2'} " in advice


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "source.json").write_text("{")
    with pytest.raises(UserError, match="source.json is damaged"):
        read_source(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def folder(tmp_path):
    """Three shards: five documents, three, and one with a null."""
    folder = tmp_path / "base" / "base_data"
    write_parquet(folder / "shard_00000.parquet", ["a", "b", "c", "d", "e"])
    write_parquet(folder / "shard_00001.parquet", ["f", "g", "h"])
    write_parquet(folder / "shard_00007.parquet", ["v", None])
    (folder / ".shard_00002.parquet.0123.part").write_bytes(b"")
    (folder / ".hidden.parquet").write_bytes(b"")
    return folder


def test_row_groups_are_numbered_over_all_shards(folder):
    assert list(dataset.parquets_iter_batched("train")) == [["a", "b"], ["c", "d"], ["e"], ["f", "g"], ["h"]]
    assert list(dataset.parquets_iter_batched("train", start=1, step=2)) == [["c", "d"], ["f", "g"]]
    assert list(dataset.parquets_iter_batched("train", max_shards=1)) == [["a", "b"], ["c", "d"], ["e"]]
    files = dataset.split_files("train")
    assert dataset.row_groups(files)[2:4] == [(files[0], 2, 1), (files[1], 0, 2)]
    assert dataset.read_row_group(files[1], 1) == ["h"]


def test_validation_is_the_last_shard_and_a_null_is_an_empty_text(folder):
    assert list(dataset.parquets_iter_batched("val")) == [["v", ""]]
    assert [path.name for path in dataset.list_parquet_files()] == names(0, 1, 7)


def test_another_shard_never_becomes_the_validation_set(folder):
    write_source(folder, {"source": "fineweb-edu", "last_shard": 7})
    assert len(dataset.list_parquet_files()) == 3
    (folder / "shard_00007.parquet").unlink()
    with pytest.raises(UserError, match="shard_00007.parquet is missing: run `python -m nanochat.dataset -n 8`"):
        dataset.list_parquet_files()


def test_folders_without_enough_shards_are_told(tmp_path):
    for expected in ("there are no shards in", "there are no shards in", "holds one shard"):
        with pytest.raises(UserError, match=f"{expected}.*python -m nanochat.dataset -n 8.*python -m nanochat.pocket"):
            dataset.list_parquet_files()
        folder = tmp_path / "base" / "base_data"
        if folder.exists():
            write_parquet(folder / "0.parquet", ["text"])
        folder.mkdir(parents=True, exist_ok=True)


def test_wrong_readers_settings_are_told(folder):
    for settings in ({"split": "test"}, {"split": "train", "max_shards": 0}, {"split": "val", "step": 0}):
        with pytest.raises(UserError):
            dataset.parquets_iter_batched(**settings)


def test_bad_files_are_named_before_the_first_document(folder):
    path = folder / "shard_00001.parquet"
    good = path.read_bytes()
    cases = {
        "cut short": good[:-10],
        "no Parquet file": b"<html>" + good,
        "footer is damaged": b"PAR1" + bytes(40) + (40).to_bytes(4, "little") + b"PAR1",
        "it begins with b''": b"",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"shard_00001.parquet: .*{message}"):
            dataset.parquets_iter_batched("train")
    for message, table in {
        r"no column `text` \(it has: content\)": pa.table({"content": ["a"]}),
        "holds int64": pa.table({"text": [1]}),
        "no rows": pa.table({"text": pa.array([], pa.string())}),
    }.items():
        pq.write_table(table, path)
        with pytest.raises(UserError, match=f"shard_00001.parquet: .*{message}"):
            dataset.parquets_iter_batched("train")


def test_a_damaged_row_group_is_named(folder):
    path = folder / "shard_00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(UserError, match="shard_00001.parquet: row group 0 cannot be read"):
        list(dataset.parquets_iter_batched("train"))


def test_an_edit_of_ones_own_text_is_another_fingerprint_whatever_its_size(tmp_path):
    """The footer alone does not tell: the letter is neither in the least nor in the greatest text."""
    texts = ["a", "the capital is Oslo", "z"]
    one = write_parquet(tmp_path / "1.parquet", texts, row_group_size=3)
    before = dataset.shard_fingerprint(one), dataset._footer_hash(one)
    content = one.read_bytes()
    assert content.count(b"Oslo") == 1
    one.write_bytes(content.replace(b"Oslo", b"Lima"))
    os.utime(one, ns=(1, 1))
    assert dataset.shard_fingerprint(one) != before[0] and dataset._footer_hash(one) == before[1]
    dataset.write_source(tmp_path, {"source": "fineweb-edu"})
    assert dataset.shard_fingerprint(one) == before[1]


def test_a_local_folder_with_another_content_is_another_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    source = tmp_path / "shards"
    source.mkdir()
    for index in range(2):
        write_parquet(source / dataset.shard_name(index), [f"old {index}"])
    command = dataset.Config(num_files=-1, source=str(source))
    dataset.main(command)
    dataset.main(command)
    for index in range(2):
        (source / dataset.shard_name(index)).unlink()
        write_parquet(source / dataset.shard_name(index), [f"new {index}"])
    with pytest.raises(SystemExit):
        dataset.main(command)
    assert re.search(r"holds .*digest \w{16}\), not .*digest \w{16}\)", capsys.readouterr().err)


def test_fingerprints_tell_contents_apart(tmp_path):
    one = write_parquet(tmp_path / "1.parquet", ["a", "b"])
    same = write_parquet(tmp_path / "2.parquet", ["a", "b"])
    other = write_parquet(tmp_path / "3.parquet", ["a", "c"])
    assert len(dataset.shard_fingerprint(one)) == 16
    assert dataset.shard_fingerprint(one) == dataset.shard_fingerprint(same) != dataset.shard_fingerprint(other)
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(UserError, match="1.parquet: it is cut short"):
        dataset.shard_fingerprint(one)
