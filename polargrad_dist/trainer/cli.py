"""From the command line to a configuration, and from an error to one sentence and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from polargrad_dist.errors import ConfigError, PolarGradError

T = TypeVar("T")
USER_ERROR = 2


def parse(
    kind: type[T], description: str, args: list[str] | None = None
) -> tuple[T, dict[str, Any], int | None]:
    """Reads ``--config FILE`` and dotted overrides into the dataclass ``kind``.

    Returns it, its JSON-able form, and the world size of ``--dry_run`` or None. Raises ``ConfigError`` for an unknown key
    (with the nearest valid one) or a wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        description=description, exit_on_error=False, default_env=False, parser_mode="yaml", env_prefix=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument(
        "--dry_run",
        type=int,
        default=None,
        metavar="N",
        help="build nothing: show parameters, routing, owners, memory and traffic on N ranks",
    )
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_args(args)
    except ArgumentError as error:
        raise ConfigError(sentence(str(error), known_keys(parser))) from None
    dry_run = parsed.dry_run
    if dry_run is not None and dry_run < 1:
        raise ConfigError(f"--dry_run is {dry_run}, expected the number of ranks to plan for, at least 1")
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    plain = {
        name: value
        for name, value in json.loads(json.dumps(parsed.as_dict(), default=str)).items()
        if name in fields
    }
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)  # 4.49 renamed it
    return kind(**{name: built[name] for name in fields}), plain, dry_run


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


def sentence(message: str, known: list[str]) -> str:
    """jsonargparse's message as one sentence; an unknown key with the valid one nearest to it."""
    text = " ".join(message.split())
    found = re.search(
        r"(?:Key|key|option|Option|[Uu]nrecognized arguments:|group)\s+['\"]?(?:--)?([\w.]+)['\"]?", text
    )
    unknown = re.search(
        r"(not expected|does not accept|is not accepted|unrecognized|not valid|No action)",
        text,
        re.IGNORECASE,
    )
    if unknown and found:
        key = found.group(1)
        leaf = {name.split(".")[-1]: name for name in known}
        near = difflib.get_close_matches(key, known, 1, 0.6) or [
            leaf[name] for name in difflib.get_close_matches(key.split(".")[-1], leaf, 1, 0.6)
        ]
        hint = f": did you mean {near[0]}?" if near else ": see --help for the keys"
        return f"there is no configuration key {key}{hint}"
    return text


def run(main: Callable[[], int]) -> None:
    """Calls ``main`` and exits with its code; a user's mistake becomes one sentence and exit code 2."""
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # a stderr that is no file has no place for it
        faulthandler.enable()
    try:
        code = main()
    except PolarGradError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = USER_ERROR
    sys.exit(code)
