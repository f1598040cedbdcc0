"""runs/stage.sh: which stages are skipped, which run, and how training stages are told to treat what is there."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGE_SH = Path(__file__).parent.parent / "runs" / "stage.sh"
# A recipe of one tokenizer and one training stage. The commands note that they ran, and with what.
RECIPE = """
set -euo pipefail
source {stage_sh}
train() {{
    echo "train $*" >>"$LOG"
    mkdir -p "$NANOCHAT_BASE_DIR/ckpt"
    [ "${{KILL:-}}" != early ] || return 137
    echo "$RANDOM $RANDOM" >"$NANOCHAT_BASE_DIR/ckpt/meta_000100.json"
    [ "${{KILL:-}}" != late ] || return 137
}}
tokenize() {{
    echo "tokenize $*" >>"$LOG"
    echo "${{TOKENS:-1}}" >"$NANOCHAT_BASE_DIR/tok.json"
}}
stage tok "" "tok.json" tokenize --vocab_size=${{VOCAB:-300}}
stage train "tok.json" "ckpt/meta_*.json" train --depth=${{DEPTH:-4}} --run=${{RUN:-dummy}} ${{LANES:-}} --resume=auto
stage eval "ckpt/meta_*.json ${{FETCHED:-}}" "fetched" \\
    sh -c 'echo eval >>"$LOG"; echo x >"$NANOCHAT_BASE_DIR/fetched"' - --data="$DATA"
"""


class Recipe:
    """Runs the recipe in a base directory of its own, again and again."""

    def __init__(self, folder: Path):
        self.base, self.log = folder / "base", folder / "log"
        self.script = folder / "recipe.sh"
        self.script.write_text(RECIPE.format(stage_sh=STAGE_SH), encoding="utf-8")

    def __call__(self, code: int = 0, **settings: str) -> list[str]:
        """What ran, in order; code is the exit status that is expected."""
        self.log.write_text("", encoding="utf-8")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "HOME": "/", "NANOCHAT_BASE_DIR": str(self.base), "LOG": str(self.log), **settings}
        done = subprocess.run(["bash", self.script], env=env, capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == code, done.stderr
        self.out, self.err = done.stdout, done.stderr
        return self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


TOK, TRAIN = "tokenize --vocab_size=300", "train --depth=4 --run=dummy --resume="


def test_finished_stages_are_skipped(recipe):
    assert recipe() == [TOK, TRAIN + "auto", "eval"]
    assert recipe() == []
    assert len(re.findall(r"^== \w+: skipped, done on \d{4}-\d\d-\d\d", recipe.out, re.MULTILINE)) == 3


def test_a_changed_setting_runs_the_stage_anew_and_what_reads_its_result(recipe):
    recipe()
    assert recipe(DEPTH="6") == ["train --depth=6 --run=dummy --resume=never", "eval"]
    assert recipe(DEPTH="6") == []


@pytest.mark.parametrize("name", ["mine.jsonl", "all of mine [1] *.jsonl"])
def test_conversations_of_ones_own_are_read_from_where_the_recipe_is_started(recipe, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert recipe(2, DATA=name) == [] and recipe.err.count("\n") == 1 and f"{tmp_path}/{name}" in recipe.err
    (tmp_path / name).write_text("one\n", encoding="utf-8")
    assert len(recipe(DATA=name)) == 3 and recipe(DATA=name) == []
    (tmp_path / name).write_text("two\n", encoding="utf-8")
    assert recipe(DATA=name) == ["eval"]
    assert recipe(DATA=name) == []


def test_text_of_ones_own_is_known_by_its_files(recipe):
    recipe.base.mkdir()
    (recipe.base / "text.parquet").write_text("some", encoding="utf-8")
    assert len(recipe(FETCHED="source.json")) == 3 and recipe(FETCHED="source.json") == []
    (recipe.base / "text.parquet").write_text("other text", encoding="utf-8")
    assert recipe(FETCHED="source.json") == ["eval"]


def test_more_hosts_do_not_make_a_finished_stage_another_one(recipe):
    recipe()
    assert recipe(LANES="--data_lanes=16") == []


def test_the_name_of_the_wandb_run_is_no_such_setting(recipe):
    recipe()
    assert recipe(RUN="mine") == []


def test_changed_inputs_run_the_stage_anew_and_equal_ones_do_not(recipe):
    recipe()
    assert recipe(VOCAB="400") == ["tokenize --vocab_size=400"]  # another setting, but the same tokenizer came of it
    assert recipe(VOCAB="500", TOKENS="2") == ["tokenize --vocab_size=500", TRAIN + "never", "eval"]


def test_a_stage_whose_results_are_gone_runs_again(recipe):
    recipe()
    (recipe.base / "tok.json").unlink()
    assert recipe() == [TOK]


def test_an_interrupted_stage_is_taken_up_again(recipe):
    assert recipe(code=137, KILL="late") == [TOK, TRAIN + "auto"]
    assert "run the same command again" in recipe.err
    assert recipe(code=137, KILL="late") == [TRAIN + "auto"]
    assert recipe() == [TRAIN + "auto", "eval"]


def test_an_interrupted_stage_starts_anew_with_other_settings(recipe):
    recipe(code=137, KILL="late")
    assert recipe(DEPTH="6") == ["train --depth=6 --run=dummy --resume=never", "eval"]


def test_a_stage_that_started_anew_and_saved_nothing_starts_anew_again(recipe):
    recipe()
    time.sleep(1.1)  # some shells compare times of files by the second
    assert recipe(code=137, DEPTH="6", KILL="early") == ["train --depth=6 --run=dummy --resume=never"]
    assert recipe(code=137, DEPTH="6", KILL="early") == ["train --depth=6 --run=dummy --resume=never"]
    time.sleep(1.1)
    assert recipe(code=137, DEPTH="6", KILL="late") == ["train --depth=6 --run=dummy --resume=never"]
    assert recipe(DEPTH="6") == ["train --depth=6 --run=dummy --resume=auto", "eval"]


def test_fresh_runs_everything_anew_also_after_an_interruption(recipe):
    recipe()
    time.sleep(1.1)
    assert recipe(FRESH="1", code=137, KILL="early") == [TOK, TRAIN + "never"]
    assert recipe() == [TRAIN + "never", "eval"]
    assert recipe() == []


def test_what_a_recipe_never_ran_is_left_to_the_trainer(recipe):
    (recipe.base / "ckpt").mkdir(parents=True)
    (recipe.base / "ckpt" / "meta_000050.json").write_text("{}", encoding="utf-8")
    assert recipe() == [TOK, TRAIN + "auto", "eval"]


def test_an_input_that_the_stage_fetches_itself_does_not_run_it_twice(recipe):
    assert recipe(FETCHED="fetched")[-1] == "eval"
    assert recipe(FETCHED="fetched") == []


def test_of_several_checkpoints_the_last_one_counts(recipe):
    recipe()
    (recipe.base / "ckpt" / "meta_000050.json").write_text("{}", encoding="utf-8")
    assert recipe() == []
    (recipe.base / "ckpt" / "meta_000200.json").write_text("{}", encoding="utf-8")
    assert recipe() == ["eval"]


def test_a_relative_base_directory_is_meant_from_where_the_recipe_was_called(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe(NANOCHAT_BASE_DIR="other")
    assert (tmp_path / "other" / "stages" / "train.done").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_stages_run_in_one_process_a_gpu(tmp_path, processes):
    for name in ("python", "torchrun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {name} ${{OMP_NUM_THREADS:-all}} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    script = f"source {STAGE_SH}; on_all_gpus -m scripts.base_train -- --depth=4"
    env = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "HOME": "/",
        "NUM_PROCESSES": processes,
    }
    out = subprocess.run(["bash", "-c", script], env=env, capture_output=True, encoding="utf-8", check=True).stdout
    wanted = {
        "1": "python all -m scripts.base_train -- --depth=4\n",
        "2": "torchrun 1 --standalone --nproc_per_node=2 -m scripts.base_train -- --depth=4\n",
    }
    assert out == wanted[processes]
