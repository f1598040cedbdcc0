"""Curves: what is read from metrics.jsonl, and what is drawn."""

import json
import re

from nanochat.curves import MAX_POINTS, draw_curves, read_metrics


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_later_line_of_a_step_wins_after_a_resume(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "loss": 5.0},
            {"step": 2, "loss": 4.0, "lr_multiplier": 1.0},
            {"step": 3, "loss": 3.0},
            {"step": 2, "loss": 4.5},
            {"step": 2, "val_bpb": 0.9},
            {"step": 3, "loss": 3.5},
        ],
    )
    assert read_metrics(path) == {
        "loss": [(1, 5.0), (2, 4.5), (3, 3.5)],
        "lr_multiplier": [(2, 1.0)],
        "val_bpb": [(2, 0.9)],
    }


def test_lines_cut_short_and_values_that_are_no_finite_numbers_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 5.0, "val_bpb": null}\n{"step": 2, "loss": NaN}\n[1]\n{"step": 3, "lo', "utf-8"
    )
    assert read_metrics(path) == {"loss": [(1, 5.0)]}


def test_there_is_a_chart_for_each_metric_that_was_measured(tmp_path):
    lines = [{"step": i, "loss": 9 / i, "tokens_per_second": 9000, "unknown": 1} for i in range(1, 50)]
    path = draw_curves(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curves.svg", title="Base model")
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().startswith("<?xml") and text.rstrip().endswith("</svg>")
    titles = re.findall(r"<!-- (.*?) -->", text)
    assert {"Base model", "Training loss (nats per token)", "Tokens per second"} <= set(titles)
    assert "Validation bits per byte" not in titles


def test_reinforcement_learning_has_charts_of_its_own(tmp_path):
    """What chat_rl logs: rewards and lengths at every step, pass@1 to pass@8 now and then, of which one is drawn."""
    lines = [{"step": i, "reward": i / 50, "sample_tokens": 40.0, "rollout_seconds": 1.0} for i in range(1, 50)]
    lines += [{"step": i, "pass@1": 0.2, "pass@8": 0.5} for i in (10, 20)]
    path = draw_curves(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curves.svg")
    titles = set(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))
    assert {"Reward (share of samples that are right)", "pass@1 on test problems", "Tokens per sample"} <= titles
    assert not [title for title in titles if "pass@8" in title or "rollout" in title]


def test_the_same_metrics_give_the_same_file(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    first, second = (draw_curves(path, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_long_runs_stay_small(tmp_path):
    lines = [{"step": i, "loss": 3 + (i % 7) / 10} for i in range(1, 50_001)]
    path = draw_curves(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curves.svg")
    assert path.stat().st_size < 100 * MAX_POINTS


def test_without_known_metrics_nothing_is_drawn(tmp_path):
    assert draw_curves(tmp_path / "missing.jsonl", tmp_path / "curves.svg") is None
    assert draw_curves(write(tmp_path / "metrics.jsonl", [{"step": 1, "x": 2}]), tmp_path / "curves.svg") is None
    assert not (tmp_path / "curves.svg").exists()
