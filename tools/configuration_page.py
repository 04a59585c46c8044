"""Every configuration key with its type, default and meaning, from the dataclasses.

`python -m tools.configuration_page > docs/configuration.md` writes the page; `tests/test_docs.py` fails when the page is
older than the code.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from polargrad_dist.optim import Rule
from polargrad_dist.optim.rules import ROLES
from train import RunConfig

HEAD = """# Every configuration key

Each can be set in a YAML file, in its section, or on the command line: `--trainer.schedule.kind wsd`. Generated from the
code by `python -m tools.configuration_page`; `python train.py --help` says the same. `ROLE` stands for a role, `[]` for an
item of a list.
"""
RULES = """Roles are `hidden`, `embed`, `value_embed`, `head` and `scalar`; `head` and `value_embed` take the rule of `embed`
where they are null, and what their section leaves out is `embed`'s.
Defaults are those of `hidden` / `embed` / `scalar` where they differ.
"""


def page() -> str:
    """The page in Markdown."""
    return HEAD + "".join(sections("", RunConfig()))


def sections(prefix: str, config: Any) -> Iterator[str]:
    """A table of a dataclass's plain keys, then the tables of its nested dataclasses."""
    meanings, hints = arguments(type(config)), typing.get_type_hints(type(config))
    nested, rows = [], []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value) or (prefix == "optimizer." and field.name in ROLES):
            nested.append((f"{prefix}{field.name}", value))
        else:
            rows.append(row(f"{prefix}{field.name}", hints[field.name], shown(value), meanings[field.name]))
    if rows:
        what = f"## `{prefix.rstrip('.')}`\n\n{first_sentence(type(config))}\n\n"
        yield f"\n{what}{table(rows)}"
    if prefix == "optimizer.":
        yield "\n" + rule_section(config)
        return
    for name, value in nested:
        yield from sections(f"{name}.", value)
    for kind, names in optional(config).items():
        yield from sections(f"{prefix}{names[0] if len(names) == 1 else 'ROLE'}.", kind())


def optional(config: Any) -> dict[type, list[str]]:
    """The dataclasses that keys without a default one can hold, each with these keys; a list's is marked by ``[]``."""
    found: dict[type, list[str]] = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        many = "[]" if typing.get_origin(hint) is list else ""
        for part in typing.get_args(hint):
            if is_dataclass(part) and not is_dataclass(getattr(config, name)):
                found.setdefault(part, []).append(f"{name}{many}")  # type: ignore[arg-type]
    return found


def rule_section(config: Any) -> str:
    """The keys of a role's rule, with the defaults of the roles side by side."""
    meanings, hints = arguments(Rule), typing.get_type_hints(Rule)
    defaults = [config.rule(role) for role in ("hidden", "embed", "scalar")]
    rows = []
    for field in fields(Rule):
        values = [shown(getattr(rule, field.name)) for rule in defaults]
        text = values[0] if len(set(values)) == 1 else " / ".join(values)
        rows.append(row(f"optimizer.ROLE.{field.name}", hints[field.name], text, meanings[field.name]))
    return f"## `optimizer.ROLE`\n\n{first_sentence(Rule)}\n{RULES}\n{table(rows)}"


def table(rows: list[str]) -> str:
    return "| key | type | default | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows)


def row(key: str, kind: Any, default: str, meaning: str) -> str:
    cells = (f"`{key}`", kind_in_words(kind), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def shown(value: Any) -> str:
    """A default value as written in YAML."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`" if isinstance(value, list | dict) or value == "" else f"`{value}`"


def kind_in_words(kind: Any) -> str:
    """A type in terms of YAML."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_in_words(part) for part in parts)
    if origin is list:
        return f"list of {kind_in_words(parts[0])}s"
    if origin is tuple:
        return f"list of {len(parts)} {kind_in_words(parts[0])}s"
    if origin is dict:
        return f"mapping of {kind_in_words(parts[0])} to {kind_in_words(parts[1])}"
    words = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "anything",
    }
    return words.get(
        kind, "mapping" if is_dataclass(kind) or kind is dict else getattr(kind, "__name__", str(kind))
    )


def first_sentence(kind: type) -> str:
    return " ".join((kind.__doc__ or "").partition("Args:")[0].split())


def arguments(kind: type) -> dict[str, str]:
    """The description of each field in the docstring's "Args:". Raises ``KeyError`` for a field without one."""
    text = (kind.__doc__ or "").partition("Args:")[2]
    indent = re.search(r"\n( +)\S", text)
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        begun = re.match(rf"{indent[1] if indent else ''}(\w+): (.*)", line)
        if begun:
            name = begun[1]
            found[name] = begun[2]
        elif name and line.strip() and line.startswith((indent[1] if indent else "") + " "):
            found[name] += f" {line.strip()}"
        elif line.strip():
            break
    missing = [f.name for f in fields(kind) if f.name not in found and f.default is not MISSING]
    if missing:
        raise KeyError(f"the docstring of {kind.__name__} says nothing of {', '.join(missing)}")
    return {name: meaning[0].upper() + meaning[1:] for name, meaning in found.items()}


if __name__ == "__main__":
    print(page(), end="")
