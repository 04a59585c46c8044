"""From the command line to a configuration, and from an error to one sentence and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import json
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from polargrad_dist.arguments import read_arguments, safe_parser
from polargrad_dist.errors import CheckpointError, ConfigError, DataError, PolarGradError
from polargrad_dist.optim.rules import ROLES
from polargrad_dist.trainer.output import flush

T = TypeVar("T")
RULES = [f"optimizer.{role}" for role in ROLES]
USER_ERROR = 2


class DryRun(NamedTuple):
    """A run that is only shown: on how many ranks, and whether with every matrix."""

    ranks: int
    full: bool


def asked_to_show(short: int | None, full: int | None) -> DryRun | None:
    """What ``--dry_run`` and ``--dry_run_full`` ask for; raises ``ConfigError`` for fewer than one rank."""
    for name, ranks in (("--dry_run", short), ("--dry_run_full", full)):
        if ranks is not None and ranks < 1:
            raise ConfigError(f"{name} is {ranks}, expected the number of ranks to plan for, at least 1")
    if full is not None:
        return DryRun(full, True)
    return None if short is None else DryRun(short, False)


def parse(
    kind: type[T], description: str, args: list[str] | None = None
) -> tuple[T, dict[str, Any], DryRun | None]:
    """Reads ``--config FILE`` and dotted overrides into the dataclass ``kind``.

    Returns it, its JSON-able form, and what ``--dry_run`` asks for or None. Raises ``ConfigError`` for an unknown key
    (with the nearest valid one) or a wrong type.
    """
    from jsonargparse import ArgumentError

    parser = safe_parser(description=description, default_env=False, parser_mode="yaml", env_prefix=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument(
        "--dry_run",
        type=int,
        nargs="?",
        const=1,
        default=None,
        metavar="N",
        help="build nothing: show parameters and rules by role, and on N ranks (1 if left out) memory, traffic, and which "
        "known GPUs fit",
    )
    parser.add_argument(
        "--dry_run_full",
        type=int,
        nargs="?",
        const=1,
        default=None,
        metavar="N",
        help="the same, with every matrix and its owner",
    )
    parser.add_class_arguments(kind)
    check_yaml(sys.argv[1:] if args is None else args)
    try:
        parsed = read_arguments(parser, args)
    except ArgumentError as error:
        raise ConfigError(sentence(str(error), known_keys(parser))) from None
    dry_run = asked_to_show(parsed.dry_run, parsed.dry_run_full)
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    plain = {
        name: value
        for name, value in json.loads(json.dumps(parsed.as_dict(), default=str)).items()
        if name in fields
    }
    for name, value in plain.items():
        if is_dataclass(default := getattr(kind(), name)) and not isinstance(value, dict):
            raise ConfigError(
                f"{name} is {value!r}, expected a mapping with the fields of {type(default).__name__}"
            )
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)  # 4.49 renamed it
    return kind(**{name: built[name] for name in fields}), plain, dry_run


def check_yaml(args: list[str]) -> None:
    """Raises ``ConfigError`` with file and line for a file after ``--config`` that is no YAML."""
    import yaml

    words = [word for one in args for word in one.split("=", 1)]
    for option, name in pairwise(words):
        if option != "--config" or not Path(name).is_file():
            continue
        try:
            yaml.safe_load(Path(name).read_bytes())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(
                f"{where}: {problem}, expected YAML with the sections model, data, optimizer and trainer"
            ) from None


def known_keys(parser: Any) -> list[str]:
    """Every dotted key that the command line takes."""
    return sorted(
        {
            option[2:]
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }
    )


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list such as [a, b]",
    "tuple": "a list such as [0.9, 0.95]",
}


def sentence(message: str, known: list[str]) -> str:
    """jsonargparse's message as one sentence: a value with what was expected, an unknown key with the nearest valid one."""
    text = " ".join(message.split())
    if stray := re.search(r"unrecognized arguments: (\S+)", text):
        word = stray.group(1)
        if not word.startswith("--"):
            return f"unexpected argument {word!r}: use --key value; --help lists the keys"
        return _unknown(word[2:].split("=")[0], known)
    key = re.search(r"(?:[Kk]ey|[Oo]ption|group)\s+['\"]?(?:--)?([\w.]+)['\"]?", text)
    if key is None:
        return text
    if "File does not exist" in text:
        return f"{key.group(1)} names a file that does not exist: {text.split('File does not exist: ')[1]}"
    if unloadable := re.search(r"Unable to load config ['\"](.*?)['\"]", text):
        return f"{key.group(1)} is {unloadable.group(1)}, expected a mapping with its fields"
    if inner := re.search(
        r"(?:Option|Key|Group key) ['\"]?([\w.]+)['\"]? is not (?:accepted|expected)", text
    ):
        name = inner.group(1)
        return _unknown(name if name.startswith(key.group(1)) else f"{key.group(1)}.{name}", known)
    expected = list(
        dict.fromkeys(re.findall(r"Expected an? (typing\.Literal\[[^]]*\]|<class '[\w.]+'>)", text))
    )
    if length := re.search(r"Expected a tuple with (\d+) elements", text):
        expected.append(f"a list of {length.group(1)} values")
    if expected and re.search(r"Subtypes: \[<class '[\w.]+\.[A-Z]", text):
        expected.append("a mapping with its fields")
    if expected:
        value = re.search(r".*(?:Got|Given) value: (.*)$", text)  # the last of them is as the user wrote it
        found = value.group(1) if value else "something else"
        if any("list" in kind or "tuple" in kind for kind in expected) and not found.startswith("["):
            return f"{key.group(1)} is {found}, expected a list: write [{found}]"
        return f"{key.group(1)} is {found}, expected {' or '.join(map(_in_words, expected))}"
    if key.group(1) not in known and re.search(r"not expected|does not accept|not valid|No action", text):
        return _unknown(key.group(1), known)
    return text


def _unknown(key: str, known: list[str]) -> str:
    begun = [name for name in known if name.startswith(key)]
    if 1 < len(begun) <= 5:
        return f"there is no configuration key {key}: did you mean one of {', '.join(begun)}?"
    parts = key.split(".")
    of_roles = [f"{role}.{parts[-1]}" for role in RULES if f"{role}.{parts[-1]}" in known]
    if of_roles and parts[:-1] in ([], ["optimizer"]):
        return f"there is no configuration key {key}: each role has its own, one of {', '.join(of_roles)}"
    leaf = {name.split(".")[-1]: name for name in known}
    near = (
        begun[:1]
        or difflib.get_close_matches(key, known, 1, 0.6)
        or [leaf[name] for name in difflib.get_close_matches(key.split(".")[-1], leaf, 1, 0.6)]
    )
    hint = f": did you mean {near[0]}?" if near else ": see --help for the keys"
    return f"there is no configuration key {key}{hint}"


def _in_words(kind: str) -> str:
    if not kind.startswith(("typing", "<")):
        return kind
    if kind.startswith("typing.Literal"):
        return ", ".join(re.findall(r"'([^']*)'", kind))
    name = kind.removeprefix("<class '").removesuffix("'>").split(".")[-1]
    return _TYPES.get(name, f"the fields of {name}")


def run(main: Callable[[], int]) -> None:
    """Exits with the code of ``main``. A known error is one sentence, and exit code 2 if the user can fix it, else 1."""
    # It needs a stderr that is a real file.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.enable()
    try:
        code = main()
    except PolarGradError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = USER_ERROR if isinstance(error, ConfigError | DataError | CheckpointError) else 1
    flush()
    sys.exit(code)
