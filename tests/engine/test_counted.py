"""Results of tools within a reply: attended to, and counted nowhere, in every layout of a batch."""

from __future__ import annotations

import pytest
import torch
from shared.layouts import assert_same, build, gradients, one_by_one, packed, padded, random_pairs

from utils.engine.completions import CompletionScorer
from utils.engine.counted import count_tokens, has_uncounted, plain_ids, uncount
from utils.engine.last_layer import leave_out_prompts
from utils.engine.scoring import score_tokens
from utils.engine.shared_prefix import shared_prefix_active
from utils.training.batches import examples_of
from utils.training.sft import CompletionCollator, completion_mask

NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")


def pairs_with_results() -> list[dict[str, list[int]]]:
    """Pairs of which some completions hold results: one, two, and none."""
    pairs = random_pairs()
    for pair, side, places in ((0, "chosen_ids", (0, 1, 2)), (3, "chosen_ids", (2, 3, 6)), (3, "rejected_ids", (0, 9))):
        for place in places:
            pairs[pair][side][place] = uncount(pairs[pair][side][place])
    return pairs


def plain(pairs):
    return [{name: plain_ids(pair[name]) for name in NAMES} for pair in pairs]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_they_are_attended_to_and_what_counts_is_scored_as_one_text_at_a_time(name):
    model, pairs = build(name), pairs_with_results()
    counted = [torch.tensor([token >= 0 for token in pair[side]]) for side in NAMES[1:] for pair in pairs]
    expected = [row[own] for row, own in zip(one_by_one(model, plain(pairs)), counted, strict=True)]
    expected_gradients = gradients(model, expected)
    leave_out_prompts(model)
    for batch, active in ((padded(pairs), False), (packed(pairs), True)):
        with shared_prefix_active(model) if active else torch.enable_grad():
            scores = score_tokens(model, batch)
            found = [row[mask.bool()] for row, mask in zip(scores.log_probs, scores.mask, strict=True)]
            assert_same(expected, found, expected_gradients, gradients(model, found))


def test_lengths_sums_and_ends_are_those_of_what_counts_in_both_layouts():
    model, pairs = build("llama"), pairs_with_results()
    end = pairs[0]["chosen_ids"][-1]
    scorer = CompletionScorer({end}, ld_alpha=0.5, weighs=True)
    alone = scorer.score(model, padded(pairs))
    with shared_prefix_active(model):
        together = scorer.score(model, packed(pairs))
    lengths = [count_tokens(pair[side]) for side in NAMES[1:] for pair in pairs]
    assert alone.length.tolist() == together.length.tolist() == lengths
    assert alone.ended.tolist() == together.ended.tolist() == [pair[s][-1] == end for s in NAMES[1:] for pair in pairs]
    for name in ("summed", "mean_negative", "end_prob", "weight"):
        one, other = getattr(alone, name), getattr(together, name)
        assert torch.allclose(one, other, atol=5e-6, equal_nan=True), name


def test_a_batch_gives_back_the_pairs_that_it_was_made_of():
    pairs = pairs_with_results()
    for batch in (padded(pairs), packed(pairs)):
        assert examples_of(batch) == pairs


def test_imitation_learns_what_counts():
    ids = [5, 6, uncount(7), uncount(8), 9]
    batch = CompletionCollator(0)([{"prompt_ids": [3, 4], "completion_ids": ids}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9]]
    assert completion_mask(batch).tolist() == [[0, 0, 1, 1, 0, 0, 1]]


def test_ids_and_marks_are_told_apart_for_every_id():
    for token in (0, 1, 151_642):
        assert (uncount(token) < 0, plain_ids([uncount(token), token])) == (True, [token, token])
    assert (has_uncounted([]), has_uncounted([0]), has_uncounted([0, -1])) == (False, False, True)
    assert count_tokens([0, -1, 2]) == 2
