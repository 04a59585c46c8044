"""Tokenizers: one trained here, any that AutoTokenizer loads, tiktoken's. Text in, ids out, and a hash of what it does.

Text that looks like a special token is text: only `data.prepare` writes end-of-text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import TokenizerConfig
from data.files import digest, make_folder, write_atomically
from data.sources import Source
from polargrad_dist.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerInfo:
    """What a prepared folder remembers of its tokenizer; `load` brings it back."""

    name: str
    hash: str
    vocab_size: int
    end_of_text: int
    file: str | None = None
    """The tokenizer's own JSON, beside the shards; None for tiktoken's, which are loaded by name."""

    def load(self, folder: Path | None = None) -> Tokenizer:
        """The tokenizer; ``folder`` is that of the shards."""
        if self.file is not None and folder is not None:
            return Tokenizer(_from_file(folder / self.file), self)
        return open_ready(self.name, self.end_of_text)


class Tokenizer:
    """Encodes batches without special tokens, decodes ids. Thread-safe: the work is outside Python."""

    def __init__(self, backend: Any, info: TokenizerInfo):
        self.backend, self.info = backend, info
        self._tiktoken = info.name.startswith("tiktoken:")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32."""
        if self._tiktoken:
            return [np.array(self.backend.encode_ordinary(text), dtype=np.uint32) for text in texts]
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        return (
            self.backend.decode(ids)
            if self._tiktoken
            else self.backend.decode(ids, skip_special_tokens=False)
        )

    def json(self) -> str | None:
        """The tokenizer as the JSON that `tokenizers` reads; None for tiktoken's."""
        return None if self._tiktoken else self.backend.to_str()


def open_tokenizer(config: TokenizerConfig, source: Source, cache: Path) -> Tokenizer:
    """The tokenizer that a configuration names; trains and caches a BPE where it says so."""
    if config.name == "bpe":
        return _trained(config, source, cache)
    return open_ready(config.name, config.end_of_text)


def open_ready(name: str, end_of_text: int | str | None) -> Tokenizer:
    """A ready-made tokenizer by tiktoken name, folder or hub name. Raises DataError when it cannot be had."""
    if name.startswith("tiktoken:"):
        return _tiktoken(name, end_of_text)
    try:
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(name)
        backend = fast.backend_tokenizer
    except ImportError as error:
        raise DataError("this tokenizer needs transformers: pip install 'polargrad-dist[train]'.") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise DataError(
            f"the tokenizer {name!r} cannot be loaded ({type(error).__name__}: {reason}); set data.tokenizer.name to a "
            "local folder with tokenizer.json, to tiktoken:NAME, or to bpe to train one on the corpus."
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return _wrap(name, backend, end_of_text, getattr(fast, "eos_token", None))


def _tiktoken(name: str, end_of_text: int | str | None) -> Tokenizer:
    try:
        import tiktoken

        backend = tiktoken.get_encoding(name.removeprefix("tiktoken:"))
    except ImportError as error:
        raise DataError(f"{name} needs tiktoken: pip install 'polargrad-dist[train]'.") from error
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer.name is {name!r}, which tiktoken does not know: {error}".split("\n")[0]
        ) from error
    except Exception as error:
        raise DataError(
            f"tiktoken could not fetch the files of {name} ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder "
            "that has them, or data.tokenizer.name to a local tokenizer folder."
        ) from error
    marker = backend.eot_token if end_of_text is None else end_of_text
    if isinstance(marker, str):
        marker = backend.encode_single_token(marker)
    fingerprint = digest(
        [
            name,
            backend.n_vocab,
            hashlib.sha256(repr(sorted(backend._mergeable_ranks.items())).encode()).hexdigest(),
        ]
    )
    return Tokenizer(backend, TokenizerInfo(name, fingerprint, backend.n_vocab, marker))


def _wrap(name: str, backend: Any, end_of_text: int | str | None, default: str | None = None) -> Tokenizer:
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text
    size = backend.get_vocab_size(with_added_tokens=True)
    marker = end_of_text
    if marker is None:
        marker = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else default
    number = backend.token_to_id(marker) if isinstance(marker, str) else marker
    if number is None or not 0 <= number < size:
        raise ConfigError(
            f"data.tokenizer.end_of_text is {marker!r}, which the tokenizer {name!r} does not have; set it to the token "
            "that separates documents."
        )
    text = backend.to_str()
    return Tokenizer(
        backend,
        TokenizerInfo(name, hashlib.sha256(text.encode()).hexdigest(), size, number, "tokenizer.json"),
    )


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as a tokenizer ({error}); delete its folder and prepare again."
        ) from error
    backend.encode_special_tokens = True
    return backend


def _trained(config: TokenizerConfig, source: Source, cache: Path) -> Tokenizer:
    """A byte-level BPE of the corpus's first training text, from the cache where it was trained before."""
    if config.vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size}; a byte-level BPE has at least 257 entries."
        )
    key = digest([source.identity(), config.vocab_size, config.train_bytes, "bpe 1"])[:16]
    make_folder(cache)
    path = cache / f"bpe-{key}.json"
    if not path.exists():
        write_atomically(path, _train(config, source).encode())
    marker = END_OF_TEXT if config.end_of_text is None else config.end_of_text
    return _wrap("bpe", _from_file(path), marker)


def _train(config: TokenizerConfig, source: Source) -> str:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend.train_from_iterator(_training_text(source, config.train_bytes), trainer)
    return backend.to_str()


def _training_text(source: Source, limit: int) -> Iterator[str]:
    seen = 0
    for piece in source.pieces():
        if piece.validation:
            continue
        yield piece.text
        seen += piece.size
        if seen >= limit:
            return
