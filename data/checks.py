"""Checks of a corpus's configuration that read no text: made before anything is prepared, and by a dry run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from data.config import DataConfig, SourceConfig
from data.shards import MAX_SHARD_TOKENS
from polargrad_dist.errors import ConfigError

# In a mixture these belong to each source
OWN = tuple(entry.name for entry in fields(SourceConfig) if entry.name not in ("weight", "name"))


def check_values(config: DataConfig) -> None:
    """Raises ``ConfigError`` for the first invalid value, or for values that exclude each other."""
    for name, good, expected in (
        ("validation_fraction", 0 <= config.validation_fraction < 1, "a number in [0, 1)"),
        (
            "shard_tokens",
            0 < config.shard_tokens <= MAX_SHARD_TOKENS // 2,
            f"a whole number from 1 to {MAX_SHARD_TOKENS // 2}",
        ),
        ("max_tokens", positive(config.max_tokens), "a whole number >= 1, or null for all"),
        ("workers", config.workers >= 0, "a whole number >= 0 (0: one per core)"),
        ("validation_tokens", (config.validation_tokens or 0) >= 0, "a whole number >= 0"),
        ("prefetch", config.prefetch >= 0, "a whole number >= 0"),
    ):
        if not good:
            raise ConfigError(f"data.{name} is {getattr(config, name)}, expected {expected}")
    if config.sources:
        check_mixture(config)
    elif config.validation_paths and config.source in ("builtin", "hub"):
        raise ConfigError(
            f"data.validation_paths is set with data.source {config.source!r}, expected []: leave it out, and set "
            "data.validation_fraction"
        )
    taken = [called(part) for part in config.sources]
    for name in config.validation_sets:
        if not name or name in taken:
            raise ConfigError(
                f"data.validation_sets names {name!r}, expected a name of its own: choose another"
            )


def check_mixture(config: DataConfig) -> None:
    """Raises ``ConfigError`` for sources that cannot be mixed."""
    from data.mixture import shares

    for key in OWN:
        if getattr(config, key) != getattr(DataConfig(), key):
            raise ConfigError(
                f"data.{key} is set with data.sources, expected it in each source: move it there"
            )
    if config.validation_paths:
        raise ConfigError(
            "data.validation_paths is set with data.sources, which have validation sets of their own, expected "
            "data.validation_sets: move the paths there"
        )
    if config.order == "sequential":
        raise ConfigError(
            "data.order is 'sequential' with data.sources, expected 'shuffled', since a mixture draws sequences by weight: "
            "set it to that, or name one source"
        )
    shares([part.weight for part in config.sources])
    for part in config.sources:
        if not positive(part.max_tokens):
            raise ConfigError(
                f"data.sources[].max_tokens is {part.max_tokens}, expected a whole number >= 1, or null for all"
            )
    names = [called(part) for part in config.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"data.sources has two sources called {twice[0]!r}, expected different names: set data.sources[].name"
        )


def positive(count: int | None) -> bool:
    return count is None or count >= 1


def called(part: SourceConfig) -> str:
    """The name of a source, by default derived from what it reads."""
    if part.name:
        return part.name
    if part.source == "hub":
        return part.hub.subset or part.hub.name.split("/")[-1]
    return Path(part.paths[0].rstrip("/*")).name.split(".")[0] if part.paths else part.source
