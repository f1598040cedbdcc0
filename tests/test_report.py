"""The report: sections and their JSON twins, the joined report.md, its summary, and the header."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat import report as report_module
from nanochat.common import UserError
from nanochat.report import DummyReport, Report, format_value, get_report, hourly_cost, main, measure_code, summary_rows


@dataclass
class Config:
    depth: int = 4
    run: str = "dummy"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An empty base directory, and a current directory of its own beside it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def read_section(base: Path, name: str) -> dict:
    return json.loads((base / "report" / f"{name}.json").read_text(encoding="utf-8"))


def generate(base: Path) -> str:
    """The text of report.md."""
    return get_report().generate().read_text(encoding="utf-8")


def test_section_has_a_readable_title_and_a_json_twin_with_the_raw_values(base):
    path = get_report().log("base_train", [Config(), {"num_params": 1234567, "mfu": None}, "A *paragraph*."])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Base model: training\n")
    assert "| `depth` | 4 |" in text and "| Num params | 1,234,567 |" in text and "A *paragraph*." in text
    assert [item["kind"] for item in read_section(base, "base_train")["data"]] == ["settings", "values", "text"]
    assert read_section(base, "base_train")["data"][1]["values"] == {"num_params": 1234567, "mfu": None}


def test_json_twin_is_strict_json_whatever_the_numbers(base):
    get_report().log("base_loss", [{"val_bpb": float("inf"), "train_bpb": float("nan")}])

    def refuse(constant):
        raise AssertionError(constant)

    text = (base / "report" / "base_loss.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["data"][0]["values"] == {"val_bpb": "inf", "train_bpb": "nan"}
    assert "Bits per byte" not in generate(base).split("## Summary")[1]


def test_logging_again_replaces_the_section_and_leaves_no_temporary_files(base):
    for loss in (3.0, 2.0):
        get_report().log("base_train", [{"loss": loss}])
    assert sorted(p.name for p in (base / "report").iterdir()) == ["base_train.json", "base_train.md"]
    assert "| Loss | 2 |" in (base / "report" / "base_train.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["../x", "Base Train", "header", "report"])
def test_names_that_are_no_section_are_refused(base, name):
    with pytest.raises(ValueError, match="cannot name a section"):
        get_report().log(name, [])


def test_ranks_other_than_0_write_nothing(base, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    report = get_report()
    assert isinstance(report, DummyReport)
    report.log("base_train", [{"loss": 1.0}])
    report.reset()
    assert report.generate() is None
    assert not base.exists()


def test_tables_samples_and_special_characters_survive_markdown(base):
    rows = [["Text", "Bytes"], ["a|b", 12345], ["Korean", None]]
    get_report().log("base_loss", [rows, {"samples": ["Paris.\nThe | <b>", "# hash *star*"]}, ["alone"]])
    text = (base / "report" / "base_loss.md").read_text(encoding="utf-8")
    assert "| Text | Bytes |\n| --- | ---: |\n| a\\|b | 12,345 |\n| Korean | – |" in text
    assert "**Samples**\n\n> Paris. ↵ The \\| \\<b\\>\n>\n> \\# hash \\*star\\*" in text
    assert "\n> alone\n" in text


def test_sections_come_in_the_order_of_the_pipeline_and_missing_ones_are_listed(base):
    for name in ("my_own", "base_eval", "tok_train", "base_train"):
        get_report().log(name, [{"x": 1}])
    text = generate(base)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Tokenizer: training",
        "## Base model: training",
        "## Base model: CORE",
        "## My own",
        "## Summary",
    ]
    missing = text.split("Stages without a section:")[1]
    assert "`python -m scripts.base_loss`" in missing and "scripts.base_eval" not in missing


def test_report_is_copied_to_the_current_directory(base):
    get_report().log("base_eval", [{"core_metric": 0.5}])
    text = generate(base)
    assert (base / "report" / "report.md").exists()
    assert Path("report.md").read_text(encoding="utf-8") == text


def test_summary_has_a_column_a_stage_and_only_rows_with_a_value(base):
    get_report().log("base_train", [{"Final val bits per byte": 0.9}])
    get_report().log("base_loss", [{"Val bits per byte": 0.8}])
    get_report().log("base_eval", [{"core_metric": 0.51234}])
    get_report().log("chat_eval_sft", [{"ARC-Easy": 0.25, "ChatCORE": 0.125}])
    table = generate(base).split("## Summary")[1]
    assert "| Metric | BASE | MID | SFT | RL |" in table
    assert "| Bits per byte (text) | 0.8000 |  |  |  |" in table
    assert "| CORE | 0.5123 |  |  |  |" in table
    assert "| ARC-Easy |  |  | 0.2500 |  |" in table
    assert "| ChatCORE |  |  | 0.1250 |  |" in table
    assert "MMLU" not in table


def test_summary_rows_take_the_first_section_that_has_the_value():
    values = {"base_train": {"final_val_bits_per_byte": 0.9}, "mid_train": {"val_bpb": 0.7}}
    assert summary_rows(values) == [
        ["Bits per byte (text)", "0.9000", None, None, None],
        ["Bits per byte (conversations)", None, "0.7000", None, None],
    ]


@pytest.mark.parametrize("source", ["pocket", "fineweb-edu"])
def test_scores_on_generated_data_are_said_not_to_be_comparable(base, source):
    get_report().log("base_eval", [{"core_metric": 0.5}])
    (base / "base_data").mkdir()
    (base / "base_data" / "source.json").write_text(json.dumps({"source": source}), encoding="utf-8")
    assert ("not comparable with published benchmarks" in generate(base)) == (source == "pocket")


def test_total_time_and_cost_count_from_the_header_to_the_last_section(base, monkeypatch):
    monkeypatch.setattr(report_module, "_gpu_names", lambda: ["NVIDIA H100 80GB HBM3"] * 8)
    monkeypatch.setattr(report_module, "_describe_machine", lambda gpus: {"GPU": gpus[0]})
    get_report().reset()
    start = json.loads((base / "report" / "header.json").read_text(encoding="utf-8"))["timestamp"]
    clock = iter([start + 60, start + 4 * 3600])
    monkeypatch.setattr(report_module.time, "time", lambda: next(clock))
    get_report().log("base_eval", [{"core_metric": 0.2}])
    get_report().log("base_train", [{"loss": 1.0}])
    text = generate(base)
    assert "about $24.00 an hour" in text
    assert text.rstrip().endswith("Total wall-clock time: **4h00m**, about **$96.00**.")
    assert "4h00m after the start" in text and "1m00s after the start" in text


def test_cost_is_known_only_where_every_price_is(monkeypatch):
    monkeypatch.delenv("NANOCHAT_GPU_PRICE", raising=False)
    assert hourly_cost([]) is None
    assert hourly_cost(["NVIDIA A100-SXM4-80GB"] * 2) == pytest.approx(3.6)
    assert hourly_cost(["NVIDIA A100-SXM4-80GB", "Some GPU"]) is None
    monkeypatch.setenv("NANOCHAT_GPU_PRICE", "2.5")
    assert hourly_cost(["Some GPU"] * 4) == 10.0
    assert hourly_cost([]) is None
    monkeypatch.setenv("NANOCHAT_GPU_PRICE", "cheap")
    with pytest.raises(UserError, match="NANOCHAT_GPU_PRICE=cheap"):
        hourly_cost(["Some GPU"])


def test_reset_removes_sections_and_describes_the_machine(base):
    get_report().log("base_eval", [{"core_metric": 0.5}])
    main(["reset"])
    assert sorted(p.name for p in (base / "report").iterdir()) == ["header.json", "header.md"]
    header = (base / "report" / "header.md").read_text(encoding="utf-8")
    for word in ("Started", "Processor", "Memory", "Python 3.", "torch ", "dependencies"):
        assert word in header


def test_logging_and_generating_keep_the_header(base):
    get_report().reset()
    header = (base / "report" / "header.json").read_bytes()
    get_report().log("base_eval", [{"core_metric": 0.5}])
    generate(base)
    assert (base / "report" / "header.json").read_bytes() == header


def test_nothing_to_report_is_said_and_not_fatal(base, capsys):
    main(["generate"])
    assert "nothing to report yet" in capsys.readouterr().out
    assert not Path("report.md").exists()


def test_a_damaged_section_is_said_and_passed_over(base, capsys):
    get_report().log("tok_train", [{"x": 1}])
    path = get_report().log("base_eval", [{"core_metric": 0.5}])
    path.with_suffix(".json").write_text('{"section": "base_', encoding="utf-8")
    text = generate(base)
    assert "base_eval.json is passed over" in capsys.readouterr().out
    assert "## Base model: CORE" not in text and "## Tokenizer: training" in text


@pytest.mark.parametrize("argv", [[], ["generat"], ["reset", "now"]])
def test_a_wrong_command_ends_with_2_and_shows_the_right_ones(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "python -m nanochat.report generate" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["checkpoint_dir", "metrics_path"])
def test_curves_of_the_run_that_a_section_names_lie_beside_the_report(base, key):
    folder = base / "base_checkpoints" / "d4"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n', encoding="utf-8")
    path = folder if key == "checkpoint_dir" else folder / "metrics.jsonl"
    get_report().log("base_train", [{key: path}])
    assert read_section(base, "base_train")["data"][0]["values"][key] == str(path.relative_to(base))
    assert "](report_base_train.svg)" in generate(base)
    for where in (base / "report", Path()):
        assert "<svg" in (where / "report_base_train.svg").read_text(encoding="utf-8")


def test_a_run_whose_metrics_are_gone_is_reported_without_curves(base):
    get_report().log("base_train", [{"checkpoint_dir": base / "base_checkpoints" / "d4", "loss": 2.0}])
    assert "![" not in generate(base)


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (11220.0, "training_seconds", "3h07m"),
        (3 * 2**30, "peak_memory_bytes", "3.0 GiB"),
        (0.4812, "mfu", "48.1%"),
        (560988160, "num_params", "560,988,160"),
        (0.81234567, "", "0.8123"),
        (20.0, "", "20"),
        (4.2e19, "total_flops", "4.200e+19"),
        (0.00002, "", "2.000e-05"),
        (0.0, "", "0"),
        (True, "", "yes"),
        (None, "", "–"),
    ],
)
def test_values_are_shown_as_their_names_say(value, name, text):
    assert format_value(value, name) == text


def test_the_size_of_the_code_counts_files_lines_and_dependencies(tmp_path):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "a.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch", "numpy"]\n', encoding="utf-8")
    assert measure_code(tmp_path) == {"files": 1, "lines": 2, "tokens (about)": 3, "dependencies": 2}


def test_a_report_can_stand_in_any_folder(tmp_path):
    Report(tmp_path / "x" / "report").log("base_eval", [{"core_metric": 0.5}])
    assert (tmp_path / "x" / "report" / "base_eval.md").exists()
