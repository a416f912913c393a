"""The two ways of multiplying hidden states with an output head on a CPU, side by side.

    python benchmarks/head.py

Takes them in turn and prints the quickest of each: the logits of a token side by side, as a linear layer makes them,
and the logits of a word side by side, as `utils/engine/head.py` does in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from run import describe_machine

SHAPES = [(16_000, 512), (49_152, 576), (151_936, 896)]  # words, width
TOKENS = (64, 128, 256)
TURNS = 15


def seconds(product: Callable[..., torch.Tensor], *factors: torch.Tensor) -> float:
    """Of one call."""
    begin = time.perf_counter()
    product(*factors)
    return time.perf_counter() - begin


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    print(describe_machine() + "\n")
    print("| words | width | tokens | by token, ms | by word, ms | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for words, width in SHAPES:
        head = torch.randn(words, width)
        for tokens in TOKENS:
            hidden = torch.randn(tokens, width)
            taken = [(seconds(F.linear, hidden, head), seconds(torch.matmul, head, hidden.t())) for _ in range(TURNS)]
            by_token, by_word = (min(column) * 1e3 for column in zip(*taken, strict=True))
            ratio = by_token / by_word
            print(f"| {words:,} | {width} | {tokens} | {by_token:.1f} | {by_word:.1f} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
