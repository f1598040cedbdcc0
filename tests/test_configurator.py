"""Settings from the command line: every way of writing one, types, files, help, and what wrong ones are answered."""

import sys
from dataclasses import asdict, dataclass

import pytest

from nanochat.configurator import opt, parse, usage


@dataclass
class Config:
    depth: int = opt(20, "transformer blocks", short="d")
    num_iterations: int = opt(-1, "optimizer steps; -1 is not set")
    matrix_lr: float = opt(0.02, "learning rate")
    run: str = opt("dummy", "name of the run")
    resume: str = opt("auto", "take up a run", choices=("auto", "never"))
    compile: bool = opt(False, "compile the model")


@dataclass
class Required:
    """Measure a thing."""

    path: str = opt(help="what to read")
    count: int = opt(3, "how many")
    width: int = opt(8, "how wide", choices=(8, 16, 32))


@dataclass
class RequiredNumber:
    count: int = opt(help="how many")


def failure(argv: list[str], capsys: pytest.CaptureFixture, config_class: type = Config) -> str:
    """The one line on stderr that a wrong command line ends with."""
    with pytest.raises(SystemExit) as exit_info:
        parse(config_class, argv)
    output = capsys.readouterr()
    assert exit_info.value.code == 2
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


# ---------------------------------------------------------------------------------------------------------------------
# What is understood


@pytest.mark.parametrize(
    "argv", [["--depth=4"], ["--depth", "4"], ["-d", "4"], ["-d=4"], ["depth=4"], ["--", "--depth=4"], ["d=4"]]
)
def test_all_forms_of_a_setting_are_one_thing(argv):
    assert parse(Config, argv) == Config(depth=4)


@pytest.mark.parametrize("argv", [["--num-iterations=7"], ["--num_iterations", "7"], ["num-iterations=7"]])
def test_dashes_and_underscores_are_one_thing(argv):
    assert parse(Config, argv) == Config(num_iterations=7)


def test_defaults_stand_without_arguments_and_the_command_line_is_read_by_default(monkeypatch):
    assert parse(Config, []) == Config()
    monkeypatch.setattr(sys, "argv", ["script.py", "--depth=3"])
    assert parse(Config) == Config(depth=3)


def test_a_bare_double_dash_is_skipped_anywhere():
    assert parse(Config, ["--", "--depth=3", "--", "run=a"]) == Config(depth=3, run="a")


def test_the_last_of_several_values_counts():
    assert parse(Config, ["--depth=3", "-d", "4"]).depth == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e9", 2_000_000_000), ("2_000", 2000), ("-1", -1), ("+5", 5), ("3.0", 3), (str(10**18 + 1), 10**18 + 1)],
)
def test_whole_numbers(text, value):
    result = parse(Config, [f"--num_iterations={text}"]).num_iterations
    assert result == value and type(result) is int


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("1e-3", 0.001), ("-.5", -0.5)])
def test_numbers_and_whole_numbers_where_a_number_is_wanted(text, value):
    result = parse(Config, ["--matrix_lr", text]).matrix_lr
    assert result == value and type(result) is float


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--compile"], True),
        (["--compile=1"], True),
        (["--compile=True"], True),
        (["--compile", "yes"], True),
        (["--compile=0"], False),
        (["--compile", "off"], False),
        (["--compile", "--depth=20"], True),
        (["--compile", "depth=20"], True),
        (["--compile", "--"], True),
    ],
)
def test_switches(argv, value):
    assert parse(Config, argv) == Config(compile=value)


@pytest.mark.parametrize("text", ["", "a=b", "with space", "1e3", "--", "true"])
def test_texts_are_taken_as_they_are(text):
    assert parse(Config, [f"--run={text}"]).run == text


def test_a_negative_number_may_follow_its_name():
    assert parse(Config, ["--num_iterations", "-1", "--matrix_lr", "-0.5"]) == Config(num_iterations=-1, matrix_lr=-0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Files of overrides


@pytest.mark.parametrize("before", [[], ["--"]], ids=["first", "after torchrun's --"])
def test_a_toml_file_overrides_the_defaults_and_the_command_line_overrides_it(tmp_path, before):
    path = tmp_path / "small.toml"
    path.write_text(
        'depth = 2\nnum-iterations = 2e3\nrun = "größer"\ncompile = true\nmatrix_lr = 1\n', encoding="utf-8"
    )
    config = parse(Config, [*before, str(path), "--depth=6"])
    assert config == Config(depth=6, num_iterations=2000, run="größer", compile=True, matrix_lr=1.0)
    assert type(config.num_iterations) is int and type(config.matrix_lr) is float


@pytest.mark.parametrize("argv", [["--run=x.toml"], ["run=x.toml"], ["--run", "x.toml"]])
def test_a_setting_whose_value_ends_in_toml_is_no_settings_file(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text("depth = 3\n", encoding="utf-8")
    (tmp_path / "run=x.toml").write_text("depth = 3\n", encoding="utf-8")
    assert parse(Config, argv) == Config(run="x.toml")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"depth = ", "wrong.toml"),
        (b"depth = [4]", "--depth=[4]: a whole number is wanted"),
        (b"[depth]\na = 4", "a whole number is wanted"),
        (b"\xff\xfe", "wrong.toml"),
        (b"dephts = 3", "--depth"),
        (b'depth = "deep"', "--depth=deep"),
    ],
    ids=["not TOML", "a list", "a table", "not UTF-8", "unknown setting", "wrong type"],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, content, part):
    (tmp_path / "wrong.toml").write_bytes(content)
    assert part in failure([str(tmp_path / "wrong.toml")], capsys)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path, capsys):
    assert "no such settings file" in failure([str(tmp_path / "none.toml")], capsys)
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in failure([str(tmp_path / "folder.toml")], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--detph=3", "--depth"),
        ("--num_iteration=3", "--num_iterations"),
        ("matrixlr=3", "--matrix_lr"),
        ("--zzzzzz=3", "--help"),
        ("-x=3", "--help"),
    ],
)
def test_an_unknown_setting_names_the_nearest_one(word, hint, capsys):
    message = failure([word], capsys)
    assert word.split("=")[0].lstrip("-") in message and hint in message


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("--depth=deep", "whole number"),
        ("--depth=2.5", "whole number"),
        ("--depth=inf", "whole number"),
        ("--depth=", "whole number"),
        ("--matrix_lr=fast", "a number"),
        ("--compile=maybe", "0 or 1"),
    ],
)
def test_an_ill_typed_setting_says_what_is_wanted_with_an_example_that_works(word, wanted, capsys):
    message = failure([word], capsys)
    assert word in message and wanted in message
    example = message.strip().rpartition("such as ")[2]
    assert parse(Config, [example]) == Config()


def test_an_ill_typed_required_setting_has_no_example(capsys):
    assert failure(["--count=few"], capsys, RequiredNumber).strip() == "error: --count=few: a whole number is wanted"


@pytest.mark.parametrize(("words", "near"), [(["--resume=nevr"], "never"), (["--resume", "aut"], "auto")])
def test_a_value_that_is_no_choice_names_the_choices_and_the_nearest(words, near, capsys):
    message = failure(words, capsys)
    assert "auto, never" in message and near in message.partition("did you mean")[2]


def test_choices_of_whole_numbers_are_compared_as_such(capsys):
    assert parse(Required, ["path=a", "--width=16"]).width == 16
    assert "8, 16, 32" in failure(["path=a", "--width=17"], capsys, Required)


@pytest.mark.parametrize("argv", [["--depth"], ["--depth", "--run=a"], ["--run", "--"]])
def test_a_missing_value_is_named(argv, capsys):
    assert f"{argv[0]} needs a value" in failure(argv, capsys)


@pytest.mark.parametrize("word", ["20", "depth", "=3", "--=3", "---depth=3", "a b=3"])
def test_a_stray_word_is_refused(word, capsys):
    assert repr(word) in failure([word], capsys)


def test_a_required_setting_is_asked_for(capsys):
    message = failure([], capsys, Required)
    assert "--path is required" in message and "what to read" in message
    assert parse(Required, ["--path=a"]) == Required(path="a", count=3, width=8)


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--depth=3", "--help"]])
def test_help_ends_with_status_0_and_shows_every_setting(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(Config, argv)
    output = capsys.readouterr()
    assert exit_info.value.code == 0 and output.err == ""
    for name, value in asdict(Config()).items():
        line = next(line for line in output.out.splitlines() if f"--{name} " in line)
        assert f"default {value!r}" in line
    assert "-d, --depth" in output.out and "auto, never" in output.out


def test_usage_shows_required_settings_as_such():
    line = next(line for line in usage(Required).splitlines() if "--path" in line)
    assert "required" in line and "what to read" in line and "MISSING" not in line
