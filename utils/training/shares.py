"""The pairs of each optimizer step, shared out over processes so that none waits for another.

The pairs of a step are those of one process, in the same order of steps; only who computes which is decided here, by
tokens, alike in every process and without a word between them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler


def share_out(sizes: Sequence[int], processes: int, slots: int, most: int) -> list[list[list[int]]]:
    """Which pairs of a step each process computes in each of its `slots` micro-batches, of at most `most` pairs.

    The largest come first, each to the micro-batch with the fewest tokens that has room. Micro-batches of like size
    are computed at the same time, and the larger one goes to the process that had less before.

    Args:
        sizes: tokens of each pair of the step, at most `processes` x `slots` x `most` of them.

    Returns:
        Positions in `sizes`, by slot and process; none where there are fewer pairs than micro-batches.
    """
    groups: list[list[int]] = [[] for _ in range(processes * slots)]
    tokens = [0] * len(groups)
    open_groups = [(0, number) for number in range(len(groups))]
    for position in sorted(range(len(sizes)), key=lambda position: (-sizes[position], position)):
        _, number = heapq.heappop(open_groups)
        groups[number].append(position)
        tokens[number] += sizes[position]
        if len(groups[number]) < most:
            heapq.heappush(open_groups, (tokens[number], number))
    order = sorted(range(len(groups)), key=lambda number: (-tokens[number], number))
    shares: list[list[list[int]]] = []
    sums = [0] * processes
    for slot in range(slots):
        shares.append([[] for _ in range(processes)])
        takers = sorted(range(processes), key=lambda process: (sums[process], process))
        for process, number in zip(takers, order[slot * processes : (slot + 1) * processes], strict=True):
            shares[slot][process] = sorted(groups[number])
            sums[process] += tokens[number]
    return shares


@dataclass(frozen=True)
class StepSize:
    """How an optimizer step is divided: `slots` micro-batches in each process, of at most `most` pairs."""

    processes: int
    slots: int
    most: int


class StepShares(BatchRebalanceSampler):
    """The micro-batches of one process, as row indices: as many in each process, an empty one where pairs run out.

    Its parent is how the trainer knows a sampler that shares out by itself. The order of rows is that of a run of one
    process with the same seed.
    """

    def __init__(
        self,
        rows: Sampler[int],
        sizes: Sequence[int],
        size: StepSize,
        process: int,
        by_tokens: bool,
        drop_last: bool,
    ) -> None:
        """`rows`: the rows in the order of training. `by_tokens`: where a micro-batch is split again by tokens, so that
        it may have any number of pairs."""
        self.rows, self.sizes = rows, sizes
        self.drop_last = True  # as the wrapper that accelerate puts around it has it: it fills nothing up
        self.size, self.process, self.by_tokens = size, process, by_tokens
        self.count = len(sizes)
        if drop_last:
            self.count -= self.count % (size.most * size.processes)

    def set_epoch(self, epoch: int) -> None:
        """The order of another pass over the data."""
        if isinstance(self.rows, SeedableRandomSampler):
            self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.count // (self.size.most * self.size.processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.rows)[: self.count]
        size, step = self.size, self.size.most * self.size.slots * self.size.processes
        for begin in range(0, len(order), step):
            rows = order[begin : begin + step]
            slots = -(-len(rows) // (size.most * size.processes))
            most = len(rows) if self.by_tokens else size.most
            for share in share_out([self.sizes[row] for row in rows], size.processes, slots, most):
                yield [rows[position] for position in share[self.process]]


def share_steps(
    rows: Sampler[int], dataset: Dataset, sizes: Sequence[int], args: TrainingArguments, by_tokens: bool
) -> StepShares | None:
    """The micro-batches of one of several processes; None where `rows` come in an order of another kind.

    Args:
        rows: the rows in the order of training.
        sizes: tokens of each.
    """
    if type(rows) not in (RandomSampler, SequentialSampler):
        return None
    if isinstance(rows, RandomSampler):  # as accelerate does in one process
        rows = SeedableRandomSampler(dataset, data_seed=args.data_seed)
    return StepShares(
        rows,
        sizes,
        StepSize(args.world_size, args.gradient_accumulation_steps, args.per_device_train_batch_size),
        args.process_index,
        by_tokens=by_tokens,
        drop_last=args.dataloader_drop_last,
    )
