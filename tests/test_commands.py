"""Every command that the documentation and the recipes name exists, and takes the settings that it is given there."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from nanochat import configurator, report

ROOT = Path(__file__).parent.parent
SHELL_SCRIPTS = [ROOT / "speedrun.sh", ROOT / ".ci" / "run", *sorted((ROOT / "runs").glob("*.s[hb]*"))]
PACKAGES = ("nanochat", "scripts", "tasks", "dev")
OTHER_PROGRAMS = ("pytest", "pip", "venv")  # modules that are not ours
LAUNCHERS = r"(?:python3?|torchrun|on_all_gpus|multinode\.sh|slurm\.sbatch)"
COMMAND = re.compile(LAUNCHERS + r"\s+(?:-\S+\s+)*?-m\s+(\w+(?:\.\w+)*)(?![\w.<])([^`|;&#)>]*)")
PLACEHOLDER = re.compile(r"\$|\.\.\.|<|\[|\b[A-Z]{2,}\b")  # $DEPTH, ..., <tag>, [ARGUMENT], NAME


def documented_texts() -> list[tuple[str, str]]:
    """(where, text) of whatever shows commands: Markdown files, shell scripts, docstrings and the texts of errors."""
    files = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("dev/*.md"),
        *ROOT.glob("rustbpe/*.md"),
        *SHELL_SCRIPTS,
    ]
    texts = [(str(path.relative_to(ROOT)), with_variables(path.read_text(encoding="utf-8"))) for path in files]
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            texts.append((str(path.relative_to(ROOT)), "\n".join(strings)))
    return texts


def with_variables(text: str) -> str:
    """A shell script with the values of its plain variables in their places."""
    for name, value in re.findall(r'^([A-Z_]+)="?([^"$\n]*)"?$', text, re.MULTILINE):
        text = re.sub(rf'"?\${name}\b"?', value, text)
    return text


def find_commands() -> list[tuple[str, str, str]]:
    """(where, module, arguments) of each `python -m module arguments`, lines that end in a backslash joined."""
    commands = set()
    for where, text in documented_texts():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            line = re.sub(r"\s{3,}[^-\s].*$", "", line.strip(" #"))  # what stands in a column of its own explains
            for match in COMMAND.finditer(line):
                commands.add((where, match[1], match[2].strip()))
    return sorted(commands)


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def settings_in(arguments: str) -> list[str]:
    """The words of a command's arguments up to where prose goes on."""
    words: list[str] = []
    for word in re.sub(r"[\"']", "", arguments).split():
        takes_value = bool(words) and re.fullmatch(r"--?\w+", words[-1]) is not None
        if not (word.startswith(("-", "$")) or takes_value):
            break
        words.append(word.rstrip(".,:;"))
    return words


def filled_in(words: list[str]) -> list[str]:
    """The words of a command with a number for each placeholder."""
    return [re.sub(r"^([^=]*=)?.*$", r"\g<1>1", word) if PLACEHOLDER.search(word) else word for word in words]


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_commands_that_matter_are_found():
    """The patterns above see what is written: a search that finds nothing would pass every other test."""
    found = {(where, module) for where, module, _ in find_commands()}
    assert ("speedrun.sh", "scripts.base_train") in found
    assert ("runs/pocket.sh", "scripts.base_eval") in found
    assert ("runs/multinode.sh", "scripts.base_train") in found
    assert ("nanochat/report.py", "nanochat.report") in found
    assert ("scripts/base_train.py", "scripts.base_train") in found


@pytest.mark.parametrize(("where", "module", "arguments"), find_commands())
def test_documented_commands_exist_with_their_settings(where, module, arguments):
    if module.split(".")[0] not in PACKAGES:
        assert module in OTHER_PROGRAMS, f"{where}: what is `python -m {module}`?"
        return
    assert path_of(module).exists(), f"{where}: there is no `python -m {module}`"
    if module == "nanochat.report":
        assert arguments.split()[0].split("|")[0] in report.COMMANDS, f"{where}: python -m {module} {arguments}"
        return
    config_class = getattr(importlib.import_module(module), "Config", None)
    if config_class is not None:
        configurator.parse(config_class, filled_in(settings_in(arguments)))
