"""A checkpoint measured three ways: by this project, by the LM evaluation harness, and during training."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from polargrad_dist.trainer.choices import Question, encode_pair, read_questions, score
from tests.commandline import torchrun, train
from tools.evaluate import main
from tools.export import export
from tools.runs import load_run

WORDS = "import module value function return class object string number print the of and with for".split()  # noqa: SIM905


def measured(*args: object) -> None:
    """`python -m tools.evaluate ARGS` in this process."""
    assert main([str(arg) for arg in args]) == 0


def questions(path: Path, count: int = 14) -> Path:
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        context = " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))
        endings = [" ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(4)]
        record = {
            "activity_label": "Work",
            "ctx_a": context + ".",
            "ctx_b": "then [title] it",
            "endings": endings,
        }
        lines.append(json.dumps(record | {"label": rng.randrange(4)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tasks(folder: Path, text: Path, swag: Path) -> Path:
    """Two tasks in the harness's own form, on local files: perplexity of text, and HellaSwag."""
    folder.mkdir()
    (folder / "page.yaml").write_text(f"""
task: page
dataset_path: json
dataset_kwargs: {{data_files: {{test: {text}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
""")
    (folder / "utils.py").write_text("""
import re


def preprocess(text):
    text = re.sub("\\\\[.*?\\\\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def process_docs(dataset):
    def one(doc):
        ctx = doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
        query = preprocess(doc["activity_label"] + ": " + ctx)
        return {"query": query, "choices": [preprocess(e) for e in doc["endings"]], "gold": int(doc["label"])}

    return dataset.map(one)
""")
    (folder / "swag.yaml").write_text(f"""
task: swag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {swag}}}}}
validation_split: validation
output_type: multiple_choice
process_docs: !function utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory, trained):
    """A page of text that fills whole windows of 128 tokens, questions, and tasks over both."""
    folder = tmp_path_factory.mktemp("material")
    from pydoc_data.topics import topics

    tokenizer = load_run(trained("qwen2.5")).tokenizer
    text = topics["class"]
    while len(tokenizer.encode(text)) % 128:
        text = text[:-1]
    assert len(text) > 500
    (folder / "page.txt").write_text(text)
    (folder / "page.jsonl").write_text(json.dumps({"text": text}) + "\n")
    swag = questions(folder / "swag.jsonl")
    return folder, tasks(folder / "tasks", folder / "page.jsonl", swag)


@pytest.mark.parametrize("architecture", ["qwen2.5", "gpt2-small"])
def test_the_harness_finds_the_same_bits_per_byte_and_answers_on_run_and_export(
    tmp_path, trained, material, architecture, monkeypatch, capsys
):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder, include = material
    run = trained(architecture)
    (tmp_path / "out").mkdir()
    export(find_checkpoint(run), tmp_path / "out")
    text = f"page={folder / 'page.txt'}"
    figures = tmp_path / "figures.json"
    common = ("--tasks", "page,swag", "--include", include, "--device", "cpu")
    own = (
        "--text",
        text,
        "--sequence_length",
        "128",
        "--cache",
        tmp_path / "cache",
        "--hellaswag",
        folder / "swag.jsonl",
    )
    measured(run, *common, *own, "--json", figures)
    found = json.loads(figures.read_text())
    assert "bits_per_byte" in capsys.readouterr().out
    theirs, ours = found["tasks"]["page"]["bits_per_byte"], found["validation"]["page"]["bits_per_byte"]
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert {k: found["hellaswag"][k] for k in ("acc", "acc_norm")} == pytest.approx(
        {k: found["tasks"]["swag"][k] for k in ("acc", "acc_norm")}
    )
    measured(tmp_path / "out", *common, "--trust_remote_code", "--json", figures)
    exported = json.loads(figures.read_text())["tasks"]
    assert exported["page"]["bits_per_byte"] == pytest.approx(ours, rel=1e-4)
    assert exported["swag"]["acc_norm"] == found["tasks"]["swag"]["acc_norm"]


def test_the_runs_own_validation_set_gives_the_loss_that_training_logged(tmp_path, trained):
    run = trained("gpt2-medium")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = [record for record in records if "validation_loss" in record][-1]
    measured(run, "--json", tmp_path / "f.json", "--batch_size", "3")
    found = json.loads((tmp_path / "f.json").read_text())["validation"]["validation"]
    assert found["loss"] == pytest.approx(logged["validation_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)


def test_mistakes_are_one_sentence(tmp_path, trained, material):
    run, (folder, include) = trained("qwen2.5"), material
    for args, expected in (
        (("--text", "page.txt"), "expected NAME=PATH"),
        (("--tasks", "no_such_task"), "which lm-eval does not know"),
        (("--hellaswag", folder / "page.jsonl"), "line 1 is not a question"),
        (("--limit", "0"), "--limit is 0"),
        (("--include", include), "beside --tasks"),
        (("--sequence_length", "16"), "--sequence_length is 16, which is the length of --text alone"),
        (
            ("--text", f"a={folder}/page.txt", "--sequence_length", "4096"),
            "--sequence_length is 4096, but the run's",
        ),
        (("--text", f"a={folder}/page.txt", "--text", "a=b.txt"), "--text names two texts 'a'"),
        (("--json", tmp_path / "none" / "f.json"), "whose folder does not exist"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            measured(run, *args)


def test_hellaswag_in_the_loop_is_the_same_at_every_world_size_and_under_every_strategy(tmp_path, arguments):
    swag = questions(tmp_path / "swag.jsonl", 9)
    asked = ("--trainer.evaluation.hellaswag", str(swag), "--trainer.evaluation.hellaswag_every", "2")
    samples = (
        "--trainer.samples.every",
        "2",
        "--trainer.samples.prompts",
        '["The ", ""]',
        "--trainer.samples.tokens",
        "9",
    )
    scores, texts = {}, {}
    for name, world, strategy in (("one", 1, "ddp"), ("two", 2, "ddp"), ("sharded", 2, "fsdp")):
        args = arguments(
            tmp_path / name, *asked, *samples, "--trainer.strategy.name", strategy, "--model.layers", "2"
        )
        done = train(*args) if world == 1 else torchrun(world, *args)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        scores[name] = [record["hellaswag"] for record in records if "hellaswag" in record]
        texts[name] = [record["samples"] for record in records if "samples" in record]
    assert len(scores["one"]) == len(texts["one"]) == 2
    assert scores["one"][0]["questions"] == 9
    assert scores["two"] == scores["sharded"] == scores["one"]
    assert texts["one"][0][0]["prompt"] == "The "
    assert texts["sharded"][0] == texts["one"][0]
    assert load_run(tmp_path / "one").sample("", 5)
    assert torch.isfinite(torch.tensor(scores["one"][0]["acc_norm"]))


def test_questions_that_are_none_are_refused_with_their_line(tmp_path):
    good = json.dumps({"ctx": "a", "endings": ["b", "c"], "label": "1"})
    for bad, expected in (
        ("{", "line 2 is not a question"),
        (json.dumps({"ctx": "a", "endings": ["b"], "label": 1}), "label 1 of 1 endings"),
        (json.dumps({"ctx": "a", "label": 1}), "KeyError"),
    ):
        (tmp_path / "q.jsonl").write_text(f"{good}\n{bad}\n")
        assert read_questions(str(tmp_path / "q.jsonl"), 1)[0].label == 1
        with pytest.raises(ConfigError, match=expected):
            read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(str(tmp_path / "none"))


def test_spaces_between_context_and_ending_belong_to_the_ending(trained):
    tokenizer = load_run(trained("qwen2.5")).tokenizer
    start, end = encode_pair(tokenizer, "The value ", "of it")
    assert tokenizer.decode(start) == "The value"
    assert tokenizer.decode(end) == " of it"


class Letters:
    """A token per character, spaces only between words; 0 for end-of-text, if there is one."""

    def __init__(self, end_of_text: int | None = 0):
        self.info = SimpleNamespace(end_of_text=end_of_text)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text.replace(" ", "")]


def follows(tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model that expects each letter's successor, and b at the start."""
    wanted = torch.where(tokens == 0, 2, tokens + 1)
    return 20 * torch.nn.functional.one_hot(wanted, 40).float()


def test_an_empty_context_is_the_end_of_text_token_whatever_the_length_of_the_endings():
    asked = Question("", ("a", "b", "cz"), 1)
    assert score(follows, asked, Letters(), None) == (True, True)
    assert score(follows, Question("", ("a", "b", "cz"), 0), Letters(), None) == (False, False)
    # Without such a token only what follows a first one can be predicted
    assert score(follows, Question("", ("a", "bc", "cz"), 1), Letters(None), None) == (True, True)


def test_an_ending_without_a_token_of_its_own_is_never_the_likeliest():
    assert score(follows, Question("a", (" ", "z"), 1), Letters(), None) == (True, True)
    assert score(follows, Question("a", (" ", "z"), 0), Letters(), 8) == (False, False)
    assert score(follows, Question("", (" ", "b"), 1), Letters(None), None)[0] is False
