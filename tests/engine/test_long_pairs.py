"""Pairs of thousands of tokens: memory grows with the tokens, not with their square."""

from __future__ import annotations

import sys

import pytest
from shared.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from long_pairs import measure


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_memory_grows_with_the_tokens(lora):
    two, four, eight = (found["bytes"] for found in measure([2048, 4096, 8192], lora, checkpointing=True))
    # Twice the tokens add twice as much; squares would add four times.
    assert eight - four < 2.8 * (four - two)
    assert eight < 4 * two
