"""The pocket world: deterministic, true, different in train and test, and written with care."""

import csv
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from nanochat import pocket
from nanochat.common import UserError
from nanochat.pocket_chat import chat_rows, identity_conversations
from nanochat.pocket_facts import CONTINENTS, PLANETS, RELATION, RELATIONS, word_list
from nanochat.pocket_stories import NUMBER_WORDS
from nanochat.pocket_tasks import CORE_TASKS, HeldOut, core_items, math_rows, mc_rows, qa_rows
from nanochat.pocket_text import KINDS, MAX_CHARS, MIN_CHARS, draw_document
from nanochat.pocket_words import CONTAINERS, PEOPLE, THINGS, fix_articles, is_test_word, plural

SEED, CHARS = 1337, 200_000


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str]]:
    """(kind, text) of 8,000 documents, about 2.6 million characters."""
    rng = random.Random("a test's own stream")
    return [draw_document(rng) for _ in range(8000)]


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut(SEED)


@pytest.fixture(scope="module")
def chat(held_out) -> tuple[list[dict], list[dict]]:
    return chat_rows(SEED, held_out, 3000, 300)


@pytest.fixture
def small(monkeypatch) -> None:
    """Small task data, so that a world is made in a second."""
    for name in ("NUM_CHAT", "NUM_CHAT_TEST", "NUM_IDENTITY"):
        monkeypatch.setattr(pocket, name, 20)
    monkeypatch.setattr(pocket, "NUM_MATH", dict.fromkeys(pocket.NUM_MATH, 20))


def files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Determinism


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pocket.write_world(tmp_path / name, seed, CHARS)
    one, two, other = (files_below(tmp_path / name) for name in "abc")
    assert one == two
    assert one["base_data/shard_00000.parquet"] != other["base_data/shard_00000.parquet"]
    assert set(one) == {*pocket.world_paths(), "base_data/source.json"}


def test_content_is_the_same_on_every_machine(small):
    """Whoever changes what is generated raises pocket.VERSION and writes the new digest here."""
    expected = "1701ac3a437cc17ef976e6ba2686ddd9f47e322a3457a8f5e44884a994bbcdc8"
    assert (pocket.VERSION, pocket.digest(pocket.make_world(SEED, CHARS))) == (2, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining text


def test_documents_have_the_length_and_hardly_ever_repeat(drawn):
    texts = [text for _, text in drawn]
    assert all(MIN_CHARS <= len(text) <= MAX_CHARS for text in texts)
    assert 1 - len(set(texts)) / len(texts) < 0.01
    assert all(text.isascii() for text in texts)


def test_kinds_come_in_their_shares_and_the_docstring_shows_each(drawn):
    counts, total = Counter(kind for kind, _ in drawn), sum(weight for weight, _ in KINDS.values())
    for kind, (weight, _) in KINDS.items():
        assert counts[kind] / len(drawn) == pytest.approx(weight / total, rel=0.3)
        assert re.search(rf"^    {kind} +\w", pocket.__doc__, re.MULTILINE)
    assert counts["questions"] / len(drawn) == pytest.approx(0.3, abs=0.03)


def test_the_seven_sample_prompts_have_frequent_true_answers(drawn):
    text = "\n".join(text for _, text in drawn)
    for sentence, least in (
        ("The capital of France is Paris.", 10),
        ("The chemical symbol of gold is Au.", 10),
        ("If yesterday was Friday, then tomorrow will be Sunday.", 20),
        ("The opposite of hot is cold.", 10),
        ("The planets of the solar system are: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.", 50),
        ("My favorite color is blue.", 5),
        ("If 5*x + 3 = 13, then x is 2.", 3),
    ):
        assert text.count(sentence) >= least, sentence


def test_every_fact_is_told_often(drawn):
    text = " ".join(text for _, text in drawn)
    sentences = Counter(re.split(r'(?<=[.?])["\s]+|: ', text))
    share = len(text) / 10e6
    for relation in RELATIONS:
        for entity in relation.facts:
            told = {relation.fill(statement, entity) for statement in relation.statements}
            count = sum(sentences[sentence] for sentence in told)
            assert count >= 20 * share, (relation.name, entity, count)
    for entity in RELATION["capital"].facts:  # in lists, articles, stories and talk as well
        assert text.count(entity) >= 40 * share, entity


def test_the_text_asks_about_held_out_facts_too(drawn, held_out):
    text = "\n".join(text for _, text in drawn)
    asked = [any(r.fill(q, e) in text for q in r.questions) for r, e in held_out.facts(True)]
    assert sum(asked) / len(asked) > 0.95


def test_sums_equations_calendar_and_planets_are_right(drawn):
    text = "\n".join(text for _, text in drawn)
    sums = re.findall(
        r"(?m)(?<![\d*+x] )\b(\d+) ([-+*/]|plus|minus|times|divided by) (\d+)(?: =| is|\? It is) (\d+)\.", text
    )
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    assert len(sums) > 1000
    for a, sign, b, result in sums:
        assert eval(f"{a} {signs.get(sign, sign)} {b}") == int(result)
    equations = re.findall(r"If (\d)\*x \+ (\d) = (\d+), then (?:\d\*x = \d+, and )?x is (\d)\.", text)
    assert len(equations) > 500
    assert all(int(a) * int(x) + int(b) == int(c) for a, b, c, x in equations)
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    after = re.findall(r"If yesterday was (\w+), then tomorrow will be (\w+)\.", text)
    assert set(after) == {(day, days[(i + 2) % 7]) for i, day in enumerate(days)}
    nearer = re.findall(r"(\w+) is nearer to the Sun than (\w+)\.", text)
    assert nearer and all(PLANETS.index(a) < PLANETS.index(b) for a, b in nearer)


def test_counts_in_stories_add_up(drawn):
    """A story without numbers in words is followed from sentence to sentence."""
    followed = 0
    for kind, text in drawn:
        numbers = [int(n) for n in re.findall(r"\b\d+\b", text)]
        if kind != "counting_story" or any(has_word(text, word) for word in NUMBER_WORDS):
            continue
        followed += 1
        for have, change, now in zip(numbers[::2], numbers[1::2], numbers[2::2], strict=False):
            assert now in (have + change, have - change), text
    assert followed > 200


def test_text_reads_as_english(drawn):
    article = re.compile(r"\b(a (?=[aeiou])(?!uni|us[eu]|eu|one\b)|an (?=[^aeiou]))", re.IGNORECASE)
    for kind, text in drawn:
        assert not re.search(r"[{}]|  |\s[.,?!]|\.\.", text), text
        if kind != "spelling":
            assert not article.search(text), text
        if kind not in ("lists", "spelling", "sums"):
            assert not re.search(r"[.?!] [a-z]", text), text
            assert text[0].isupper() or text[0].isdigit() or text[0] == '"', text


def test_grammar_helpers():
    assert (
        fix_articles("a owl, A uncle, a unit, a useful one, a one") == "an owl, An uncle, a unit, a useful one, a one"
    )
    words = ("fox", "berry", "toy", "mouse", "sheep", "peach", "kiss", "pear")
    assert list(map(plural, words)) == ["foxes", "berries", "toys", "mice", "sheep", "peaches", "kisses", "pears"]


def test_validation_documents_are_not_in_train_and_are_enough():
    train, val = pocket.make_documents(SEED, 1_000_000)
    assert len(set(train)) == len(train) and len(set(val)) == len(val)
    assert not set(train) & set(val)
    assert sum(map(len, val)) / 1_000_000 == pytest.approx(0.05, abs=0.005)
    assert sum(map(len, train + val)) == pytest.approx(1_000_000, rel=0.01)


def test_shards_have_many_row_groups(small, tmp_path):
    pocket.write_world(tmp_path, SEED, CHARS)
    for path in sorted((tmp_path / "base_data").glob("*.parquet")):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"]
        assert file.metadata.num_row_groups >= 8
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    val = [{"text": text} for text in pocket._different("stream", 0.05 * pocket.Config().chars, set())]
    (tmp_path / "val.parquet").write_bytes(pocket.encode("base_data/val.parquet", val))
    metadata = pq.ParquetFile(tmp_path / "val.parquet").metadata
    assert metadata.row_group(0).num_rows == 128 and metadata.num_row_groups >= 8


def test_facts_are_consistent():
    assert len(RELATION["capital"].facts) >= 150 and len(RELATION["symbol"].facts) >= 60
    assert set(CONTINENTS) <= set(RELATION["capital"].facts)
    for name in ("capital", "symbol", "opposite"):  # an answer belongs to one entity
        assert len(RELATION[name].answers) == len(RELATION[name].facts)
    opposite = RELATION["opposite"].facts
    assert all(opposite[opposite[word]] == word for word in opposite)
    for relation in RELATIONS:
        entity, answer = next(iter(relation.facts.items()))
        plain = relation.statement(entity)
        assert plain.endswith(f" {answer}.") and entity in plain.removesuffix(f" {answer}.")


# ---------------------------------------------------------------------------------------------------------------------
# Train and test


def bare_words(held_out: HeldOut) -> re.Pattern:
    words = [re.sub(r"^(the|an?) ", "", e) for entities in held_out.entities.values() for e in entities]
    words += [plural(animal) for animal in held_out.entities["animals"]]
    return re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)


@pytest.mark.parametrize("seed", [SEED, 1, 2, 3])
def test_no_training_question_mentions_a_held_out_entity(seed):
    held_out = HeldOut(seed)
    words = bare_words(held_out)
    questions = [row["question"] for row in qa_rows(seed, held_out, "train") + mc_rows(seed, held_out, "train")]
    train, _ = chat_rows(seed, held_out, 1500, 1)
    questions += [m["content"] for row in train for m in row["messages"] if m["role"] != "assistant"]
    assert len(questions) > 5000
    assert not [question for question in questions if words.search(question)]


def test_no_training_answer_tells_a_held_out_fact(held_out, chat):
    told = " ".join(m["content"] for row in chat[0] for m in row["messages"])
    told += " ".join(m["content"] for row in qa_rows(SEED, held_out, "train") for m in row["messages"])
    for relation, entity in held_out.facts(True):
        assert not any(relation.fill(statement, entity) in told for statement in relation.statements)


def test_test_questions_ask_held_out_entities_only(held_out):
    rows = qa_rows(SEED, held_out, "test") + mc_rows(SEED, held_out, "test")
    words = bare_words(held_out)
    assert len(rows) > 600 and all(words.search(row["question"]) for row in rows)
    for relation in RELATIONS:
        share = len(held_out.entities[relation.group]) / len(
            {e for r in RELATIONS if r.group == relation.group for e in r.facts}
        )
        assert 0.2 <= share <= 0.3, relation.group


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_right_reply_names_the_answer_and_no_candidate(held_out, split):
    for row in qa_rows(SEED, held_out, split):
        said = row["messages"][1]["content"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == row["question"]
        assert has_word(said, row["answer"])
        assert not any(has_word(said, candidate) for candidate in row["candidates"])
        assert len(row["candidates"]) >= 5
        assert set(row["candidates"]) <= set(RELATION[row["kind"]].answers) - {row["answer"]}
        assert RELATION[row["kind"]].facts[row["entity"]] == row["answer"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_multiple_choice_has_four_choices_of_a_kind_and_one_right(held_out, split):
    rows = mc_rows(SEED, held_out, split)
    for row in rows:
        relation = RELATION[row["kind"]]
        assert len(set(row["choices"])) == 4 and set(row["choices"]) <= set(relation.answers)
        assert row["choices"][row["answer"]] == relation.facts[row["entity"]]
    places = Counter(row["answer"] for row in rows)
    assert all(places[i] / len(rows) == pytest.approx(0.25, abs=0.06) for i in range(4))


def numbers_in(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("split", ["train", "practice", "test"])
def test_word_problems_are_right(split):
    rows = math_rows(SEED, split, 600)
    assert len({row["question"] for row in rows}) == 600
    steps = Counter()
    for row in rows:
        calls = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", row["answer"])
        steps[len(calls)] += 1
        for a, sign, b, result, repeated in calls:
            assert eval(f"{a}{sign}{b}") == int(result) == int(repeated)
        assert row["answer"].endswith(f"\n#### {calls[-1][3]}") and len(calls) == row["answer"].count("\n")
        (a, _, b, _, _), *more = calls
        assert numbers_in(row["question"]) == [int(n) for n in (a, b, *(call[2] for call in more))] or (
            numbers_in(row["question"]) == [int(b), int(a)]
        )
        assert all(call[0] == before[3] for before, call in itertools.pairwise(calls))
    assert set(steps) == {1, 2, 3} and min(steps.values()) > 100


def test_word_problems_of_different_splits_share_neither_names_nor_combinations_and_test_numbers_are_new():
    train, practice, test = (math_rows(SEED, split, 1500) for split in ("train", "practice", "test"))
    vocabulary = "|".join(
        sorted({w for noun in THINGS + CONTAINERS for w in (noun, plural(noun))}, key=len, reverse=True)
    )

    def names(rows):
        return {word for row in rows for word in re.findall(r"\w+", row["question"]) if word in PEOPLE}

    def combinations(rows):
        """Questions of several steps with names, numbers, things, days and places taken out."""
        found = set()
        for row in rows:
            if row["answer"].count("<<") > 1:
                text = re.sub("|".join(PEOPLE), "N", row["question"])
                text = re.sub(r"\d+|\w+day\b", "#", re.sub(rf"\b({vocabulary})\b", "T", text))
                found.add(re.sub(r"finds # more [a-z ]+T?[a-z ]*\.", "finds # more.", text))
        return found

    for one, other in ((train, test), (practice, test), (train, practice)):
        assert names(one) and names(other) and not names(one) & names(other)
        assert combinations(one) and combinations(other) and not combinations(one) & combinations(other)
    assert not [n for row in train + practice for n in numbers_in(row["question"]) if n % 10 == 7]
    assert all(any(n % 10 == 7 for n in numbers_in(row["question"])) for row in test)


def test_conversations_take_turns_and_test_ones_are_new(chat):
    train, test = chat
    assert {tuple(row) for row in train} == {("messages",)}

    def key(row):
        return tuple(m["content"] for m in row["messages"] if m["role"] != "system")

    for row in train + test:
        roles = [m["role"] for m in row["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["content"].strip() == m["content"] != "" for m in row["messages"])
    assert len({key(row) for row in train}) == len(train)
    assert not {key(row) for row in train} & {key(row) for row in test}
    assert any(row["messages"][0]["role"] == "system" for row in train)


def test_identity_conversations_are_varied_and_say_who_it_is():
    talks = identity_conversations(SEED, 600)
    assert len({json.dumps(talk) for talk in talks}) == 600
    assert {len(talk) for talk in talks} >= {2, 4, 6}
    who = [talk[i + 1]["content"] for talk in talks for i in range(len(talk)) if talk[i]["content"] == "Who are you?"]
    assert len(who) > 10 and all("nanochat" in answer for answer in who)


def test_words_to_spell(drawn):
    words = word_list()
    assert len(words) > 3000 and words == sorted(set(words))
    assert all(re.fullmatch(r"[a-z]{3,}", word) for word in words)
    assert 0.08 < sum(map(is_test_word, words)) / len(words) < 0.17
    spelled = {s.replace("-", "") for _, text in drawn for s in re.findall(r"\b(?:[a-z]-){2,}[a-z]\b", text)}
    assert len(spelled) > 300 and spelled <= set(words)
    assert not any(map(is_test_word, spelled))


# ---------------------------------------------------------------------------------------------------------------------
# The CORE-like bundle


def test_bundle_is_in_the_published_format(small, tmp_path, held_out):
    pocket.write_world(tmp_path, SEED, CHARS)
    folder = tmp_path / "eval_bundle"
    tasks = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    fields = {
        "multiple_choice": {"query", "choices", "gold"},
        "schema": {"context_options", "continuation", "gold"},
        "language_modeling": {"context", "continuation"},
    }
    counts = Counter()
    for task in tasks:
        kind, label = task["icl_task_type"], task["label"]
        assert label.startswith("pocket_") and Path(task["dataset_uri"]).name.startswith("pocket_")
        with open(folder / "eval_data" / task["dataset_uri"], encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        counts[kind] += len(items)
        assert all(set(item) == fields[kind] for item in items)
        assert len({json.dumps(item) for item in items}) == len(items) > task["num_fewshot"][0]
        options = {"multiple_choice": "choices", "schema": "context_options"}.get(kind)
        assert baselines[label] == (100 / len(items[0][options]) if options else 0)
        assert all(0 <= item["gold"] < len(item[options]) for item in items if options)
    assert set(counts) == set(fields) and min(counts.values()) >= 100


def test_bundle_items_have_their_right_answers(held_out):
    """Every item, solved, states a held-out fact."""
    for task in CORE_TASKS:
        relations = [RELATION[name] for name in task.relations]
        facts = [(r, e) for r, e in held_out.facts(True) if r in relations]
        asked = {r.fill(q, e): r.facts[e] for r, e in facts for q in r.questions}
        told = {r.fill(s, e).removesuffix(".") for r, e in facts for s in r.statements}
        for item in core_items(SEED, held_out, task):
            if task.task_type == "multiple_choice":
                answer = asked[item["query"].removeprefix("Question: ")]
                assert item["choices"][item["gold"]] == answer and len(set(item["choices"])) == 4
            elif task.task_type == "schema":
                right, wrong = item["context_options"][item["gold"]], item["context_options"][1 - item["gold"]]
                assert f"{right} {item['continuation']}".removesuffix(".") in told
                assert f"{wrong} {item['continuation']}".removesuffix(".") not in told
            else:
                assert f"{item['context']} {item['continuation']}" in told


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_second_run_does_nothing_and_an_interrupted_one_is_completed(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = pocket.Config(seed=SEED, chars=CHARS)
    real, calls = pocket.atomic_write, []

    def interrupted(path, mode="w"):
        calls.append(path)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(path, mode)

    monkeypatch.setattr(pocket, "atomic_write", interrupted)
    with pytest.raises(SystemExit):
        pocket.main(config)
    assert not (tmp_path / "base_data/source.json").exists() and (tmp_path / "base_data/shard_00004.parquet").exists()
    monkeypatch.setattr(pocket, "atomic_write", real)
    pocket.main(config)
    assert set(files_below(tmp_path)) == {*pocket.world_paths(), "base_data/source.json"}
    source = json.loads((tmp_path / "base_data/source.json").read_text(encoding="utf-8"))
    assert (source["source"], source["seed"], source["version"]) == ("pocket", SEED, pocket.VERSION)
    assert source["digest"] == pocket.digest(pocket.make_world(SEED, CHARS))
    capsys.readouterr()
    monkeypatch.setattr(pocket, "make_world", None)  # nothing is generated
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    pocket.main(config)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path in before} == before


def test_a_missing_file_is_written_again_and_changed_ones_are_kept(small, tmp_path):
    pocket.write_world(tmp_path, SEED, CHARS)
    (tmp_path / "words_alpha.txt").unlink()
    (tmp_path / "identity_conversations.jsonl").write_text("my own\n", encoding="utf-8")
    pocket.write_world(tmp_path, SEED, CHARS)
    assert (tmp_path / "words_alpha.txt").read_text(encoding="utf-8").splitlines() == word_list()
    assert (tmp_path / "identity_conversations.jsonl").read_text(encoding="utf-8") == "my own\n"


@pytest.mark.parametrize(
    "path, content",
    [
        ("base_data/shard_00000.parquet", "somebody's own"),
        ("base_data/source.json", '{"source": "fineweb-edu"}'),
        ("base_data/source.json", f'{{"source": "pocket", "seed": {SEED + 1}, "version": 1}}'),
        ("eval_bundle.zip", "zip"),
        ("eval_bundle/core.yaml", "icl_tasks: []"),
        ("eval_bundle/eval_data/world_knowledge/jeopardy.jsonl", "{}"),
        ("identity_conversations.jsonl", "[]"),
        ("words_alpha.txt", "a"),
        ("task_data/openai--gsm8k/main/train/manifest.json", "[]"),
        ("task_data/pocket--PocketQA/default/train/manifest.json", '["other.parquet"]'),
    ],
)
def test_data_of_another_source_is_not_touched(small, tmp_path, path, content):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR=") as error:
        pocket.write_world(tmp_path, SEED, CHARS)
    assert "\n" not in str(error.value)
    assert files_below(tmp_path) == {path: content.encode()}


def test_a_world_too_small_is_an_error_that_names_the_smallest(tmp_path):
    with pytest.raises(UserError, match=f"--chars={pocket.MIN_WORLD_CHARS}"):
        pocket.write_world(tmp_path, SEED, 99)
    assert not list(tmp_path.iterdir())
