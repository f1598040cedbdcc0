"""Shards made from a corpus: every document once, full row groups, a true and repeatable shuffle."""

import collections
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # dev/ is no part of the installed package

from dev import repackage_data_reference as repackage
from nanochat import dataset
from nanochat.configurator import parse

DOCS = [f"document {index}: " + "é" * (index % 90) for index in range(500)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """DOCS in all three formats, in subfolders, with empty documents among them."""
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    pq.write_table(pa.table({"text": [*DOCS[:200], None, ""], "id": range(202)}), folder / "a.parquet")
    lines = [json.dumps({"text": text}) for text in DOCS[200:490]] + ["{}"]
    (folder / "deeper" / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for index, text in enumerate(DOCS[490:]):
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("no document")
    return folder


def run(corpus: Path, output: Path, **settings: int) -> list[list[str]]:
    """Repackage in several buckets; the row groups that come out, in order."""
    defaults = {"shard_chars": 8_000, "row_group_size": 16, "bucket_bytes": 10_000}
    repackage.main(repackage.Config(str(corpus), str(output), **(defaults | settings)))
    files = dataset.list_parquet_files(output)
    return [dataset.read_row_group(group.path, group.index) for group in dataset.row_groups(files)]


def test_every_document_once_in_full_row_groups(corpus, tmp_path, capsys):
    groups = run(corpus, tmp_path / "out")
    texts = [text for group in groups for text in group]
    assert collections.Counter(texts) == collections.Counter(DOCS)
    assert [len(group) for group in groups] == [16] * 31 + [4]
    assert texts != DOCS and "3 empty documents left out" in capsys.readouterr().out


def test_shards_are_compressed_and_of_about_the_size_asked_for(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    num_shards = round(sum(map(len, DOCS)) / 8_000)
    assert [path.name for path in files] == [dataset.shard_name(index) for index in range(num_shards)]
    for path in files:
        assert 6_000 < sum(len(text) for text in pq.read_table(path).column("text").to_pylist()) < 10_000
        assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_the_seed_and_nothing_else_decides_the_order(corpus, tmp_path):
    first = run(corpus, tmp_path / "1", seed=7)
    assert run(corpus, tmp_path / "2", seed=7) == first
    assert run(corpus, tmp_path / "3", seed=8) != first
    assert [path.read_bytes() for path in sorted((tmp_path / "1").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "2").iterdir())
    ]


@pytest.mark.parametrize("num_buckets", [1, 2, 3])
def test_all_orders_are_equally_likely(tmp_path, num_buckets):
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": letter}) for letter in "abc"), encoding="utf-8")
    counts = collections.Counter()
    for seed in range(1200):
        buckets = [io.BytesIO() for _ in range(num_buckets)]
        repackage.scatter([tmp_path / "docs.jsonl"], "text", buckets, seed)
        counts["".join(repackage.gather(buckets, seed))] += 1
    assert len(counts) == 6
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_squared < 20.5  # 5 degrees of freedom: exceeded by chance once in a thousand; the seeds are fixed


@pytest.mark.parametrize(
    "num_docs, shard_chars, expected",
    [(1000, 10**9, [5, 5]), (1000, 2_500, [2, 3, 2, 3]), (950, 1, [1] * 10), (101, 10**9, [1, 1])],
)
def test_shards_share_the_row_groups(num_docs, shard_chars, expected):
    assert repackage.groups_per_shard(num_docs, 10_000, 100, shard_chars) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"row_group_size": 500}, "lower --row_group_size, for instance to 50"),
        ({"row_group_size": 0}, "--row_group_size=0"),
        ({"column": "body"}, "column `body`"),
        ({"input": "/nowhere"}, "--input=/nowhere is no folder"),
    ],
)
def test_what_cannot_work_is_told(corpus, tmp_path, capsys, settings, message):
    with pytest.raises(SystemExit):
        repackage.main(repackage.Config(**({"input": str(corpus), "output": str(tmp_path / "out")} | settings)))
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("**/*"))  # no shard, no bucket


def test_bad_lines_are_named(corpus, tmp_path, capsys):
    (corpus / "deeper" / "b.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        run(corpus, tmp_path / "out")
    assert "b.jsonl:2: 'text' is no string" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [("c.txt", "né".encode("latin-1"), "c.txt"), ("c.jsonl", b'{"text": "a"}\n{"text": "n\xe9"}\n', "c.jsonl:2")],
)
def test_what_is_not_utf8_is_named(tmp_path, capsys, name, content, place):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(SystemExit):
        run(tmp_path / "in", tmp_path / "out")
    assert f"{place}: the text is not UTF-8" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_left_out_or_replaced(tmp_path):
    """A byte order mark, the line ends of other systems, half a surrogate pair."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (tmp_path / "in" / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "half \\ud83d"}\r\n{"text": "\\ud83d\\ude00"}\r\n')
    texts = [text for group in run(tmp_path / "in", tmp_path / "out", row_group_size=1) for text in group]
    assert sorted(texts) == sorted(["one\ntwo\nthree", "half \ufffd", "😀"])


def test_existing_shards_are_not_overwritten(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "out")
    with pytest.raises(SystemExit):
        run(corpus, tmp_path / "out")
    assert "holds parquet files already" in capsys.readouterr().err


def test_the_folders_are_required(capsys):
    with pytest.raises(SystemExit):
        parse(repackage.Config, ["--output=out"])
    assert "--input is required" in capsys.readouterr().err
