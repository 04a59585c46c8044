"""The tools' command lines: a mistake is answered in one line with the option that was meant, instead of a usage line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from polargrad_dist.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``ConfigError``.

    beyond: what a word beyond the expected ones was meant as, ``{}`` in the place of the word.
    guesses: options of other programs, each with the one that does it here.
    """

    def __init__(self, description: str, beyond: str, guesses: Mapping[str, str] | None = None, **more: Any):
        super().__init__(description=description, **more)
        self.beyond, self.guesses = beyond, guesses or {}

    def read(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """The options; raises ``ConfigError`` for what is not one."""
        options, rest = self.parse_known_args(args)
        if not rest:
            return options
        word = rest[0]
        if not word.startswith("-"):
            raise ConfigError(f"unexpected argument {word!r}, expected {self.beyond.format(repr(word))}")
        name = word.split("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(name, known, 1)
        meant = self.guesses.get(name.lstrip("-").replace("-", "_")) or (near[0] if near else None)
        raise ConfigError(
            f"there is no option {name}: "
            + (f"did you mean {meant}?" if meant else "--help lists the options")
        )

    def error(self, message: str) -> NoReturn:
        """argparse's complaint as one line."""
        text = " ".join(message.split())
        if missing := re.match(r"the following arguments are required: (.*)", text):
            names = {action.dest: action for action in self._actions}
            first = missing[1].split(", ")[0]
            action = names.get(first) or next(one for one in self._actions if one.metavar == first)
            raise ConfigError(f"no {first.upper()} is given, expected {action.help}")
        if bare := re.match(r"argument (--\w+)\S*: expected (?:one|at least one) argument", text):
            raise ConfigError(
                f"{bare[1]} has no value, expected one after it; if that begins with a dash, {bare[1]}=VALUE"
            )
        if kind := re.match(r"argument (--\w+)\S*: invalid (int|float) value: (.*)", text):
            expected = {"int": "a whole number", "float": "a number"}[kind[2]]
            raise ConfigError(f"{kind[1]} is {kind[3]}, expected {expected}")
        if choice := re.match(r"argument (--\w+)\S*: invalid choice: (.*) \(choose from (.*)\)", text):
            expected = choice[3].replace("'", "")
            raise ConfigError(f"{choice[1]} is {choice[2]}, expected one of: {expected}")
        raise ConfigError(text)
