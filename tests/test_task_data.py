"""Task data: what is there is used, what is missing is fetched whole and once, what cannot be fetched is named."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from misbehaving_server import MisbehavingServer, closed_port

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # dev/ is no part of the installed package

from dev import gen_identity_data
from nanochat.common import UserError
from nanochat.download import HUB
from tasks import hub
from tasks.customjson import CustomJSON
from tasks.hub import find_file, load_table, table_folder

REPO = ("openai/gsm8k", "main", "train")
LISTING = "/api/datasets/openai/gsm8k/parquet/main/train"


def parquet_bytes(first: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": [f"q{i}" for i in range(first, first + 50)]}), sink)
    return sink.getvalue()


FILES = {f"/files/{number}.parquet": parquet_bytes(50 * number) for number in range(3)}


@pytest.fixture
def server(monkeypatch):
    """A hub with one data set of three files; its listing names the public host, as a mirror's may."""
    listing = json.dumps([f"{HUB}{path}" for path in FILES]).encode()
    with MisbehavingServer({LISTING: listing, **FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


def rows() -> list[str]:
    return load_table(*REPO).column("question").to_pylist()


ALL_ROWS = [f"q{i}" for i in range(150)]


def present() -> list[str]:
    folder = table_folder(*REPO)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


COMPLETE = ["00000.parquet", "00001.parquet", "00002.parquet", "manifest.json"]


def test_missing_tables_are_fetched_and_then_used(server, base_dir):
    assert table_folder(*REPO) == base_dir / "task_data" / "openai--gsm8k" / "main" / "train"
    assert rows() == ALL_ROWS and present() == COMPLETE
    assert json.loads((table_folder(*REPO) / "manifest.json").read_text()) == COMPLETE[:3]
    requests = len(server.requests)
    assert rows() == ALL_ROWS and len(server.requests) == requests == 4


def test_what_is_there_is_used_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    folder = table_folder(*REPO)
    folder.mkdir(parents=True)
    (folder / "mine.parquet").write_bytes(FILES["/files/1.parquet"])
    (folder / "unlisted.parquet").write_bytes(FILES["/files/0.parquet"])
    (folder / "manifest.json").write_text('["mine.parquet"]')
    assert rows() == ALL_ROWS[50:100]


@pytest.mark.parametrize("fault", ["cut", "503", "garbage", "announces_more"])
def test_disturbances_are_waited_out(server, fault):
    server.misbehave("/files/1.parquet", fault)
    server.misbehave(LISTING, "503", "cut")
    assert rows() == ALL_ROWS and present() == COMPLETE


def test_a_half_fetched_folder_is_completed(server):
    server.always("/files/1.parquet", "404")
    with pytest.raises(UserError, match=r"openai/gsm8k main/train cannot be fetched .*1\.parquet.*404"):
        rows()
    assert present() == ["00000.parquet"]  # no manifest: it is not complete
    server.lasting.clear()
    assert rows() == ALL_ROWS and present() == COMPLETE
    assert len(server.ranges("/files/0.parquet")) == 1


def test_damaged_files_are_fetched_again(server):
    rows()
    folder = table_folder(*REPO)
    (folder / "00000.parquet").unlink()
    (folder / "00002.parquet").write_bytes(FILES["/files/2.parquet"][:-30])
    assert rows() == ALL_ROWS and len(server.ranges("/files/1.parquet")) == 1
    (folder / "manifest.json").write_text("[")
    assert rows() == ALL_ROWS and present() == COMPLETE


def test_a_file_damaged_inside_is_named(server):
    rows()
    path = table_folder(*REPO) / "00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.parquet cannot be read .*delete it"):
        rows()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"<html>please log in</html>", "no JSON list of addresses"),
        (b'{"error": "no"}', "no JSON list of addresses"),
        (b"[1, 2]", "no JSON list of addresses"),
        (b'["file:///etc/passwd"]', "no JSON list of addresses"),
        (b"\xff\xfe", "no JSON list of addresses"),
        (b"[]", "lists no files"),
        (None, "404"),
    ],
)
def test_listings_that_are_none_are_one_line_errors(server, content, reason):
    if content is None:
        del server.files[LISTING]
    else:
        server.files[LISTING] = content
    with pytest.raises(UserError, match=reason) as error:
        rows()
    text = str(error.value)
    assert "\n" not in text and "the task data openai/gsm8k main/train" in text and str(table_folder(*REPO)) in text
    assert present() == []  # neither the listing nor a manifest is left


def test_other_hosts_in_a_listing_stay(server):
    with MisbehavingServer(FILES) as other:
        server.files[LISTING] = json.dumps([f"{other.url}/files/0.parquet"]).encode()
        assert rows() == ALL_ROWS[:50] and len(other.requests) == 1


def test_a_host_out_of_reach_is_told_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached .*manifest.json"):
        rows()
    assert time.monotonic() - start < 10


def test_missing_pocket_tables_are_not_looked_for_on_a_hub(server):
    with pytest.raises(UserError, match="run `python -m nanochat.pocket`"):
        load_table("pocket/PocketQA", "default", "test")
    assert not server.requests


def test_what_another_process_fetched_meanwhile_is_used(server, monkeypatch):
    locked = []

    @contextlib.contextmanager
    def lock(path: Path) -> Iterator[None]:  # it was waited for while the other process fetched
        locked.append(path)
        hub._fetch_table(*REPO, path)
        yield

    monkeypatch.setattr(hub, "file_lock", lock)
    assert rows() == ALL_ROWS and locked == [table_folder(*REPO)] and len(server.requests) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Word list and identity conversations


@pytest.mark.parametrize(
    "file, content",
    [(hub.WORDS, b"apple\r\npear\r\n"), (hub.IDENTITY, b'[{"role": "user", "content": "Who are you?"}]\n')],
)
def test_single_files_are_fetched_where_missing(base_dir, monkeypatch, file, content):
    with MisbehavingServer({"/file": content}) as server:
        monkeypatch.setenv(file.variable, f"{server.url}/file")
        server.misbehave("/file", "garbage", "cut")
        assert find_file(file) == base_dir / file.name and find_file(file).read_bytes() == content
        assert len(server.requests) == 3
        server.files.clear()
        find_file(file).unlink()
        with pytest.raises(UserError, match=f"{file.what} cannot be fetched .*404.*put it at {base_dir / file.name}"):
            find_file(file)


# ---------------------------------------------------------------------------------------------------------------------
# Identity conversations of one's own


def test_generated_identity_data_can_be_trained_on(tmp_path):
    persona = tmp_path / "persona.json"
    fact = {"questions": ["Where are you?"], "answers": ["{name} is on a shelf."]}
    persona.write_text(json.dumps({"name": "Pico", "maker": "a {club}", "facts": [fact]}), encoding="utf-8")
    outputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        gen_identity_data.main(gen_identity_data.Config(str(persona), 200, str(output), seed))
    texts = [output.read_text(encoding="utf-8") for output in outputs]
    assert texts[0] == texts[1] != texts[2]
    assert len(CustomJSON(outputs[0])) == 200 == len(set(texts[0].splitlines()))  # each of them checked
    assert "Pico is on a shelf." in texts[0] and "made by a {club}" in texts[0] and "nanochat" not in texts[0]


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be read"),
        ("name = ", "is no JSON file"),
        ("[]", "an object such as"),
        ('{"nmae": "Pico"}', "'nmae' is none of name"),
        ('{"name": 7}', '"name" should be a text'),
        ('{"facts": [{"questions": ["?"]}]}', '"facts" is a list of objects'),
    ],
)
def test_a_broken_persona_is_named(tmp_path, capsys, text, reason):
    path = tmp_path / "persona.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        gen_identity_data.main(gen_identity_data.Config(str(path), out=str(tmp_path / "out.jsonl")))
    assert reason in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_more_conversations_than_the_templates_give_is_an_error(monkeypatch):
    monkeypatch.setattr(gen_identity_data, "TRIES", 1)
    with pytest.raises(UserError, match="only .* different conversations"):
        gen_identity_data.generate(gen_identity_data.PERSONA, 5000, 1)
