"""What text to train on and how it becomes tokens: plain fields, read by jsonargparse from YAML or the command line.

Knows nothing of the model or the trainer. Everything here that changes a token is part of a prepared folder's key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    name: str = "bpe"
    """`bpe`: a byte-level BPE trained on the corpus itself and cached; else a folder or hub name that AutoTokenizer
    loads, or `tiktoken:NAME`."""
    vocab_size: int = 4096
    """Entries of the trained BPE, end-of-text included. Ignored by ready-made tokenizers, which bring their own."""
    train_bytes: int = 32 * 2**20
    """Bytes of training text that the BPE learns its merges from, taken from the start of the corpus."""
    end_of_text: int | str | None = None
    """Token that marks document boundaries: its string, or its id. None: `<|endoftext|>` where the vocabulary has it,
    else the tokenizer's end-of-sequence token. For foreign shards without a tokenizer, give the id (GPT-2: 50256)."""


@dataclass
class HubConfig:
    """A data set on the Hugging Face hub, read through `datasets`."""

    name: str = "HuggingFaceFW/fineweb"
    """Name on the hub (HuggingFaceFW/fineweb, Skylion007/openwebtext, Elriggs/openwebtext-100k, …), or a local folder
    that `datasets` can load."""
    subset: str | None = None
    """Configuration of the data set, for FineWeb `sample-10BT`. None: the data set's default."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Branch, tag or commit of the data set. None: its main branch."""
    streaming: bool = True
    """Read over the network while tokenizing, storing only the shards; false downloads the whole data set first."""


@dataclass
class DataConfig:
    """The corpus, its tokenizer, and how the loader reads the token shards."""

    source: Literal["builtin", "files", "hub", "shards"] = "builtin"
    """`builtin`: the Python standard library's sources and documentation; `files`: local text, JSON lines, parquet;
    `hub`: the Hugging Face hub; `shards`: a folder that `python -m data.prepare` wrote, or foreign `.bin` shards."""
    paths: list[str] = field(default_factory=list)
    """For `files` (.txt, .md, .jsonl, .ndjson, .parquet) and `shards` (.bin): files, folders or globs, read in the given
    order, each folder and glob sorted by name."""
    validation_paths: list[str] = field(default_factory=list)
    """Separate files (or shards) for validation, in place of `validation_fraction`. Of foreign shards in `paths`, those
    with `val` as a word of their name are for validation when this is empty."""
    text_field: str = "text"
    """Field of a JSON line, or column of a parquet file or hub data set, that holds the document."""
    hub: HubConfig = field(default_factory=HubConfig)
    """The data set when `source` is `hub`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer; foreign shards need it only for text samples and its vocabulary size."""
    validation_fraction: float = 0.005
    """Share of the documents kept for validation, chosen by a hash of each document's text; of plain text files the last
    share of the bytes. 0: none."""
    validation_tokens: int | None = 10_485_760
    """Targets that a validation pass covers at most, from the start of the validation shards. None: all."""
    shard_tokens: int = 100_000_000
    """A shard is finished at the first whole chunk of text (about 1 MiB) that brings it to this many tokens."""
    max_tokens: int | None = None
    """Stop preparing once this many training tokens are written. None: the whole corpus."""
    workers: int = 0
    """Threads that tokenize, each on a core of its own. 0: one per available core. The shards do not depend on it."""
    cache: str = "cache"
    """Folder for prepared shards and trained tokenizers; one subfolder per configuration, named by a hash of it."""
    verify: Literal["auto", "full", "sizes"] = "auto"
    """Check of the shards at start: `full` reads all bytes (sha256); `auto` does too up to 4 GiB per process, and beyond
    that a random 4 GiB of whole shards; `sizes` reads headers and file sizes only."""
    prefetch: int = 4
    """Micro-batches that the loader's background thread keeps ready. 0: no thread."""

    @property
    def planned_vocab_size(self) -> int | None:
        """Entries of a tokenizer that is yet to be trained; None for ready-made ones, which say so themselves."""
        return self.tokenizer.vocab_size if self.tokenizer.name == "bpe" and self.source != "shards" else None
