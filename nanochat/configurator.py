"""Settings of a script: one flat dataclass, and the command line that fills it.

    @dataclass
    class Config:
        depth: int = opt(20, "transformer blocks; width is 64 * depth", short="d")

    main(parse(Config))

`--depth=20`, `--depth 20`, `-d 20` and `depth=20` are one thing, and so are `-` and `_` inside a name. A bare `--`
(torchrun's separator) is skipped. A first argument that ends in `.toml` is a file of overrides; the command line wins
over it. Types come from the annotations: int (2e9 is an int), float, str, bool (`--flag`, `--flag=0`).

A wrong setting ends the program with status 2 and names the nearest valid one. This replaces argparse because of the
`name=value` form, the .toml file and the suggestions; it does not do subcommands, lists or nested settings.
"""

import difflib
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any, NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")
TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")


def opt(default: Any = MISSING, help: str = "", short: str = "", choices: Sequence[Any] = ()) -> Any:
    """A dataclass field with a help text, an optional one-letter flag and an optional list of legal values.

    Without a default the setting is required.
    """
    return field(default=default, metadata={"help": help, "short": short, "choices": tuple(choices)})


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Return config_class(...) filled from argv (default: the command line).

    Exits with status 2 and one line on stderr when a setting is unknown or ill-typed, with status 0 after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = {f.name: f for f in fields(config_class)}
    values: dict[str, Any] = {}
    while argv and argv[0] == "--":
        argv.pop(0)
    if argv and argv[0].endswith(".toml") and not argv[0].startswith("-") and "=" not in argv[0]:
        for name, value in _read_toml(argv.pop(0)).items():
            option = _find(options, name)
            values[option.name] = _convert(option, value)
    while argv:
        word = argv.pop(0)
        if word == "--":
            continue
        if word in ("--help", "-h") and not any(f.metadata.get("short") == "h" for f in options.values()):
            print(usage(config_class))
            raise SystemExit(0)
        name, text = _split(word)
        option = _find(options, name, short=not word.startswith("--"))
        if text is None:
            text = _take_value(option, argv)
        values[option.name] = _convert(option, text)
    for option in options.values():
        if option.name not in values and option.default is MISSING:
            _fail(f"--{option.name} is required: {option.metadata.get('help', '')}")
    return config_class(**values)


def usage(config_class: type) -> str:
    """Return the help text: the docstring of the script, then one line a setting."""
    module = sys.modules.get(config_class.__module__)
    doc = (getattr(module, "__doc__", None) or config_class.__doc__ or "").strip()
    lines = [doc, "", "settings (--name=value):"]
    names = {
        f.name: (f"-{f.metadata['short']}, " if f.metadata.get("short") else "") + f"--{f.name}"
        for f in fields(config_class)
    }
    width = max((len(name) for name in names.values()), default=0)
    for f in fields(config_class):
        default = "required" if f.default is MISSING else f"default {f.default!r}"
        choices = f.metadata.get("choices")
        note = f" (one of {', '.join(map(str, choices))};" if choices else " ("
        lines.append(f"  {names[f.name]:<{width}}  {f.metadata.get('help', '')}{note} {default})".replace("( ", "("))
    return "\n".join(lines)


def _split(word: str) -> tuple[str, str | None]:
    """'--depth=20' -> ('depth', '20'); '--depth' -> ('depth', None); 'depth=20' -> ('depth', '20')."""
    match = re.fullmatch(r"(--?)?([A-Za-z][\w-]*)(?:=(.*))?", word, flags=re.DOTALL)
    if match is None or (match[1] is None and match[3] is None):
        _fail(f"unexpected argument {word!r}: settings are written --name=value")
    return match[2], match[3]


def _find(options: dict[str, Any], name: str, short: bool = False) -> Any:
    """The dataclass field that a name on the command line means."""
    if short and len(name) == 1:
        for option in options.values():
            if option.metadata.get("short") == name:
                return option
    key = name.replace("-", "_")
    if key in options:
        return options[key]
    near = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    _fail(f"unknown setting --{name}; {hint}")


def _take_value(option: Any, argv: list[str]) -> Any:
    """The value of an option that was written without '=': the next word, or True for a bare switch."""
    is_word = bool(argv) and argv[0] != "--"
    if option.type is bool:
        return argv.pop(0) if is_word and argv[0].lower() in TRUE_WORDS + FALSE_WORDS else True
    if not is_word or (argv[0].startswith("-") and not re.match(r"-[\d.]", argv[0])):
        _fail(f"--{option.name} needs a value")
    return argv.pop(0)


def _convert(option: Any, value: Any) -> Any:
    """Turn text (or a TOML value) into the option's annotated type."""
    kind, name = option.type, option.name
    try:
        if kind is bool:
            result = _to_bool(value)
        elif kind is int:
            result = _to_int(value)
        elif kind is float and not isinstance(value, bool):
            result = float(value)
        elif kind is str and isinstance(value, str):
            result = value
        else:
            raise ValueError
    except (ValueError, TypeError):  # TypeError is for a list or a table of a .toml
        example = {int: "a whole number", float: "a number", bool: "0 or 1", str: "a text"}[kind]
        hint = "" if option.default is MISSING else f", such as --{name}={option.default!r}"
        _fail(f"--{name}={value}: {example} is wanted{hint}")
    choices = option.metadata.get("choices")
    if choices and result not in choices:
        near = difflib.get_close_matches(str(result), list(map(str, choices)), n=1, cutoff=0)
        _fail(f"--{name}={value} is not one of {', '.join(map(str, choices))}; did you mean {near[0]}?")
    return result


def _to_bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError
    return word in TRUE_WORDS


def _to_int(value: Any) -> int:
    """int of '20', '2_000', '2e9' or 2e9; ValueError for 2.5, True, 'x' and infinities."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d_]+", value):
        return int(value)
    number = float(value)
    if not number.is_integer():  # infinities and NaN are no integers either
        raise ValueError
    return int(number)


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except FileNotFoundError:
        _fail(f"no such settings file: {path}")
    except (OSError, ValueError) as error:  # a folder, no permission; not TOML, not UTF-8
        _fail(f"{path} cannot be read: {error}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
