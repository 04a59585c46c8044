"""Parses the command line into a configuration, and turns known errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

from polargrad_dist.arguments import read_arguments, safe_parser
from polargrad_dist.errors import CheckpointError, ConfigError, DataError, PolarGradError
from polargrad_dist.trainer.guesses import no_section, unknown
from polargrad_dist.trainer.output import flush

T = TypeVar("T")
USER_ERROR = 2
# As shells say for SIGINT
INTERRUPTED = 130


class DryRun(NamedTuple):
    """A dry run: the number of ranks, and whether to list every matrix."""

    ranks: int
    full: bool


def asked_to_show(short: int | None, full: int | None) -> DryRun | None:
    """The dry run of ``--dry_run`` or ``--dry_run_full``, or None.

    Raises ``ConfigError`` for both, and for fewer than one rank.
    """
    if short is not None and full is not None:
        raise ConfigError(
            f"both --dry_run {short} and --dry_run_full {full} are given, expected one of them: leave out the first to see "
            "every matrix, else the second"
        )
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

    Returns the dataclass, its JSON-able form, and the dry run or None. Raises ``ConfigError`` for an unknown key (with the
    nearest valid one) or a wrong type.
    """
    from jsonargparse import ArgumentError

    parser = safe_parser(
        # In place of a list of all keys
        usage="%(prog)s --config FILE [--any.key VALUE ...] [--dry_run [N]]",
        description=description,
        default_env=False,
        parser_mode="yaml",
        env_prefix=False,
    )
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
    known = known_keys(parser)
    args = sys.argv[1:] if args is None else args
    check_words(args, known)
    try:
        parsed = read_arguments(parser, [word for word in args if not word.startswith("--print_config")])
        parsed = read_arguments(parser, [*args, *left_out(parsed, kind(), args)])
    except ArgumentError as error:
        raise ConfigError(sentence(str(error), known)) from None
    dry_run = asked_to_show(parsed.dry_run, parsed.dry_run_full)
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    plain = {
        name: value
        for name, value in json.loads(json.dumps(parsed.as_dict(), default=str)).items()
        if name in names
    }
    # 4.49 renamed it
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)
    return kind(**{name: built[name] for name in names}), plain, dry_run


def left_out(parsed: Any, defaults: Any, args: list[str]) -> list[str]:
    """Options for what sections leave out that take it from another one, as their dataclass says by ``rest_from``.

    The parser knows only the class's own defaults, which are those of no role: with them `optimizer.head.lr` alone would
    change the scale too.
    """
    options = []
    for name, section in vars(defaults).items():
        for one in fields(section) if is_dataclass(section) else ():
            source, here = one.metadata.get("rest_from"), parsed[name]
            if source is None or here[one.name] is None:
                continue
            key = f"{name}.{one.name}"
            given, blank = mentioned(key, args), vars(type(getattr(section, source))())
            for field, value in vars(here[one.name]).items():
                if field not in given and json.dumps(value) == json.dumps(blank[field]):
                    rest = here[source][field]
                    options.append(f"--{key}.{field}={rest if isinstance(rest, str) else json.dumps(rest)}")
    return options


def mentioned(section: str, args: list[str]) -> dict[str, Any]:
    """The keys of a section that files and options set, with their values as YAML reads them."""
    found: dict[str, Any] = {}
    words = [word for one in args for word in one.split("=", 1)]
    for option, value in pairwise(words):
        if not option.startswith("--"):
            continue
        at = [] if option == "--config" else option[2:].split(".")
        wanted = section.split(".")
        if at[: len(wanted)] == wanted and len(at) > len(wanted):
            found[at[len(wanted)]] = _plain(value)
        elif wanted[: len(at)] == at:
            content = _content(_plain(value))
            for name in wanted[len(at) :]:
                content = _content(content.get(name)) if isinstance(content, dict) else None
            found |= content if isinstance(content, dict) else {}
    return found


def _content(value: Any) -> Any:
    """What a section's value stands for: itself, or what is in the file that it names."""
    if isinstance(value, str) and Path(value).is_file():
        import yaml

        return yaml.safe_load(Path(value).read_bytes())
    return value


def check_words(args: list[str], known: list[str]) -> None:
    """Raises ``ConfigError`` for a file after ``--config`` that cannot be read or has other keys, and for a value in place of
    a section."""
    words = [word for one in args for word in one.split("=", 1)]
    for option, value in pairwise(words):
        if option == "--config" and Path(value).is_file():
            check_yaml(Path(value), known)
        elif option.startswith("--") and is_section(option[2:], known):
            check_section(option[2:], _plain(value), known)


def check_yaml(path: Path, known: list[str]) -> None:
    """Raises ``ConfigError`` with file and line for a file that is no YAML, and with the file for a key that is none."""
    import yaml

    expected = "expected YAML with the sections model, data, optimizer and trainer"
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: {problem}, {expected}") from None
    if content is None:
        raise ConfigError(f"{path} is empty, {expected}")
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise ConfigError(f"{path} holds a {kind}, {expected}")
    try:
        check_keys("", content, known)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_keys(section: str, content: dict[Any, Any], known: list[str]) -> None:
    """Raises ``ConfigError`` for the first key below ``section`` that does not exist, or has a value in place of keys.

    What names code is left to the parser, which refuses it.
    """
    for name, value in content.items():
        key = f"{section}.{name}" if section else str(name)
        if is_section(key, known):
            check_section(key, value, known)
        elif key not in known and name not in _CODE:
            raise ConfigError(unknown(key, known))


def check_section(key: str, value: Any, known: list[str]) -> None:
    """Raises ``ConfigError`` for a section that is given as something else than a mapping or the name of a file."""
    if isinstance(value, dict):
        check_keys(key, value, known)
    # Only an optional section is a key of its own, and may be null
    elif not (isinstance(value, str) and Path(value).is_file()) and not (value is None and key in known):
        raise ConfigError(no_section(key, "empty" if value is None else value))


def is_section(key: str, known: list[str]) -> bool:
    """Whether a key is a section with keys of its own."""
    return any(name.startswith(f"{key}.") for name in known)


_CODE = ("class_path", "init_args", "dict_kwargs")


def _plain(word: str) -> Any:
    """A word of the command line as YAML reads it; as it stands where it is none."""
    import yaml

    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def known_keys(parser: Any) -> list[str]:
    """Every dotted key of the command line, those of optional sections too."""
    options = {
        option[2:]: action
        for action in parser._actions
        for option in action.option_strings
        # Of an optional section the parser knows only a key ".help".
        if option.startswith("--") and not option.endswith(".help")
    }
    optional = {
        f"{key}.{one.name}"
        for key, action in options.items()
        if get_origin(hint := getattr(action, "_typehint", None)) in (Union, UnionType)
        for part in get_args(hint)
        if is_dataclass(part)
        for one in fields(part)
    }
    return sorted({*options, *optional})


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
    """jsonargparse's message as one line: found and expected value, or the unknown key and the nearest valid one."""
    text = " ".join(message.split())
    if stray := re.search(r"unrecognized arguments: (\S+)", text):
        word = stray.group(1)
        if not word.startswith("--"):
            return f"unexpected argument {word!r}: use --key value; --help lists the keys"
        return unknown(word[2:].split("=")[0], known)
    if bare := re.search(r"argument (--[\w.]+): expected one argument", text):
        return f"{bare.group(1)} has no value, expected one after it"
    key = re.search(r"(?:[Kk]ey|[Oo]ption|group)\s+['\"]?(?:--)?([\w.]+)['\"]?", text)
    if key is None:
        return text
    # Of an optional section, what is wrong with one of its keys
    if within := re.search(
        r"Problem with given class_path '[^']*': Parser key \"([\w.]+)\": (.*) - Expected a <class 'NoneType'> Given",
        text,
    ):
        return sentence(f'Parser key "{key.group(1)}.{within.group(1)}": {within.group(2)}', known)
    if "File does not exist" in text:
        return f"{key.group(1)} names a file that does not exist: {text.split('File does not exist: ')[1]}"
    if unloadable := re.search(r"Unable to load config ['\"](.*?)['\"]", text):
        return no_section(key.group(1), unloadable.group(1))
    if inner := re.search(
        r"(?:Option|Key|Group key) ['\"]?([\w.]+)['\"]? is not (?:accepted|expected)", text
    ):
        name = inner.group(1)
        return unknown(name if name.startswith(key.group(1)) else f"{key.group(1)}.{name}", known)
    expected = list(
        dict.fromkeys(re.findall(r"Expected an? (typing\.Literal\[[^]]*\]|<class '[\w.]+'>)", text))
    )
    if length := re.search(r"Expected a tuple with (\d+) elements", text):
        expected.append(f"a list of {length.group(1)} values")
    if expected and re.search(r"Subtypes: \[<class '[\w.]+\.[A-Z]", text):
        expected.append("a mapping with its fields")
    if expected:
        # The last one is as the user wrote it
        value = re.search(r".*(?:Got|Given) value: (.*)$", text)
        found = value.group(1) if value else "something else"
        if any("list" in kind or "tuple" in kind for kind in expected) and not found.startswith("["):
            return f"{key.group(1)} is {found}, expected a list: write [{found}]"
        return f"{key.group(1)} is {found}, expected {' or '.join(map(_in_words, expected))}"
    if key.group(1) not in known and re.search(r"not expected|does not accept|not valid|No action", text):
        return unknown(key.group(1), known)
    return text


def _in_words(kind: str) -> str:
    if not kind.startswith(("typing", "<")):
        return kind
    if kind.startswith("typing.Literal"):
        return ", ".join(re.findall(r"'([^']*)'", kind))
    name = kind.removeprefix("<class '").removesuffix("'>").split(".")[-1]
    return _TYPES.get(name, f"the fields of {name}")


def program() -> str:
    """The name of the program as it was started: ``train.py``, or ``python -m tools.report`` of a package's ``__main__``."""
    path = Path(sys.argv[0])
    if path.name != "__main__.py":
        return path.name
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else path.parent.name


def run(main: Callable[[], int]) -> None:
    """Exits with the code of ``main``. A known error is one line, and exit code 2 if the user can fix it, else 1; an
    interrupt that ``main`` does not handle is one word, and 130."""
    # Fails if stderr is not a real file.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.enable()
    try:
        code = main()
    except PolarGradError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"{program()}: error: {error}", file=sys.stderr, flush=True)
        code = USER_ERROR if isinstance(error, ConfigError | DataError | CheckpointError) else 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"{program()}: interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
    flush()
    sys.exit(code)
