"""Every command that the documentation and the recipes name exists, and takes the settings that it is given there."""

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nanochat import configurator, report

ROOT = Path(__file__).parent.parent
SHELL_SCRIPTS = [ROOT / "speedrun.sh", ROOT / ".ci" / "run", *sorted((ROOT / "runs").glob("*.sh"))]
PACKAGES = ("nanochat", "scripts", "tasks", "dev")
OTHER_PROGRAMS = ("pytest", "pip", "venv", "build")  # modules that are not ours
COMMAND = re.compile(r"(?:python3?|torchrun|on_all_gpus)\s+(?:-\S+\s+)*?-m\s+([\w.]+)([^`|;&#)>]*)")
PLACEHOLDER = re.compile(r"\$|\.\.\.|<|\[|\b[A-Z]{2,}\b")  # $DEPTH, ..., <tag>, [ARGUMENT], NAME


def documented_texts() -> list[tuple[str, str]]:
    """(where, text) of whatever shows commands: Markdown files, shell scripts, docstrings and the texts of errors."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("dev/*.md"), *ROOT.glob("rustbpe/*.md"), *SHELL_SCRIPTS]
    texts = [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in files]
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            texts.append((str(path.relative_to(ROOT)), "\n".join(strings)))
    return texts


def find_commands() -> list[tuple[str, str, str]]:
    """(where, module, arguments) of each `python -m module arguments`, lines that end in a backslash joined."""
    commands = set()
    for where, text in documented_texts():
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s{3,}[^-\s].*$", "", line.strip())  # what stands in a column of its own explains
            for match in COMMAND.finditer(line):
                commands.add((where, match[1], match[2].strip()))
    return sorted(commands)


def settings_in(arguments: str) -> list[str]:
    """The words of a command's arguments up to where prose goes on."""
    words = []
    for word in shlex.split(arguments.replace("'", ""), comments=True):
        is_value = bool(words) and words[-1].startswith("-") and "=" not in words[-1] and words[-1] != "--"
        if not (word.startswith("-") or is_value or "=" in word):
            break
        words.append(word.rstrip(".,:"))
    return words


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_commands_that_matter_are_found():
    """The patterns above see what is written: a search that finds nothing would pass every other test."""
    found = {(where, module) for where, module, _ in find_commands()}
    assert ("speedrun.sh", "scripts.base_train") in found
    assert ("runs/pocket.sh", "scripts.base_eval") in found
    assert ("nanochat/report.py", "nanochat.report") in found
    assert ("scripts/base_train.py", "scripts.base_train") in found


@pytest.mark.parametrize(("where", "module", "arguments"), find_commands())
def test_documented_commands_exist_with_their_settings(where, module, arguments):
    if module.split(".")[0] not in PACKAGES:
        assert module in OTHER_PROGRAMS, f"{where}: what is `python -m {module}`?"
        return
    if not (ROOT / (module.replace(".", "/") + ".py")).exists():
        assert module in LATER, f"{where}: there is no `python -m {module}`"
        return
    if module == "nanochat.report":
        assert arguments.split()[0] in report.COMMANDS, f"{where}: python -m {module} {arguments}"
        return
    config_class = importlib.import_module(module).Config
    for word in settings_in(arguments):
        if word == "--" or PLACEHOLDER.search(word.split("=")[0]):
            continue
        if PLACEHOLDER.search(word):
            word = word.split("=")[0] + "=1"  # the name is what can be checked
        if "=" in word or word.startswith("--"):
            configurator._find(
                {f: f for f in config_class.__dataclass_fields__},
                word.lstrip("-").split("=")[0],
            )
