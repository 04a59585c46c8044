"""Which text to train on, and how it is tokenized: plain fields, read by jsonargparse from YAML or the command line.

Independent of model and trainer. Every setting that changes a token is part of a prepared folder's key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TokenizerConfig:
    """The tokenizer.

    Args:
        name: `bpe` for a byte-level BPE in Qwen2's form, trained on the corpus itself and cached; or a folder or hub name
            that AutoTokenizer loads, or `tiktoken:NAME`.
        vocab_size: size of the trained BPE, including end-of-text; a ready-made tokenizer has its own.
        train_bytes: bytes of training text, from the start of the corpus, on which the BPE is trained.
        end_of_text: token at the start of each document, as its string or its id. Defaults to `<|endoftext|>` if the
            vocabulary has it, else to the tokenizer's end-of-sequence token. For foreign shards without a tokenizer give the
            id (GPT-2: 50256).
    """

    name: str = "bpe"
    vocab_size: int = 4096
    train_bytes: int = 32 * 2**20
    end_of_text: int | str | None = None


@dataclass
class HubConfig:
    """A data set on the Hugging Face hub, read through `datasets`.

    Args:
        name: name on the hub (HuggingFaceFW/fineweb, Skylion007/openwebtext, Elriggs/openwebtext-100k, …), or a local folder
            that `datasets` can load.
        subset: configuration of the data set, such as FineWeb's `sample-10BT`. Defaults to its default one.
        split: split to read.
        revision: branch, tag or commit. Defaults to the main branch at the time of preparation.
        streaming: read over the network while tokenizing, storing only the shards; false downloads everything first.
    """

    name: str = "HuggingFaceFW/fineweb"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True


@dataclass
class SourceConfig:
    """One corpus of a mixture; its keys have the same meaning as in `data`.

    Args:
        weight: share of the training sequences, relative to the other weights.
        name: name of its validation loss. Defaults to one derived from its source.
        source: as data.source.
        paths: as data.paths.
        text_field: as data.text_field.
        hub: as data.hub.
        max_tokens: as data.max_tokens, for this source.
    """

    weight: float = 1.0
    name: str | None = None
    source: Literal["builtin", "files", "hub", "shards"] = "files"
    paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    hub: HubConfig = field(default_factory=HubConfig)
    max_tokens: int | None = None


@dataclass
class DataConfig:
    """The corpus, its tokenizer, and how the loader reads the token shards.

    Args:
        source: `builtin`: the Python standard library's sources and documentation; `files`: local text, JSON lines, parquet;
            `hub`: the Hugging Face hub; `shards`: folders that `python -m data.prepare` wrote, or foreign `.bin` shards.
        paths: for `files` (.txt, .md, .jsonl, .ndjson, .parquet; text also as .gz or .zst) and `shards` (.bin): files,
            folders or globs, read in the given order, each folder and glob sorted by name. Text and prepared folders can also
            be URLs that fsspec reads, such as s3://bucket/folder. Files that validation_paths or validation_sets name too are
            left out.
        sources: a mixture of several corpora, each with a weight; replaces source, paths, text_field, hub and max_tokens.
            Every source has a validation set of its own.
        validation_sets: further validation sets by name, each a list of text files, or of one prepared folder; tokenized with
            the run's tokenizer, and evaluated with the validation loss.
        validation_paths: separate files or foreign shards for validation, instead of validation_fraction. If it is empty,
            foreign shards in paths with `val` as a word of their name are for validation.
        text_field: field of a JSON line, or column of a parquet file or hub data set, that holds the document.
        hub: the data set, when source is `hub`.
        tokenizer: the tokenizer; foreign shards need it only for text samples and the size of the vocabulary.
        validation_fraction: share of the documents for validation, chosen by a hash of their text; of plain text files, the
            last share of the bytes. 0 for none.
        validation_tokens: largest number of targets of a validation pass, from the start of its shards; null for all.
        shard_tokens: a shard ends with the first chunk of text (about 1 MiB) that brings it to this many tokens.
        max_tokens: preparation ends with the first chunk that brings the training tokens to this many; null for the whole
            corpus.
        workers: tokenizer threads, each on a core of its own; 0 for one per available core. Shards do not depend on it.
        cache: folder for prepared shards and trained tokenizers, with a subfolder per configuration, named by its hash.
        verify: check of the shards at start: `full` reads all bytes (sha256); `auto` too, up to 4 GiB per process, and beyond
            that a random 4 GiB of whole shards; `sizes` reads headers and file sizes only. Foreign shards, which have no
            checksum, are read whole in the background of the first epoch, unless `sizes`; the cache keeps their checksums.
        order: `shuffled`, by trainer.seed; `sequential`: shards from their first token to their last, batch by batch, as
            modded-nanoGPT reads its .bin shards.
        prefetch: micro-batches that the loader's background thread keeps ready; 0 for no thread.
    """

    source: Literal["builtin", "files", "hub", "shards"] = "builtin"
    paths: list[str] = field(default_factory=list)
    sources: list[SourceConfig] = field(default_factory=list)
    validation_sets: dict[str, list[str]] = field(default_factory=dict)
    validation_paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    hub: HubConfig = field(default_factory=HubConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation_fraction: float = 0.005
    validation_tokens: int | None = 10_485_760
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    workers: int = 0
    cache: str = "cache"
    verify: Literal["auto", "full", "sizes"] = "auto"
    order: Literal["shuffled", "sequential"] = "shuffled"
    prefetch: int = 4

    def __post_init__(self) -> None:
        self.cache = os.path.expanduser(self.cache)

    @property
    def planned_vocab_size(self) -> int | None:
        """The vocabulary size of a tokenizer that will be trained; None for ready-made tokenizers, which have their own."""
        if self.tokenizer.name != "bpe":
            return None
        ready = [part.source == "shards" for part in self.sources] or [self.source == "shards"]
        return None if any(ready) else self.tokenizer.vocab_size
