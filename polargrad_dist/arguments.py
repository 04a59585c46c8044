"""The parser that every command line and configuration file goes through: it reads values, and imports nothing they name."""

from __future__ import annotations

import re
from typing import Any

from polargrad_dist.errors import ConfigError

OURS = ["polargrad_dist", "models", "data"]


def safe_parser(**options: Any) -> Any:
    """A jsonargparse ``ArgumentParser`` to which a dotted path in a value is never more than text.

    Left as it comes, jsonargparse imports the module that a ``class_path`` names before it looks whether the class fits.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    # Our own are imported as it is, and jsonargparse looks the types of defaults up by their paths.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=OURS)
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)


def read_arguments(parser: Any, args: list[str] | None) -> Any:
    """What the parser makes of a command line and the files it names.

    Raises ``ConfigError`` for a value that names code, before any of it is imported, and jsonargparse's ``ArgumentError`` for
    what else is wrong.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(args)
    except (ArgumentError, ValueError, ImportError) as error:
        found = re.search(r"Importing '([^']*)' is not allowed", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"the configuration names code to run ({found[1]}), expected values only: take class_path and init_args out of "
            "it, and give the fields themselves"
        ) from None
