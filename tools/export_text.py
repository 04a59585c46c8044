"""The files beside exported weights: the model card, and a tokenizer that is verified to be the run's."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from data.kept import Kept
from data.tokenizers import Tokenizer
from models import LanguageModel
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.checkpoint.single import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Where tokenizers differ: contractions, digits, runs of spaces, line ends, scripts, composed and decomposed characters.
SAMPLE = (
    "It's 1234567 o'clock, I'LL say: we've 3.14159 reasons -- and \"don't\" panic!\n\n\n"
    "\tdef f(x):\r\n        return x**2  # no\n"
    "naïve café Ångström " + unicodedata.normalize("NFD", "naïve café Ångström") + " Straße ǅ ﬁ\n"
    "日本語のテキスト、한국어 텍스트, русский текст, नमस्ते दुनिया, مرحبا 🙂👩‍👩‍👧\n   \n  end  "
)


def add_tokenizer(known: Kept, out: Path, *, apart: bool, trust: bool) -> None:
    """Writes the run's tokenizer into ``out``, or apart from the model into ``out/tokenizer``, and verifies it.

    Raises ``ConfigError`` if AutoTokenizer, loading the result, gives other ids for `SAMPLE`. A run on shards without a
    tokenizer exports none.
    """
    if known.info is None:
        return
    tokenizer = known.load()
    folder = out / "tokenizer" if apart else out
    fast_tokenizer(tokenizer).save_pretrained(folder)
    # tokenizer_config.json says the same
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    _plain_class(folder / "tokenizer_config.json")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    for line in [SAMPLE, *SAMPLE.splitlines(keepends=True)]:
        ours, theirs = tokenizer.encode(line), loaded.encode(line, add_special_tokens=False)
        if ours != theirs:
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise ConfigError(
                f"AutoTokenizer gives {line[:40]!r} other ids ({theirs[:8]}…) than the run's tokenizer ({ours[:8]}…): beside "
                "this model it takes the model's own form of tokenizer; export with --tokenizer apart, and load it from "
                f"{out / 'tokenizer'}"
            )


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The run's tokenizer as a Transformers tokenizer; end-of-text is its only special token."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.json()
    backend = _from_tiktoken(tokenizer) if text is None else Backend.from_str(text)
    marker = backend.id_to_token(tokenizer.info.end_of_text)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=marker, pad_token=marker)


def _from_tiktoken(tokenizer: Tokenizer) -> Any:
    """A tiktoken encoding in the format of `tokenizers`, by Transformers' own converter."""
    import tempfile

    from tokenizers import Tokenizer as Backend
    from transformers.integrations.tiktoken import convert_tiktoken_to_fast

    with tempfile.TemporaryDirectory() as folder:
        convert_tiktoken_to_fast(tokenizer.backend, folder)
        return Backend.from_file(str(Path(folder) / "tokenizer.json"))


def _plain_class(path: Path) -> None:
    """Names the class that every version of Transformers knows: only 5 has a TokenizersBackend."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(
    checkpoint: Checkpoint,
    model: LanguageModel,
    known: Kept,
    kind: torch.dtype,
    tokenizer: str = "beside",
) -> str:
    """The README.md of an export: model, data, training so far, and how to load it.

    tokenizer: where it is, as in `tools.export`: beside, apart or none.
    """
    manifest = checkpoint.manifest
    configuration = manifest.configuration
    trainer, data = configuration.get("trainer", {}), configuration.get("data", {})
    tokens = checkpoint.step * trainer.get("global_batch", 0) * trainer.get("sequence_length", 0)
    count = sum(p.numel() for p in model.parameters())
    loss = (
        "not measured"
        if manifest.validation_loss is None
        else f"{manifest.validation_loss:.4f} nats per token"
    )
    if checkpoint.last and replace(checkpoint, last=False).averaged:
        # It is that of the average
        loss = "not measured for these weights"
    trust = ", trust_remote_code=True" if model.hub_code else ""
    facts = {
        "parameters": f"{count:,}",
        "architecture": model.hub_config(checkpoint.progress)["architectures"][0],
        "dtype": str(kind).removeprefix("torch."),
        "steps": f"{checkpoint.step:,} of {trainer.get('steps', 0):,}",
        "training tokens": f"{tokens:,}",
        "sequence length": f"{trainer.get('sequence_length')}",
        "validation loss at this step": loss,
        "tokenizer": _tokenizer_fact(known, tokenizer),
        "run": str(manifest.run or "unknown"),
        "saved": manifest.saved_at,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust})',
    ]
    if known.info is None or tokenizer == "none":
        lines[0] = "from transformers import AutoModelForCausalLM"
    elif tokenizer == "apart":
        lines.append('tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER/tokenizer")')
    else:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})')
    code = "\n".join(lines)
    shown = yaml.safe_dump({"data": data, "optimizer": configuration.get("optimizer", {})}, sort_keys=False)
    header = "library_name: transformers\npipeline_tag: text-generation\ntags: [polargrad-dist]"
    return f"""---
{header}
---

# {Path(trainer.get("run_dir", "run")).name}, step {checkpoint.step}

A causal language model pre-trained with polargrad-dist.

| | |
| --- | --- |
{table}

```python
{code}
```

In training every document begins with the end-of-text token; a prompt may begin with it too.

## Configuration

```yaml
{shown}```
"""


def _tokenizer_fact(known: Kept, where: str) -> str:
    if known.info is None:
        return "none"
    away = " (not exported)" if where == "none" else ""
    return f"{known.info.name}, {known.info.vocab_size:,} entries{away}"
