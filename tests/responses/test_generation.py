"""Responses of a model: each drawn with random numbers of its own, whatever stands beside it, and as the model says."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from shared.pairs import make_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from utils.responses import generation
from utils.responses.drawing import draw_numbers, pick_tokens
from utils.responses.generation import find_fitting, kl_estimate, sample_continuations, stream_continuation
from utils.settings.verbs import SamplingSettings

WAYS = {
    "greedy": SamplingSettings(max_new_tokens=20, temperature=0),
    "sampled": SamplingSettings(max_new_tokens=20),
    "narrowed": SamplingSettings(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3),
    "greedy with a penalty": SamplingSettings(max_new_tokens=20, temperature=0, repetition_penalty=1.5),
}


@pytest.fixture(scope="module")
def model(tiny_model):
    """Random weights, large enough that it is sure of something now and then."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Of all lengths, some twice."""
    texts = [pair["prompt"] + pair["chosen"] * (index % 4) for index, pair in enumerate(make_pairs(12))]
    return [*texts, texts[3], texts[0], texts[3]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, prompts, way, pad):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad  # many models pad with the token that ends a text
    together = sample_continuations(model, tokenizer, prompts, WAYS[way], seed=5)
    twos = sample_continuations(model, tokenizer, prompts, WAYS[way], seed=5, batch_size=2)
    alone = [sample_continuations(model, tokenizer, [prompt], WAYS[way], seed=5)[0] for prompt in prompts[:12]]
    assert together == twos
    assert together[:12] == alone
    copies = sample_continuations(model, tokenizer, [prompts[3]] * 3, WAYS[way], seed=5)
    assert [together[3], together[12], together[14]] == copies
    assert len({row.text for row in copies}) == (1 if WAYS[way].temperature == 0 else 3)
    assert {row.ended for row in together} <= {True, False}
    assert max(len(row.ids) for row in together) == 20


def test_the_seed_decides_and_a_longer_text_begins_with_the_shorter(model, tokenizer, prompts):
    sampling = SamplingSettings(max_new_tokens=8)
    first = sample_continuations(model, tokenizer, prompts, sampling, seed=1)
    torch.manual_seed(99)
    assert sample_continuations(model, tokenizer, prompts, sampling, seed=1) == first
    assert sample_continuations(model, tokenizer, prompts, sampling, seed=2) != first
    longer = sample_continuations(model, tokenizer, prompts, SamplingSettings(max_new_tokens=16), seed=1)
    assert all(long.ids[: len(short.ids)] == short.ids for long, short in zip(longer, first, strict=True))


def test_every_prompt_and_every_copy_has_numbers_of_its_own():
    keys = itertools.product([1, 2], ["a", "b", [{"role": "user", "content": "a"}]], [0, 1])
    draws = np.array([draw_numbers(*key, 500) for key in keys])
    assert len(np.unique(draws)) == draws.size
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 0.01
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.2


def test_tokens_are_picked_as_often_as_the_distribution_says():
    distribution = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.15, 0.1, 0.05, 0.0], dtype=torch.float64)
    draws = torch.tensor(np.concatenate([draw_numbers(3, "p", number, 100) for number in range(200)]))
    picked = pick_tokens(distribution.expand(len(draws), -1), draws).flatten()
    counts = torch.bincount(picked, minlength=8).numpy()
    likely = distribution.numpy() > 0
    assert counts[~likely].sum() == 0
    assert stats.chisquare(counts[likely], distribution.numpy()[likely] * len(draws)).pvalue > 0.01


def test_no_number_picks_a_token_without_probability():
    distribution = torch.tensor([[0.0, 0.3, 0.7, 0.0]], dtype=torch.float64).expand(3, -1)
    draws = torch.tensor([0.0, 0.3, 1 - 2.0**-53], dtype=torch.float64)
    assert pick_tokens(distribution, draws).flatten().tolist() == [1, 2, 2]
    uneven = torch.full((1, 7), 1 / 3, dtype=torch.float64)  # a sum that rounds
    uneven[0, -2:] = 0
    assert pick_tokens(uneven, draws[2:]).item() == 4


def test_first_tokens_follow_the_distribution_of_the_model(model, tokenizer):
    prompt, count = "On day 3 we went to the cafe and it was", 4000
    sampling = SamplingSettings(max_new_tokens=1, temperature=0.8, top_k=6)
    written = sample_continuations(model, tokenizer, [prompt] * count, sampling, seed=0, batch_size=1000)
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double()
    values, tokens = logits.topk(6)
    expected = torch.softmax(values / 0.8, dim=-1) * count
    counts = [sum((row.ids or [row.end])[0] == token for row in written) for token in tokens.tolist()]
    assert sum(counts) == count
    assert stats.chisquare(counts, expected.numpy()).pvalue > 0.01


def test_what_the_model_asks_for_by_itself_is_left_out_and_put_back(model, tokenizer, prompts):
    sampling = SamplingSettings(max_new_tokens=10)
    plain = sample_continuations(model, tokenizer, prompts, sampling, seed=1)
    own = copy.deepcopy(model.generation_config)
    own.update(repetition_penalty=9.0, num_beams=3, min_new_tokens=9, suppress_tokens=list(range(3, 200)), top_k=1)
    model.generation_config, former = own, model.generation_config
    try:
        assert sample_continuations(model, tokenizer, prompts, sampling, seed=1) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = former


def test_a_response_ends_at_any_of_its_end_tokens(model, tokenizer, prompts):
    sampling = SamplingSettings(max_new_tokens=20)
    free = sample_continuations(model, tokenizer, prompts, sampling, seed=1)
    end = free[0].ids[3]
    bound = sample_continuations(model, tokenizer, prompts, sampling, seed=1, end_ids=[end])
    assert (bound[0].ids, bound[0].end, bound[0].ended) == (free[0].ids[: free[0].ids.index(end)], end, True)
    assert all(row.ids == was.ids[: len(row.ids)] and end not in row.ids for row, was in zip(bound, free, strict=True))
    assert kl_estimate(model, model, tokenizer, prompts, bound) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too many"), MemoryError(), RuntimeError("std::bad_alloc")])
def test_a_batch_that_memory_cannot_hold_is_parted(model, tokenizer, prompts, monkeypatch, error):
    whole, asked = generation._generate, []

    def small(model, encoder, rows, *others, **more):
        asked.append(len(rows))
        if len(rows) > 4:
            raise error
        return whole(model, encoder, rows, *others, **more)

    sampling = SamplingSettings(max_new_tokens=4)
    expected = sample_continuations(model, tokenizer, prompts, sampling, seed=1)
    monkeypatch.setattr(generation, "_generate", small)
    assert sample_continuations(model, tokenizer, prompts, sampling, seed=1) == expected
    assert asked == [15, 7, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_grows_into_the_same_text_by_whole_characters(model, tokenizer, prompts, way):
    expected = sample_continuations(model, tokenizer, prompts[:4], WAYS[way], seed=5)
    for prompt, last in zip(prompts[:4], expected, strict=True):
        *grown, final = stream_continuation(model, tokenizer, prompt, WAYS[way], seed=5)
        assert final == last
        for before, after in itertools.pairwise([*grown, final]):
            assert after.text.startswith(before.text)
        assert not any(row.text.endswith("\ufffd") for row in grown)
        assert len(grown) > 2


def test_a_stream_that_is_closed_stops_the_model_and_a_failure_is_raised(model, tokenizer, monkeypatch):
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    stream = stream_continuation(model, tokenizer, "On day 3", SamplingSettings(max_new_tokens=100), seed=2)
    next(stream)
    stream.close()
    hook.remove()
    assert len(steps) < 100

    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="no more"):
        list(stream_continuation(model, tokenizer, "On day 3", SamplingSettings(), seed=2))


def test_a_text_keeps_the_space_that_a_tokenizer_leaves_out_at_its_beginning(model):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "\u2581a"])}
    words |= {f"\u2581word{number}": number for number in range(4, model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    (written,) = sample_continuations(model, tokenizer, ["a word7"], SamplingSettings(max_new_tokens=4), seed=0)
    assert tokenizer.decode(written.ids).startswith("word")
    assert written.text.startswith(" word")


def test_prompts_without_room_are_found_before(tokenizer):
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("On day", "On day 3 we went")]
    assert find_fitting(tokenizer, ["On day", "On day 3 we went"], 10, lengths[0] + 10) == [True, False]
    assert find_fitting(tokenizer, ["On day", "On day 3 we went"], 10, None) == [True, True]
