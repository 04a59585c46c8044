"""A run's weights for other programs: `python -m tools.export RUN_DIR OUT`.

A Qwen2.5-style model becomes an ordinary Qwen2 checkpoint with its tokenizer, which Transformers loads; a GPT-2 one, whose
architecture no other library has, becomes a safetensors file under its own parameter names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.qwen import QwenModel
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.cli import run
from tools.runs import load_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Export the weights of a run.")
    parser.add_argument("run_dir", help="the run's directory")
    parser.add_argument("out", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to load; default: the newest valid one"
    )
    options = parser.parse_args()
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty, expected a new or an empty folder: choose another")
    opened = load_run(options.run_dir, step=options.step)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}): choose another folder") from error
    if isinstance(opened.model, QwenModel):
        opened.model.save_pretrained(out)
    else:
        from safetensors.torch import save_model

        save_model(opened.model, str(out / "model.safetensors"))
    text = opened.data.load_tokenizer().json() if opened.data.tokenizer else None
    if text is not None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(text)
        assert opened.data.end_of_text is not None
        marker = tokenizer.id_to_token(opened.data.end_of_text)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=marker).save_pretrained(out)
    print(f"step {opened.step} of {opened.folder} is in {out}")
    return 0


if __name__ == "__main__":
    run(main)
