"""Exports as others see them: plain Transformers, its tokenizers, and torch's own checkpoint format."""

import contextlib
import json
import os
import resource
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.kept import keep, kept
from data.tokenizers import open_ready
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from tests.commandline import torchrun, train
from tests.tools.conftest import tool
from tools.export import _markers, export, export_dcp
from tools.export_text import add_tokenizer, model_card
from tools.runs import build, load_run

ARCHITECTURES = ["qwen2.5", "gpt2-small", "gpt2-medium", "gpt"]
PROSE = "It's 12345 tests; naïve café 日本語 text, def f(x):\n\n    return x  # 🙂\r\n\t'LL"


def opened(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_computes_the_logits_of_the_run_with_and_without_a_cache(
    tmp_path, trained, architecture
):
    export(find_checkpoint(trained(architecture)), out := tmp_path)
    run, model = load_run(trained(architecture)), opened(out)
    tokens = torch.randint(0, 399, (2, 120), generator=torch.Generator().manual_seed(0))
    tokens[0, 40] = run.known.end_of_text
    with torch.no_grad():
        ours = run.model(tokens, progress=run.checkpoint.progress)
        first = model(tokens[:, :70], use_cache=True)
        second = model(tokens[:, 70:], past_key_values=first.past_key_values)
        theirs = model(tokens).logits.float()
    assert ours.std() > 0
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], 1).float(), ours, rtol=1e-5, atol=1e-5
    )
    text = model.generate(tokens[:, :5], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(
        text, run.model.generate(tokens[:, :5], 20, temperature=0, progress=run.checkpoint.progress)
    )
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(modes.values()) == {0o666 & ~umask}
    assert json.loads((out / "generation_config.json").read_text())["use_cache"] is True
    card = (out / "README.md").read_text()
    assert "4 of 4" in card
    assert f"{sum(p.numel() for p in run.model.parameters()):,}" in card


@pytest.mark.parametrize("architecture", ["qwen2.5", "gpt2-small"])
def test_autotokenizer_gives_the_token_ids_of_the_run(tmp_path, trained, architecture, corpus):
    export(find_checkpoint(trained(architecture)), tmp_path)
    ours = load_run(trained(architecture)).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for text in [PROSE, *documents]:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token_id == ours.info.end_of_text
    assert theirs.decode(ours.encode(documents[0])) == documents[0]


def test_a_tokenizer_that_autotokenizer_would_change_is_refused_with_the_way_out(tmp_path, trained, corpus):
    """Transformers 5 gives what lies beside a Qwen2 model Qwen2's pre-tokenizer; GPT-2's, for one, has another."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator([corpus.read_text(), "12345 " * 50], trainer)
    (tmp_path / "mine").mkdir()
    backend.save(str(tmp_path / "mine" / "tokenizer.json"))
    tokenizer = open_ready(str(tmp_path / "mine"), None)
    keep(tmp_path, tokenizer, 0)
    out = tmp_path / "out"
    out.mkdir()
    load_run(trained("qwen2.5")).model.qwen.config.save_pretrained(out)
    with pytest.raises(ConfigError, match=r"other ids .* export with --tokenizer apart"):
        add_tokenizer(kept(tmp_path), out, apart=False, trust=False)
    assert not list(out.iterdir())
    add_tokenizer(kept(tmp_path), out, apart=True, trust=False)
    assert AutoTokenizer.from_pretrained(out / "tokenizer").encode(PROSE) == tokenizer.encode(PROSE)


def test_a_model_with_several_end_tokens_exports_one_beginning_and_one_padding_token(tmp_path, arguments):
    config = (
        "{model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 1, intermediate_size: 48, "
        "max_position_embeddings: 128, eos_token_id: [0, 5], bos_token_id: 3}"
    )
    model = ["--model.architecture", "transformers", "--model.config", config]
    options = arguments(tmp_path / "run", "--trainer.steps", "1")
    # The sizes are the configuration's
    sizes = options.index("--data.tokenizer.vocab_size")
    assert (done := train(*model, *options[sizes:])).returncode == 0, done.stderr
    (out := tmp_path / "out").mkdir()
    export(find_checkpoint(tmp_path / "run"), out)
    written = json.loads((out / "generation_config.json").read_text())
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, [0, 5], 0]
    text = opened(out).generate(torch.tensor([[3, 7]]), max_new_tokens=4, do_sample=False)
    assert text.shape[1] > 2


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, (0, 0, 0)),
        ({"bos_token_id": 3, "pad_token_id": 7}, (3, 0, 7)),
        ({"eos_token_id": []}, (None, [], None)),
    ],
)
def test_a_beginning_and_a_padding_token_that_are_not_stated_are_the_end_token(stated, expected):
    found = _markers({"eos_token_id": 0} | stated)
    assert tuple(found[f"{name}_token_id"] for name in ("bos", "eos", "pad")) == expected


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("beside", 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'),
        ("apart", 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER/tokenizer")'),
        ("none", None),
    ],
)
def test_the_model_card_loads_the_tokenizer_from_where_it_is(tmp_path, trained, where, line):
    checkpoint = find_checkpoint(trained("qwen2.5"))
    export(checkpoint, tmp_path, tokenizer=where)
    card = (tmp_path / "README.md").read_text()
    assert [found for found in card.splitlines() if found.startswith("tokenizer =")] == [line] * (
        line is not None
    )
    assert ("AutoTokenizer" in card) == (line is not None)
    if line is not None:
        AutoTokenizer.from_pretrained(line.split('"')[1].replace("THIS_FOLDER", str(tmp_path)))


def test_the_model_card_gives_no_loss_for_weights_that_were_not_validated(trained):
    checkpoint = find_checkpoint(trained("qwen2.5"))
    known = kept(checkpoint.run_dir)
    model = build(checkpoint, known, device="meta")
    tree = checkpoint.manifest.configuration
    averaging = tree | {"trainer": tree["trainer"] | {"average": {"start": 2, "weight": 0.5}}}
    averaged = replace(checkpoint, manifest=replace(checkpoint.manifest, configuration=averaging))
    for one, measured in (
        (averaged, True),
        (replace(averaged, last=True), False),
        (replace(checkpoint, last=True), True),
    ):
        card = model_card(one, model, known, torch.float32)
        assert ("not measured for these weights" in card) != measured
        assert (f"{checkpoint.manifest.validation_loss:.4f} nats" in card) == measured


def test_large_exports_are_sharded_and_types_can_be_chosen(tmp_path, trained):
    checkpoint = find_checkpoint(trained("qwen2.5"))
    export(checkpoint, tmp_path, dtype="bfloat16", shard_bytes=30_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert max(path.stat().st_size for path in files) < 40_000
    model = opened(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    weights = dict(load_run(trained("qwen2.5")).model.qwen.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name].bfloat16())


def test_a_dcp_export_loads_into_a_model_and_holds_the_optimizers_state(tmp_path, trained):
    import torch.distributed.checkpoint as dcp

    checkpoint = find_checkpoint(trained("gpt2-small"))
    export_dcp(checkpoint, tmp_path)
    run = load_run(trained("gpt2-small"))
    state = {"model": {name: torch.zeros_like(p) for name, p in run.model.state_dict().items()}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    for name, p in run.model.state_dict().items():
        assert torch.equal(state["model"][name], p)
    saved = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("optim.")} == {
        "optim." + name for name in checkpoint.names("optim/")
    }


def test_the_command_takes_a_run_or_a_checkpoint_and_refuses_what_it_cannot_do(tmp_path, trained):
    run = trained("gpt2-small")
    assert "step 4" in tool(
        "tools.export", run / "checkpoints" / "step-00000004", tmp_path / "a", "--format", "dcp"
    )
    for args, expected in (
        ((run, tmp_path / "a"), "is not empty"),
        ((tmp_path, tmp_path / "b"), "neither a run directory"),
        (
            (run, tmp_path / "b", "--step", "3"),
            "holds no checkpoint of step 3, expected one of 4: name one of them with --step",
        ),
        ((run, tmp_path / "b", "--format", "dcp", "--dtype", "bfloat16"), "--dtype is set with --format dcp"),
    ):
        assert expected in tool("tools.export", *args, code=2)


@pytest.mark.parametrize("form", ["transformers", "dcp"])
def test_an_export_to_a_full_disk_leaves_nothing(tmp_path, trained, form):
    run, out = trained("qwen2.5"), tmp_path / "out"
    with _files_of_at_most(2000):
        said = tool("tools.export", run, out, "--format", form, code=2)
    assert f"{out} cannot be written" in said
    assert not list(out.iterdir())


@contextlib.contextmanager
def _files_of_at_most(size: int):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_of_two_sharded_ranks_exports_on_one_process(tmp_path, arguments):
    run = tmp_path / "run"
    done = torchrun(2, *arguments(run, "--trainer.strategy.name", "fsdp", "--model.layers", "2"))
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "out").mkdir()
    export(find_checkpoint(run), tmp_path / "out")
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "out")(tokens).logits, load_run(run).model(tokens))


SCRIPT = """
import sys, numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, out = sys.argv[1:]
assert transformers.__version__.startswith("4.57"), transformers.__version__
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(100)[None]
with torch.no_grad():
    logits = model(ids).logits
    continued = model.generate(ids[:, 1:8], max_new_tokens=20, do_sample=False, eos_token_id=None)
numpy.savez(out, logits=logits.numpy(), ids=tokenizer.encode(text), continued=continued.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_4_57_gives_the_same_logits_ids_and_text(tmp_path, trained, architecture):
    """`make test-transformers4` makes the second environment and names its Python."""
    python = os.environ.get("POLARGRAD_TRANSFORMERS4")
    if python is None:
        pytest.skip("POLARGRAD_TRANSFORMERS4 names no Python with transformers 4.57")
    export(find_checkpoint(trained(architecture)), tmp_path)
    found = tmp_path.parent / f"{architecture}.npz"
    done = subprocess.run(
        [python, "-c", SCRIPT, tmp_path, PROSE, found],
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "HF_HOME": str(tmp_path.parent / "hf"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run, theirs = load_run(trained(architecture)), np.load(found)
    with torch.no_grad():
        ours = run.model(torch.arange(100)[None], progress=run.checkpoint.progress)
    np.testing.assert_allclose(theirs["logits"], ours.numpy(), rtol=1e-5, atol=1e-5)
    assert theirs["ids"].tolist() == run.tokenizer.encode(PROSE)
    text = run.model.generate(torch.arange(1, 8)[None], 20, temperature=0, progress=run.checkpoint.progress)
    assert theirs["continued"].tolist() == text.tolist()
