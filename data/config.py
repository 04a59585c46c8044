"""What text to train on and how it becomes tokens: plain fields, read by jsonargparse from YAML or the command line.

Knows nothing of the model or the trainer. Everything here that changes a token is part of a prepared folder's key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TokenizerConfig:
    """Which tokenizer turns text into ids.

    Args:
        name: `bpe`: a byte-level BPE of Qwen2's form, trained on the corpus itself and cached; else a folder or hub name that
            AutoTokenizer loads, or `tiktoken:NAME`.
        vocab_size: entries of the trained BPE, end-of-text included; a ready-made tokenizer brings its own.
        train_bytes: bytes of training text, from the start of the corpus, that the BPE learns its merges from.
        end_of_text: token that opens each document, as its string or its id; null: `<|endoftext|>` where the vocabulary has
            it, else the tokenizer's end-of-sequence token. For foreign shards without a tokenizer give the id (GPT-2: 50256).
    """

    name: str = "bpe"
    vocab_size: int = 4096
    train_bytes: int = 32 * 2**20
    end_of_text: int | str | None = None


@dataclass
class HubConfig:
    """A data set on the Hugging Face hub, read through `datasets`.

    Args:
        name: its name (HuggingFaceFW/fineweb, Skylion007/openwebtext, Elriggs/openwebtext-100k, …), or a local folder that
            `datasets` can load.
        subset: its configuration, for FineWeb `sample-10BT`; null: the default one.
        split: split to read.
        revision: branch, tag or commit; null: the main branch as it is when first prepared.
        streaming: read over the network while tokenizing, storing only the shards; false downloads the whole first.
    """

    name: str = "HuggingFaceFW/fineweb"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True


@dataclass
class SourceConfig:
    """One corpus of a mixture; its keys mean what they mean in a run's `data`.

    Args:
        weight: its share of the training sequences, against the other weights.
        name: what its validation loss is called; null for what it reads.
        source: as data.source.
        paths: as data.paths.
        text_field: as data.text_field.
        hub: as data.hub.
        max_tokens: as data.max_tokens, of this source.
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
            folders or globs, read in the given order, each folder and glob sorted by name. URLs such as s3://bucket/folder
            name text and prepared folders wherever fsspec reads them.
        sources: a mixture, in place of source, paths, text_field, hub and max_tokens: several corpora, each with a weight.
            Every source keeps a validation set of its own.
        validation_sets: further validation sets by name, each a list of text files, or of one prepared folder; tokenized with
            the run's tokenizer, and measured whenever the validation loss is.
        validation_paths: separate files or foreign shards for validation, in place of validation_fraction. Where it is
            empty, foreign shards in paths with `val` as a word of their name are for validation.
        text_field: field of a JSON line, or column of a parquet file or hub data set, that holds the document.
        hub: the data set, when source is `hub`.
        tokenizer: the tokenizer; foreign shards need it only for text samples and the vocabulary's size.
        validation_fraction: share of the documents kept for validation, chosen by a hash of each one's text; of plain text
            files the last share of the bytes. 0: none.
        validation_tokens: targets that a validation pass covers at most, from the start of its shards; null: all.
        shard_tokens: a shard is finished at the first chunk of text (about 1 MiB) that brings it to this many tokens.
        max_tokens: stop preparing at the first chunk that brings the training tokens to this many; null: the whole corpus.
        workers: threads that tokenize, each on a core of its own; 0: one per available core. Shards do not depend on it.
        cache: folder for prepared shards and trained tokenizers; a subfolder per configuration, named by a hash of it.
        verify: check of the shards at start: `full` reads all bytes (sha256); `auto` too, up to 4 GiB per process, and beyond
            that a random 4 GiB of whole shards; `sizes` reads headers and file sizes only. Foreign shards, which have no
            checksum, are read whole in the background of the first epoch, unless `sizes`; the checksums are kept in cache.
        order: `shuffled`, by trainer.seed; `sequential`: shards from their first token to their last, batch by batch, as
            modded-nanoGPT reads its .bin shards.
        prefetch: micro-batches that the loader's background thread keeps ready; 0: no thread.
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

    @property
    def planned_vocab_size(self) -> int | None:
        """Entries of a tokenizer that is yet to be trained; None for ready-made ones, which say so themselves."""
        if self.tokenizer.name != "bpe":
            return None
        ready = [part.source == "shards" for part in self.sources] or [self.source == "shards"]
        return None if any(ready) else self.tokenizer.vocab_size
