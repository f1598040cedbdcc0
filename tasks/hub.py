"""Task data on disk: parquet tables of data sets, the word list and the identity conversations; fetched where missing.

A table lies in the base directory as task_data/{org}--{name}/{subset}/{split}/00000.parquet, 00001.parquet, ... and a
manifest.json, the list of the file names, which is written last and means "complete". What is there is used and no
network is touched, whoever put it there. What is missing is fetched from where the hub's parquet listing says it is;
HF_ENDPOINT replaces the hub's host. The word list and the identity conversations are plain files with an address each,
which NANOCHAT_WORDS_URL and NANOCHAT_IDENTITY_URL replace.

Processes need not ask together: the first that finds something missing fetches it under a lock between processes, the
others wait for the lock and find it there. So a task may load its data whenever it likes, on one rank alone too.

What it does not do: shuffle, or know what the columns mean (the tasks do).
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write, file_lock, get_base_dir, print0
from nanochat.dataset import read_footer
from nanochat.download import HUB, download_file, hub_url

POCKET_OWNER = "pocket"  # tables of the pocket world are written by nanochat.pocket and are on no hub

# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table_folder(repo: str, subset: str, split: str) -> Path:
    """'openai/gsm8k', 'main', 'train' -> task_data/openai--gsm8k/main/train in the base directory."""
    return get_base_dir() / "task_data" / repo.replace("/", "--") / subset / split


def load_table(repo: str, subset: str, split: str) -> pa.Table:
    """All rows of one split of a data set, in the order of its files; fetched first where they are missing.

    Raises UserError naming what cannot be fetched or read, and what to do.
    """
    folder = table_folder(repo, subset, split)
    if not is_complete(folder):
        with file_lock(folder):
            if not is_complete(folder):
                _fetch_table(repo, subset, split, folder)
    tables = []
    for name in read_manifest(folder) or []:
        try:
            tables.append(pq.read_table(folder / name, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / name} cannot be read ({reason}): delete it and run the command again") from None
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise UserError(f"the files in {folder} have different columns ({error}): delete the folder") from None


def read_manifest(folder: Path) -> list[str] | None:
    """The file names of a folder's manifest.json; None where there is none, or none that can be used."""
    try:
        names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return names if _is_list_of_strings(names) and names else None


def is_complete(folder: Path) -> bool:
    """Whether a folder's manifest is there, and every file that it lists is a whole Parquet file."""
    names = read_manifest(folder)
    return names is not None and all(_is_parquet(folder / name) for name in names)


def _is_parquet(path: Path) -> bool:
    try:
        read_footer(path)
    except (ValueError, OSError):
        return False
    return True


def _fetch_table(repo: str, subset: str, split: str, folder: Path) -> None:
    """Bring the files of a split that are not there yet, then write the manifest."""
    what = f"the task data {repo} {subset}/{split}"
    if repo.startswith(f"{POCKET_OWNER}/"):
        raise UserError(f"{what} is not complete in {folder}: run `python -m nanochat.pocket` to write it")
    try:
        urls = list_files(repo, subset, split, folder)
        names = [f"{index:05d}.parquet" for index in range(len(urls))]
        missing = [(url, name) for url, name in zip(urls, names, strict=True) if not _is_parquet(folder / name)]
        print0(f"fetching {what}: {len(missing)} of {len(names)} files into {folder}")
        for url, name in missing:
            download_file(url, folder / name, read_footer)
    except UserError as error:
        raise UserError(
            f"{what} cannot be fetched ({error}); or put its parquet files into {folder} yourself, with a manifest.json"
            ' that lists them, such as ["00000.parquet"]'
        ) from None
    with atomic_write(folder / "manifest.json") as file:
        json.dump(names, file)


def list_files(repo: str, subset: str, split: str, folder: Path) -> list[str]:
    """The addresses of a split's parquet files, as the hub lists them. folder: where the listing may lie for a moment.

    Addresses on the public hub are moved to HF_ENDPOINT. Raises UserError where there is no such listing.
    """
    url = hub_url(f"api/datasets/{repo}/parquet/{subset}/{split}")
    path = download_file(url, folder / ".listing.json")
    try:
        urls = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        urls = None
    finally:
        path.unlink()
    if not _is_list_of_strings(urls) or not all(address.startswith(("http://", "https://")) for address in urls):
        raise UserError(f"{url}: the answer is no JSON list of addresses, as a hub gives; check HF_ENDPOINT")
    if not urls:
        raise UserError(f"{url}: the hub lists no files; check that the data set has this subset and split")
    return [hub_url(address.removeprefix(f"{HUB}/")) if address.startswith(f"{HUB}/") else address for address in urls]


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# ---------------------------------------------------------------------------------------------------------------------
# Single files


def _check_words(path: Path) -> None:
    with open(path, "rb") as file:
        if not re.fullmatch(rb"[a-z\s]+", file.read(10_000)):
            raise ValueError("it is no list of lower-case words")


def _check_conversations(path: Path) -> None:
    with open(path, encoding="utf-8") as file:
        if not isinstance(json.loads(file.readline()), list):  # a JSONDecodeError is a ValueError
            raise ValueError("it is no JSONL file of lists of messages")


class SingleFile(NamedTuple):
    """A file of the base directory, and where it comes from."""

    name: str
    what: str
    url: str
    variable: str  # environment variable that replaces the address
    check: Callable[[Path], None]


WORDS = SingleFile(
    "words_alpha.txt",
    "the word list",
    "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt",
    "NANOCHAT_WORDS_URL",
    _check_words,
)
IDENTITY = SingleFile(
    "identity_conversations.jsonl",
    "the file of identity conversations",
    "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
    "NANOCHAT_IDENTITY_URL",
    _check_conversations,
)


def find_file(file: SingleFile) -> Path:
    """The path of a single file in the base directory, downloaded first where it is missing. Raises UserError."""
    path = get_base_dir() / file.name
    if not path.is_file():
        with file_lock(path):
            if not path.is_file():
                url = os.environ.get(file.variable) or file.url
                try:
                    download_file(url, path, file.check)
                except UserError as error:
                    raise UserError(
                        f"{file.what} cannot be fetched ({error}); or put it at {path} yourself, or run"
                        " `python -m nanochat.pocket` for a small one"
                    ) from None
    return path
