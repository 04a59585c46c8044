"""Tokenizers: a BPE trained here, any that AutoTokenizer loads, and tiktoken's. Each has a hash of its behaviour.

Special tokens inside text are encoded as text: only `data.prepare` writes end-of-text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from data.config import TokenizerConfig
from data.documents import Source
from data.files import digest, make_folder, sha256, write_atomically
from data.hub_probe import first_line, unreachable
from polargrad_dist.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
# Qwen2's own, with NFC before it: Transformers gives it to every tokenizer that lies beside a Qwen2 model.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LONG_WORD = re.compile(r"\S{1000}")


@dataclass(frozen=True)
class TokenizerInfo:
    """The description of a tokenizer in a prepared folder; `load` opens it."""

    name: str
    hash: str
    vocab_size: int
    end_of_text: int
    file: str | None = None
    """File name of the tokenizer's JSON beside the shards; None for tiktoken's, which are loaded by name."""

    def load(self, folder: Path | None = None) -> Tokenizer:
        """The tokenizer; ``folder`` is that of the shards."""
        if self.file is not None and folder is not None:
            return Tokenizer(_from_file(folder / self.file), self)
        return open_ready(self.name, self.end_of_text)

    def check(self, folder: Path) -> None:
        """Raises DataError if the tokenizer beside the shards is not the one that made them."""
        if self.file is not None and (found := sha256(folder / self.file)) != self.hash:
            raise DataError(
                f"{folder / self.file} is not the tokenizer that made the shards beside it: its sha256 is {found[:16]}…, "
                f"expected {self.hash[:16]}…: restore it, or delete the folder and prepare again"
            )


class Tokenizer:
    """Encodes batches without special tokens, decodes ids. Thread-safe: the work is outside Python."""

    def __init__(self, backend: Any, info: TokenizerInfo):
        self.backend, self.info = backend, info
        self._tiktoken = info.name.startswith("tiktoken:")

    def encode_batch(self, texts: Sequence[str], dtype: DTypeLike = np.uint32) -> list[np.ndarray]:
        """The ids of each text, without special tokens."""
        if self._tiktoken:
            return [np.array(self.backend.encode_ordinary(text), dtype) for text in texts]
        try:
            found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            # The Rust side raises nothing narrower
            raise DataError(
                f"the tokenizer {self.info.name!r} cannot encode some of this text ({first_line(error)}), expected one "
                "with an unknown token or with all bytes: add one to it, or choose another"
            ) from error
        return [np.array(encoding.ids, dtype) for encoding in found]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Those that the tokenizer lacks, such as a model's padding rows, are ignored."""
        ids = [int(i) for i in ids]
        if not self._tiktoken:
            return self.backend.decode(ids, skip_special_tokens=False)
        try:
            return self.backend.decode(ids)
        except KeyError:
            return self.backend.decode([i for i in ids if self._in_encoding(i)])

    def _in_encoding(self, token: int) -> bool:
        try:
            self.backend.decode_single_token_bytes(token)
        except KeyError:
            return False
        return True

    def json(self) -> str | None:
        """The tokenizer in the JSON format of `tokenizers`; None for tiktoken's."""
        return None if self._tiktoken else self.backend.to_str()


def open_tokenizer(config: TokenizerConfig, source: Source, cache: Path) -> Tokenizer:
    """The configured tokenizer; trains and caches a BPE if configured."""
    if config.name == "bpe":
        return _trained(config, source, cache)
    return open_ready(config.name, config.end_of_text)


def open_ready(name: str, end_of_text: int | str | None) -> Tokenizer:
    """A ready-made tokenizer by tiktoken name, folder or hub name. Raises DataError if it cannot be found."""
    if name.startswith("tiktoken:"):
        return _tiktoken(name, end_of_text)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ConfigError(
            f"data.tokenizer.name is {name!r}, which is a file, expected the folder of a {FILE}: set it to "
            f"{str(folder.parent)!r}"
        )
    if (folder / FILE).is_file():
        return _wrap(name, _from_file(folder / FILE), end_of_text, _declared_end(folder))
    fast = _auto(name, str(folder) if folder.is_dir() else name)
    return _wrap(name, fast.backend_tokenizer, end_of_text, fast.eos_token)


def _declared_end(folder: Path) -> str | None:
    """The end-of-sequence token in a tokenizer's folder."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
        return token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as a tokenizer's configuration ({type(error).__name__}: {first_line(error)}): restore "
            "it, or set data.tokenizer.end_of_text and delete the file"
        ) from error


def _auto(name: str, place: str) -> Any:
    """AutoTokenizer from this machine, else from the hub, if a quick probe reaches it: retries take minutes."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            f"the tokenizer {name!r} needs the package transformers, which is not installed: pip install '.[train]'"
        ) from error
    try:
        try:
            fast = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except OSError as error:
            local = place != name or name.startswith((".", "/", "~"))
            reason = first_line(error) if local else unreachable(f"api/models/{name}")
            if local and not Path(place).expanduser().exists():
                reason = "there is no such folder"
            if reason is not None:
                raise DataError(_cannot(name, reason)) from error
            fast = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_cannot(name, f"{type(error).__name__}: {first_line(error)}")) from error
    if not fast.is_fast:
        raise DataError(_cannot(name, "it has no fast form, a tokenizer.json"))
    return fast


def _cannot(name: str, reason: str) -> str:
    return (
        f"the tokenizer {name!r} cannot be loaded ({reason}): set data.tokenizer.name to a local folder with "
        "tokenizer.json, to tiktoken:NAME, or to bpe to train one on the corpus"
    )


def _tiktoken(name: str, end_of_text: int | str | None) -> Tokenizer:
    try:
        import tiktoken

        backend = tiktoken.get_encoding(name.removeprefix("tiktoken:"))
    except ImportError as error:
        raise DataError(
            f"{name} needs the package tiktoken, which is not installed: pip install '.[train]'"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer.name is {name!r}, which tiktoken does not know: {error}".split("\n")[0]
        ) from error
    except Exception as error:
        raise DataError(
            f"tiktoken could not fetch the files of {name} ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder "
            "that has them, or data.tokenizer.name to a local tokenizer folder"
        ) from error
    token = END_OF_TEXT if end_of_text is None else end_of_text
    try:
        marker = token if isinstance(token, int) else backend.encode_single_token(token)
    except KeyError:
        marker = -1
    if not 0 <= marker < backend.n_vocab:
        raise ConfigError(
            f"data.tokenizer.end_of_text is {token!r}, which the tokenizer {name!r} does not have: set it to the token "
            "that separates documents"
        )
    content = hashlib.sha256(f"{name} {backend.n_vocab}\n".encode())
    # Sorted
    for entry in backend.token_byte_values():
        content.update(b"%d %s\n" % (backend.encode_single_token(entry), entry))
    return Tokenizer(backend, TokenizerInfo(name, content.hexdigest(), backend.n_vocab, marker))


def _wrap(name: str, backend: Any, end_of_text: int | str | None, default: str | None = None) -> Tokenizer:
    backend.no_padding()
    backend.no_truncation()
    # "<|endoftext|>" inside a document is text
    backend.encode_special_tokens = True
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not size:
        raise DataError(
            f"the tokenizer {name!r} has an empty vocabulary, expected a trained one: choose another"
        )
    marker = end_of_text
    if marker is None:
        marker = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else default
    number = backend.token_to_id(marker) if isinstance(marker, str) else marker
    if number is None or not 0 <= number < size:
        raise ConfigError(
            f"data.tokenizer.end_of_text is {marker!r}, which the tokenizer {name!r} does not have: set it to the token "
            "that separates documents"
        )
    text = backend.to_str()
    return Tokenizer(
        backend,
        TokenizerInfo(name, hashlib.sha256(text.encode()).hexdigest(), size, number, FILE),
    )


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        # The Rust side raises nothing narrower
        raise DataError(
            f"{path} cannot be read as a tokenizer ({first_line(error)}), expected a tokenizer.json"
        ) from error
    backend.encode_special_tokens = True
    return backend


def _trained(config: TokenizerConfig, source: Source, cache: Path) -> Tokenizer:
    """A byte-level BPE trained on the beginning of the corpus, or from the cache if it was trained before."""
    if config.vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size}, expected at least 257, the least for a byte-level BPE"
        )
    if config.train_bytes < 1:
        raise ConfigError(f"data.tokenizer.train_bytes is {config.train_bytes}, expected a whole number >= 1")
    key = digest([source.identity(), config.vocab_size, config.train_bytes, "bpe 2"])[:16]
    make_folder(cache)
    path = cache / f"bpe-{key}.json"
    if not path.exists():
        write_atomically(path, _train(config, source).encode())
    marker = END_OF_TEXT if config.end_of_text is None else config.end_of_text
    return _wrap("bpe", _from_file(path), marker)


def _train(config: TokenizerConfig, source: Source) -> str:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_text(source, config.train_bytes), trainer)
    return backend.to_str()


def _without_long_words(text: str) -> Iterator[str]:
    """The text, with words cut after 1,000 characters: learning merges takes time quadratic in a word's length."""
    start = 0
    for word in _LONG_WORD.finditer(text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def _training_text(source: Source, limit: int) -> Iterator[str]:
    seen = 0
    for part in source.documents():
        if part.validation:
            continue
        yield from _without_long_words(part.text)
        seen += part.size
        if seen >= limit:
            return
