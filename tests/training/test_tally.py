"""What is counted: between two lines of the log, over the micro-batches of a step, and of a step that is not taken."""

from __future__ import annotations

import copy

import pytest
import torch

from utils.training.batches import ROWS, TOKENS
from utils.training.tally import COUNTS, StepTally


def micro_batch(tally: StepTally, rows: list[int], losses: list[float]) -> None:
    """Counts as training does: pairs of 10 tokens each, filled up to 16."""
    tally.note_tokens(10 * len(rows), 16 * len(rows))
    tally.note_rows({ROWS: rows, TOKENS: 10 * len(rows)}, torch.tensor(losses))
    tally.add({"loss": torch.tensor(losses).sum()}, len(rows))


@pytest.fixture
def tally() -> StepTally:
    return StepTally("pairs", torch.device("cpu"))


def test_a_line_has_means_over_its_items_and_the_tokens_of_its_seconds(tally):
    micro_batch(tally, [0, 1, 2], [1.0, 2.0, 3.0])
    micro_batch(tally, [3], [6.0])
    assert tally.finish_line(2.0) == {"loss": 3.0, "pairs": 4, "tokens_per_second": 40 / 2}
    micro_batch(tally, [4], [7.0])
    assert tally.finish_line(2.5) == {"loss": 7.0, "pairs": 1, "tokens_per_second": 10 / 0.5}
    assert (tally.tokens_seen, *tally.tokens_of_all()) == (50, 50, 80)
    micro_batch(tally, [5], [8.0])
    assert tally.seen_so_far(processes=2) == 50 + 2 * 10, "before the line is counted over all"
    assert tally.finish_line(2.5)["tokens_per_second"] == 0, "of a clock that did not move"
    assert tally.seen_so_far(processes=2) == 60


def test_a_step_that_is_begun_anew_counts_once(tally):
    micro_batch(tally, [0], [1.0])
    before = tally.read()
    found = copy.deepcopy({name: getattr(tally, name) for name in vars(tally)})
    micro_batch(tally, [1, 2], [2.0, 3.0])
    changed = {name for name, value in vars(tally).items() if str(value) != str(found[name])}
    assert changed == set(COUNTS), "all that a micro-batch counts"
    tally.write(before)
    assert str(vars(tally)) == str(found)
    micro_batch(tally, [1], [2.0])
    tally.write(before)
    assert str(vars(tally)) == str(found), "and once more"


def test_a_step_that_is_left_out_is_not_in_the_line(tally):
    logged = torch.tensor(5.0)
    micro_batch(tally, [0], [1.0])
    tally.begin_step(logged)
    micro_batch(tally, [1], [torch.nan])
    logged += torch.nan
    tally.take_back_step(logged)
    assert (logged.item(), tally.finish_line(1.0)["loss"]) == (5.0, 1.0)
