"""Sampling: the cache gives the text of the path without it, and temperature, top-k and top-p keep what they say."""

import pytest
import torch

from models.sampling import choose
from tests.models.tiny import ALL, awake, tiny


@pytest.mark.parametrize("architecture", ALL)
def test_cached_logits_are_those_of_the_whole_sequence(architecture):
    model = awake(tiny(architecture)).eval()
    tokens = torch.randint(0, 95, (2, 300))
    # Documents end
    tokens[0, 140] = tokens[1, 20] = 95
    # Windows of one and two blocks
    progress = 0.03
    with torch.no_grad():
        whole = model(tokens, progress=progress)
        cache = model.make_cache()
        for start, stop in ((0, 100), (100, 101), (101, 141), (141, 299), (299, 300)):
            found = model(tokens[:, start:stop], progress=progress, cache=cache)
            assert found.shape[1] == 1
            torch.testing.assert_close(found[:, 0], whole[:, stop - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ALL)
def test_text_is_the_same_with_and_without_a_cache_and_beyond_the_longest_sequence(architecture):
    model = awake(tiny(architecture, max_sequence_length=40)).eval()
    start = torch.randint(0, 95, (2, 30))
    texts = [
        model.generate(start, 25, top_p=0.9, cached=cached, generator=torch.Generator().manual_seed(1))
        for cached in (True, False)
    ]
    assert texts[0].shape == (2, 55)
    assert torch.equal(*texts)


def test_a_token_is_yielded_as_soon_as_it_is_sampled():
    model = awake(tiny("gpt2-small")).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for count, token in enumerate(model.stream(torch.zeros(1, 3, dtype=torch.int64), 4), 1):
        assert token.shape == (1, 1)
        assert len(calls) == count


def test_compiled_blocks_sample_without_compiling():
    from torch._dynamo.utils import counters

    model = awake(tiny("gpt2-small")).eval()
    expected = model.generate(torch.ones(1, 3, dtype=torch.int64), 5, temperature=0)
    torch._dynamo.reset()
    counters.clear()
    model.compile_blocks(backend="eager")
    assert torch.equal(model.generate(torch.ones(1, 3, dtype=torch.int64), 5, temperature=0), expected)
    assert counters["stats"]["unique_graphs"] == 0


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    drawn = choose(logits.expand(20_000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn[:, 0], minlength=logits.shape[-1]) / 20_000


def test_temperature_top_k_and_top_p_draw_from_what_they_leave():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = probabilities.log()
    torch.testing.assert_close(frequencies(logits), probabilities[0], atol=0.02, rtol=0)
    squared = probabilities[0] ** 2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), squared, atol=0.02, rtol=0)
    two = torch.tensor([0.625, 0.375, 0.0, 0.0])
    torch.testing.assert_close(frequencies(logits, top_k=2), two, atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_p=0.79), two, atol=0.02, rtol=0)
    three = frequencies(logits, top_p=0.81)
    assert three[2] > 0
    assert three[3] == 0
    assert frequencies(logits, top_p=0.01)[0] == 1
    assert choose(logits, temperature=0).item() == 0
    torch.testing.assert_close(frequencies(logits, top_k=9, top_p=1.0), probabilities[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 2.0], [0.5, 0.25, -4.0, 0.0]])
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert choose(logits, temperature=temperature, **options).tolist() == [[1], [0]]
