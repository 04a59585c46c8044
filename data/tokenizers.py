"""Tokenizers behind one small face: a byte-level BPE trained here, what AutoTokenizer loads, and tiktoken's encodings.

A ``TokenizerInfo`` is all that is stored of a tokenizer beside the shards and all that a worker process is sent; ``load``
turns it into a ``Tokenizer``. Text never becomes a special token: a document cannot forge the end of a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from data.config import TokenizerConfig
from data.files import digest, folder_lock, make_folder, write_atomically
from data.sources import Piece, Source
from polargrad_dist.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
_INSTALL = "pip install 'polargrad-dist[train]'"


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer, and how to load it again.

    ``content`` is the whole tokenizer as JSON (kind "fast"), or the name to load it by ("slow", "tiktoken").
    """

    name: str
    kind: str
    hash: str
    vocab_size: int
    end_of_text: int
    content: str

    def load(self) -> Tokenizer:
        """Raises DataError when the tokenizer cannot be loaded."""
        return _LOADERS[self.kind](self.content)

    def summary(self) -> dict[str, Any]:
        """Everything but the content, for a manifest; JSON-able."""
        fields = asdict(self)
        if self.kind == "fast":
            del fields["content"]
        return fields

    def save(self, folder: Path) -> None:
        if self.kind == "fast":
            write_atomically(folder / "tokenizer.json", self.content.encode())

    @classmethod
    def restore(cls, summary: dict[str, Any], folder: Path) -> TokenizerInfo:
        """From a manifest's summary and the ``tokenizer.json`` beside it."""
        if summary["kind"] == "fast":
            path = folder / "tokenizer.json"
            try:
                content = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read ({error}); prepare the folder again.") from error
            if hashlib.sha256(content.encode()).hexdigest() != summary["hash"]:
                raise DataError(
                    f"{path} is not the tokenizer that the manifest beside it names; prepare the folder again."
                )
            summary = {**summary, "content": content}
        return cls(**summary)


class FastTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON."""

    def __init__(self, content: str) -> None:
        self._tokenizer = _import_tokenizers().Tokenizer.from_str(content)
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SlowTokenizer:
    """A Transformers tokenizer that has no form in the `tokenizers` library."""

    def __init__(self, name: str) -> None:
        self._tokenizer = _auto_tokenizer(name)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


class TiktokenTokenizer:
    """One of tiktoken's named encodings."""

    def __init__(self, name: str) -> None:
        self._encoding = _tiktoken(name)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


_LOADERS: dict[str, Callable[[str], Tokenizer]] = {
    "fast": FastTokenizer,
    "slow": SlowTokenizer,
    "tiktoken": TiktokenTokenizer,
}


def find_tokenizer(
    config: TokenizerConfig, source: Source | None, cache: Path, report: Callable[[str], None]
) -> TokenizerInfo:
    """The tokenizer that a configuration names; `bpe` is trained on ``source``, or taken from ``cache``.

    Raises ConfigError or DataError, among others for a tokenizer that is not there or a hub that cannot be reached.
    """
    if config.name == "bpe":
        if source is None:
            raise ConfigError(
                "data.tokenizer.name is bpe, which is trained on text, but data.source has none; name the tokenizer "
                "that wrote the shards."
            )
        return _trained(config, source, cache / "tokenizers", report)
    if config.name.startswith("tiktoken:"):
        return _from_tiktoken(config)
    return _from_transformers(config)


def _trained(
    config: TokenizerConfig, source: Source, cache: Path, report: Callable[[str], None]
) -> TokenizerInfo:
    if config.vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size}; a byte-level BPE needs 256 bytes and end-of-text, 257."
        )
    key = digest({"source": source.identity(), "vocab": config.vocab_size, "bytes": config.train_bytes})
    folder = cache / f"bpe-{config.vocab_size}-{key[:16]}"
    make_folder(folder)
    path = folder / "tokenizer.json"
    with folder_lock(folder):
        if not path.exists():
            report(f"training a byte-level BPE of {config.vocab_size:,} tokens on {source.describe()}")
            write_atomically(path, _train_bpe(source.pieces(), config.vocab_size, config.train_bytes).encode())
    return _from_json("bpe", path.read_text(encoding="utf-8"), config.end_of_text)


def _train_bpe(pieces: Iterable[Piece], vocab_size: int, train_bytes: int) -> str:
    library = _import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterable[str]:
        total = 0
        for piece in pieces:
            if total >= train_bytes:
                break
            if not piece.validation and piece.text:
                total += piece.size
                yield piece.text
        if total == 0:
            raise DataError("the corpus is empty: it holds no training text; look at data.paths.")

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.to_str()


def _from_transformers(config: TokenizerConfig) -> TokenizerInfo:
    tokenizer = _auto_tokenizer(config.name)
    end = config.end_of_text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        default = tokenizer.eos_token if end is None and END_OF_TEXT not in tokenizer.get_vocab() else end
        return _from_json(config.name, backend.to_str(), default)
    vocabulary = tokenizer.get_vocab()
    default = tokenizer.eos_token if end is None and END_OF_TEXT not in vocabulary else end
    kind = type(tokenizer).__name__
    return TokenizerInfo(
        config.name,
        "slow",
        digest({"class": kind, "vocabulary": vocabulary}),
        max(vocabulary.values()) + 1,
        _end_of_text(config.name, default, vocabulary),
        config.name,
    )


def _from_json(name: str, content: str, end_of_text: int | str | None) -> TokenizerInfo:
    vocabulary = _import_tokenizers().Tokenizer.from_str(content).get_vocab(with_added_tokens=True)
    return TokenizerInfo(
        name,
        "fast",
        hashlib.sha256(content.encode()).hexdigest(),
        max(vocabulary.values()) + 1,
        _end_of_text(name, end_of_text, vocabulary),
        content,
    )


def _from_tiktoken(config: TokenizerConfig) -> TokenizerInfo:
    name = config.name.removeprefix("tiktoken:")
    encoding = _tiktoken(name)
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    sums = hashlib.sha256(json.dumps(sorted(special.items())).encode())
    for token in encoding.token_byte_values():
        sums.update(len(token).to_bytes(4) + token)
    # Ordinary strings may name the end too; only asked for where the configuration does.
    if isinstance(config.end_of_text, str) and config.end_of_text not in special:
        special[config.end_of_text] = encoding.encode_single_token(config.end_of_text)
    end = _end_of_text(config.name, config.end_of_text, special, size=encoding.n_vocab)
    return TokenizerInfo(config.name, "tiktoken", sums.hexdigest(), encoding.n_vocab, end, name)


def _end_of_text(name: str, wanted: int | str | None, vocabulary: dict[str, int], size: int | None = None) -> int:
    if isinstance(wanted, int):
        size = size or max(vocabulary.values()) + 1
        if not 0 <= wanted < size:
            raise ConfigError(f"data.tokenizer.end_of_text is {wanted}, but {name} has the ids 0 to {size - 1:,}.")
        return wanted
    token = END_OF_TEXT if wanted is None else wanted
    if token not in vocabulary:
        raise ConfigError(f"the tokenizer {name} has no token {token!r}; set data.tokenizer.end_of_text to one it has.")
    return vocabulary[token]


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"the tokenizer needs the package tokenizers: {_INSTALL}.") from error
    return tokenizers


def _auto_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"the tokenizer {name} needs the package transformers: {_INSTALL}.") from error
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")):
            raise DataError(f"{name} is no folder; data.tokenizer.name is a folder with tokenizer files or a hub name.")
        from data.hub import require_hub

        require_hub(name, "tokenizer", "set data.tokenizer.name to a local folder with its tokenizer.json, or to bpe")
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # Transformers raises OSError, ValueError, KeyError and more for an unusable folder
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"AutoTokenizer cannot load {name}: {reason}.") from error


def _tiktoken(name: str) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise DataError(f"the tokenizer tiktoken:{name} needs the package tiktoken: {_INSTALL}.") from error
    if name not in tiktoken.list_encoding_names():
        raise ConfigError(f"tiktoken has no encoding {name!r}; it has {', '.join(tiktoken.list_encoding_names())}.")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors where its vocabulary cannot be downloaded
        raise DataError(
            f"tiktoken cannot load {name} ({type(error).__name__}): its vocabulary is downloaded once; fill the folder "
            "TIKTOKEN_CACHE_DIR on a machine with a network, or set data.tokenizer.name to a local folder."
        ) from error
