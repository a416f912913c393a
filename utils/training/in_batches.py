"""Rows that are scored without a gradient, in batches: those of an evaluation, and of a reference scored ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from ..distributed import gather
from ..engine.memory import ran_out_of_memory, release_memory
from ..engine.shared_prefix import shared_prefix_active
from ..errors import LocalError
from ..interruptions import stop_if_asked
from ..progress import phase
from .batches import PairCollator, consecutive_batches
from .machine import Machine

Row = dict[str, float | None]
Score = Callable[[list[int]], dict[int, Any]]


def share_of_batches(batches: list[list[int]], process: int, processes: int) -> list[list[int]]:
    """This process's share of the batches, as many for each process, since sharded models compute in step.

    A process that would have fewer gets one of its batches, or the first, once more; `merge_rows` counts it once.
    """
    own = batches[process::processes]
    return own + [own[0] if own else batches[0]] * (-(-len(batches) // processes) - len(own))


def merge_rows(rows: dict[int, Any]) -> list[Any]:
    """The rows of all processes, by index: each row once, whichever processes computed it."""
    merged = {index: row for part in gather(rows) for index, row in part.items()}
    return [merged[index] for index in sorted(merged)]


class PairsInBatches:
    """Scores pairs in batches of similar length, in the layout of their collator, in parts where memory runs out.

    `divided(indices, parts)` is told of a batch that is scored in parts from here on.
    """

    def __init__(self, machine: Machine, collator: PairCollator, divided: Callable[..., None] | None = None) -> None:
        self.machine, self.collator, self.divided = machine, collator, divided
        self._most: int | None = None  # pairs at once, since memory ran out

    def attending(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which models compute the layout of the batches."""
        stack = contextlib.ExitStack()
        if self.collator.packs:
            for model in self.machine.models():
                stack.enter_context(shared_prefix_active(model))
        return stack

    def batches(self, dataset: Dataset, limit: int | None, most: int) -> list[list[int]]:
        """Indices of pairs of similar length, for batches of at most `limit` tokens, else of `most` pairs."""
        sizes = self.collator.token_counts(dataset)
        return consecutive_batches(
            sizes, limit or sum(sizes) * 2, most if limit is None else len(sizes), padded=not self.collator.packs
        )

    def own_batches(self, dataset: Dataset, limit: int | None, most: int) -> list[list[int]]:
        """Those that this process scores, the same each time."""
        args = self.machine.args
        return share_of_batches(self.batches(dataset, limit, most), args.process_index, args.world_size)

    def batch(self, dataset: Dataset, indices: Sequence[int]) -> dict[str, Any]:
        """The pairs with these indices, on the device."""
        return self.machine.on_device(self.collator.whole([dataset[index] for index in indices]))

    def score(
        self, dataset: Dataset, limit: int | None, most: int, score: Score, doing: str = "evaluating"
    ) -> list[Any]:
        """The rows that `score` gives for batches of at most `limit` tokens, else of `most` pairs, in the order of the
        data set. Memory grows with the batch, not with the data."""
        rows: dict[int, Any] = {}
        batches = self.own_batches(dataset, limit, most)
        with self.attending(), phase(doing, sum(map(len, batches)), "pairs") as shown:
            for indices in batches:
                stop_if_asked()
                rows |= self.within_memory(indices, score)
                shown.advance(len(indices))
        return merge_rows(rows)

    def within_memory(self, indices: list[int], score: Score) -> dict[int, Any]:
        """What `score` gives for a batch: where memory runs out, half by half, in this batch and all later ones.

        Raises:
            LocalError: a pair alone does not fit, or it is computed by several processes together.
        """
        rows: dict[int, Any] = {}
        waiting, repeated_alone = [indices], False
        while waiting:
            part = waiting.pop(0)
            if self._most is not None and len(part) > self._most:
                halves = [part[: len(part) // 2], part[len(part) // 2 :]]
                if self.divided is not None:
                    self.divided(part, halves)
                waiting[:0] = halves
                continue
            try:
                rows |= score(part)
                continue
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
            # Here, not above: the exception held everything that was computed.
            release_memory()
            if self.machine.is_sharded or (len(part) == 1 and repeated_alone):
                raise LocalError(
                    f"out of memory in scoring {len(part)} pairs without a backward pass. What helps: a lower "
                    "--max_length, --per_device_eval_batch_size or --max_tokens_per_batch, or a device with more memory"
                )
            waiting.insert(0, part)
            if len(part) == 1:  # once more, now that memory is in order
                repeated_alone = True
                continue
            self._most = len(part) // 2
            self.machine.warn(
                f"memory ran out in scoring {len(part)} pairs at once (evaluation, or the reference); from now on "
                f"at most {self._most} are scored at once, with the same result"
            )
        return rows
