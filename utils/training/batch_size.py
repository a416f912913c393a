"""--auto_batch_size: how many tokens a micro-batch shall have, found by computing the longest pairs.

What is tried is what training computes, forward and backward in its layout and precision, but for the optimizer's
step, whose memory is counted. Each size is twice the one before, so what it needs can be told beforehand from what
those before it took: on a CPU, where nothing says that memory ran out before the process is ended, a size that is not
expected to fit is not tried.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.tokenizing import LENGTH
from ..distributed import gather
from ..engine.memory import LESS_MEMORY, Peak, free_bytes, ran_out_of_memory, release_memory
from ..errors import UserError
from ..run.state import read_random_state, set_random_state
from ..runtime import say
from .batches import PAIR_IDS, REFERENCE_COLUMNS, count_pairs
from .trainer import PreferenceTrainer
from .within_memory import MICRO_BATCHES

FAST_ENOUGH = 0.97  # of the most tokens per second: the smallest size that comes to it is chosen
USED = {"cpu": 0.8, "cuda": 0.92}  # share of the free memory; the rest is for what else grows, and for fragments
TIMED_SECONDS, MOST_TIMES = 1.5, 3  # a size is computed again while it took less, at most so often
FINEST = 8  # between a size that fits and one that does not, to within this part of it
SIBLINGS = 128  # rows and columns of the matrix by which an optimizer's state is measured


@dataclass(frozen=True)
class Attempt:
    """A size that was tried, or that was not because it was not expected to fit (no tokens per second then)."""

    tokens: int  # at most, of a micro-batch
    bytes: int  # beside what stood in memory before: measured, or as expected; the most of all processes
    fits: bool
    tokens_per_second: float | None  # the least of all processes


def choose_size(attempts: list[Attempt], least: int) -> Attempt | None:
    """The smallest of those that fit, and hold every pair, that is about as fast as the fastest of them."""
    fitting = [attempt for attempt in attempts if attempt.fits and attempt.tokens >= least]
    fastest = max((attempt.tokens_per_second for attempt in fitting), default=0.0)
    good = [attempt for attempt in fitting if attempt.tokens_per_second >= FAST_ENOUGH * fastest]
    return min(good, key=lambda attempt: attempt.tokens, default=None)


def expect_bytes(attempts: list[Attempt], tokens: int) -> int:
    """What a larger size will take, on a line through the two largest that were computed; in proportion after one."""
    done = sorted((a for a in attempts if a.tokens_per_second is not None), key=lambda attempt: attempt.tokens)
    if not done:
        return 0
    last = done[-1]
    smaller = [attempt for attempt in done if attempt.tokens < last.tokens]
    if not smaller:
        return last.bytes * tokens // last.tokens
    before = smaller[-1]
    slope = max(0.0, (last.bytes - before.bytes) / (last.tokens - before.tokens))
    return round(last.bytes + slope * (tokens - last.tokens))


def limit_tokens_by_trying(trainer: PreferenceTrainer, scored_ahead: bool, recorded: dict[str, Any] | None) -> None:
    """Sets the limit of tokens per micro-batch that this machine computes well, or the one of the run that is resumed.

    Weights, random numbers and everything that is counted are as before.

    Args:
        scored_ahead: whether the reference will be scored before training, and not be in memory then.
        recorded: what the run's record says of it.

    Raises:
        UserError: the longest pair does not fit alone, or nothing can be tried here.
    """
    if recorded and recorded.get("max_tokens_per_batch"):
        found = dict(recorded)
        say(f"micro-batches: at most {found['max_tokens_per_batch']:,} tokens, as found when the run began")
    else:
        search = _Search(trainer, scored_ahead)
        say("finding the size of micro-batches by trying the longest pairs")
        chosen, why = search.find()
        found = {"max_tokens_per_batch": chosen.tokens, "tried": [asdict(attempt) for attempt in search.attempts]}
        speed = f"{chosen.tokens_per_second:,.0f} tokens/s, {chosen.bytes / 2**30:.2f} GiB beside the models"
        say(f"micro-batches: at most {chosen.tokens:,} tokens, as with --max_tokens_per_batch {chosen.tokens}; {why}")
        say(f"      {speed}")
    trainer.data_collator.max_tokens = found["max_tokens_per_batch"]
    trainer.machine.record.content[MICRO_BATCHES] = found


class _Search:
    """Tries sizes with one trainer."""

    def __init__(self, trainer: PreferenceTrainer, scored_ahead: bool) -> None:
        self.trainer, self.scored_ahead = trainer, scored_ahead
        self.device = trainer.args.device
        if trainer.machine.is_sharded or self.device.type not in USED:
            where = f"on {self.device.type}" if self.device.type not in USED else "where FSDP or DeepSpeed divide them"
            raise UserError(
                f"--auto_batch_size: batches cannot be tried before training {where}; give --max_tokens_per_batch, "
                "which is lowered automatically when memory runs out"
            )
        self.attempts: list[Attempt] = []
        self.least_room = 0  # bytes, in the process that has least
        collator, rows = trainer.data_collator, trainer.train_dataset
        self.sizes = collator.token_counts(rows)
        self.order = sorted(range(len(rows)), key=lambda index: -self.sizes[index])
        args = trainer.args
        self.most_pairs = min(len(rows), args.per_device_train_batch_size * args.gradient_accumulation_steps)
        longest = [self.sizes[index] for index in self.order[: self.most_pairs]]
        self.whole = sum(longest) if collator.packs else longest[0] * len(longest)
        others = collator.token_counts(trainer.eval_dataset) if trainer.eval_dataset is not None else []
        self.least = max([longest[0], *others])

    def find(self) -> tuple[Attempt, str]:
        """The size that is chosen, and why no other."""
        with _left_as_it_was(self.trainer):
            if self.trainer.compiler.is_asked_for:
                self._compile()
            for tokens in self._doubled():
                self.attempts.append(self._try(tokens))
                if not self.attempts[-1].fits or self._is_slower_than_before():
                    break
            self._come_closer()
        chosen = choose_size(self.attempts, self.least)
        if chosen is None:
            raise self._nothing_fits()
        larger = [attempt for attempt in self.attempts if attempt.tokens > chosen.tokens]
        if not larger:
            return chosen, "it holds all pairs of any optimizer step"
        if any(attempt.fits for attempt in larger):
            return chosen, f"{max(a.tokens for a in larger if a.fits):,} fit too and are no faster"
        least = min(larger, key=lambda attempt: attempt.tokens)
        return chosen, f"{least.tokens:,} do not fit ({least.bytes / 2**30:.2f} GiB)"

    def _compile(self) -> None:
        """Has layers compiled that are yet to be, so that no size is timed and measured with its compiler."""
        for index in (self.order[-1], self.order[0]):  # prompts are left out of some rows and not of others
            with contextlib.suppress(Exception):  # what cannot be computed is found out by its size
                self._compute(self.trainer.data_collator.whole([self._example(index)]))
            self.trainer.model.zero_grad(set_to_none=True)

    def _doubled(self) -> Iterator[int]:
        """Sizes from an eighth of the longest pair to the longest pairs of a whole optimizer step."""
        tokens = max(self.least // 8, self.sizes[self.order[-1]])
        while tokens < self.least:
            yield tokens
            tokens = min(2 * tokens, self.least)
        while tokens < self.whole:
            yield tokens
            tokens *= 2
        yield max(self.whole, self.least)

    def _is_slower_than_before(self) -> bool:
        """Whether the last two doublings brought nothing."""
        speeds = [attempt.tokens_per_second for attempt in self.attempts if attempt.tokens >= self.least]
        return len(speeds) > 2 and max(speeds[-2:]) * FAST_ENOUGH < max(speeds[:-2])

    def _come_closer(self) -> None:
        """Halves the distance between what fits and what does not, while more tokens are faster."""
        fitting = [attempt for attempt in self.attempts if attempt.fits and attempt.tokens >= self.least]
        too_many = min((attempt.tokens for attempt in self.attempts if not attempt.fits), default=0)
        enough = max((attempt.tokens for attempt in fitting), default=0)
        while enough and too_many - enough > enough // FINEST:
            if len(fitting) > 1 and choose_size(fitting, self.least).tokens < max(a.tokens for a in fitting):
                return
            middle = (enough + too_many) // 2
            self.attempts.append(self._try(middle))
            if self.attempts[-1].fits:
                fitting.append(self.attempts[-1])
                enough = middle
            else:
                too_many = middle

    def _try(self, tokens: int) -> Attempt:
        """Computes the longest pairs of so many tokens, in all processes at once."""
        trainer = self.trainer
        batch = trainer.data_collator.whole([self._example(index) for index in self._longest_within(tokens)])
        # What is promised to fit is what was computed, where no pairs fill the size.
        tokens = min(tokens, max(batch["input_ids"].numel(), self.least))
        release_memory()
        expected, room = expect_bytes(self.attempts, tokens), self._room()
        self.least_room = min(gather(room))
        # A GPU says so by itself when there is no more.
        if self.device.type == "cpu" and expected > self.least_room:
            return Attempt(tokens, expected, False, None)
        speed = None
        with Peak(self.device) as peak, contextlib.ExitStack() as stack:
            stack.callback(trainer.model.zero_grad, set_to_none=True)
            try:
                speed = self._measure_speed(batch)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
        values = gather((peak.bytes, room, speed))
        if any(speed is None for *_, speed in values):
            return Attempt(tokens, max(expected, *(taken for taken, *_ in values)), False, None)
        fits = all(taken <= room for taken, room, _ in values)
        return Attempt(tokens, max(taken for taken, *_ in values), fits, min(speed for *_, speed in values))

    def _measure_speed(self, batch: dict[str, Any]) -> float:
        """Tokens per second of forward and backward passes, the best of a few."""
        seconds: list[float] = []
        while len(seconds) < MOST_TIMES and sum(seconds) < TIMED_SECONDS:
            begun = time.perf_counter()
            self._compute(batch)
            seconds.append(time.perf_counter() - begun)
        filling = batch["layout"].filling if "layout" in batch else 0  # nobody gains by that
        return (batch["input_ids"].numel() - filling) / min(seconds)

    def _compute(self, batch: dict[str, Any]) -> None:
        """Forward and backward pass."""
        trainer = self.trainer
        count = torch.tensor(count_pairs(batch) * trainer.args.world_size, device=self.device)
        with trainer.task.reference.in_batches.attending():
            trainer.compute_part(trainer.model, dict(batch), count)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _longest_within(self, tokens: int) -> list[int]:
        """Indices of the longest pairs that make one micro-batch within so many tokens; the shortest if none does."""
        packs, sum_of_found = self.trainer.data_collator.packs, 0
        found: list[int] = []
        for index in self.order:
            size = self.sizes[index]
            cost = sum_of_found + size if packs else (self.sizes[found[0]] if found else size) * (len(found) + 1)
            if cost <= tokens and len(found) < self.most_pairs:
                found.append(index)
                sum_of_found += size
        return found or self.order[-1:]

    def _example(self, index: int) -> dict[str, Any]:
        row = self.trainer.train_dataset[index]
        ahead = dict.fromkeys(REFERENCE_COLUMNS, 0.0) if self.scored_ahead else {}
        return {name: row[name] for name in PAIR_IDS} | ahead

    def _room(self) -> int:
        """Bytes that a micro-batch may take, beside what training holds that is not there yet."""
        trainer, args = self.trainer, self.trainer.args
        room = USED[self.device.type] * free_bytes(self.device)
        if self.device.type == "cpu":  # the processes of a machine share it
            room /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.scored_ahead and trainer.ref_model is not None:  # it will have gone by then
            room += sum(value.nbytes for value in trainer.ref_model.parameters() if value.device == self.device)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        per_number = _state_bytes(trainer) + (4 if args.world_size > 1 else 0)  # DDP keeps gradients in buckets too
        return round(room - per_number * sum(parameter.numel() for parameter in trained))

    def _nothing_fits(self) -> UserError:
        needed = max(attempt.bytes for attempt in self.attempts)
        index, rows = self.order[0], self.trainer.train_dataset
        where = " by one of the processes" if self.trainer.args.world_size > 1 else ""
        return UserError(
            f"--auto_batch_size: the longest pair alone has {self.sizes[index]:,} tokens ({self._place(index)}, "
            f"{rows[index][LENGTH]:,} in its longer text) and does not fit: micro-batches of "
            f"{self.attempts[-1].tokens:,} tokens take about {needed / 2**30:.2f} GiB beside the models, and "
            f"{max(0, self.least_room) / 2**30:.2f} GiB may be used{where}. What helps: {LESS_MEMORY}"
        )

    def _place(self, index: int) -> str:
        return self.trainer.machine.place(self.trainer.train_dataset[index]["row"])


@contextlib.contextmanager
def _left_as_it_was(trainer: PreferenceTrainer) -> Iterator[None]:
    """Within the context the model computes as the trainer will make it compute; afterwards nothing has changed."""
    model, args = trainer.model, trainer.args
    random_state, tallies, was_training = read_random_state(), trainer.tally.read(), model.training
    forward, own = model.forward, model.__dict__.get("forward")

    def computed(*arguments: Any, **options: Any) -> Any:
        with trainer.accelerator.autocast():
            return forward(*arguments, **options)

    model.forward = computed
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
        if args.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        trainer.tally.write(tallies)
        set_random_state(random_state)
        release_memory()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)


def _state_bytes(trainer: PreferenceTrainer) -> float:
    """What the optimizer will keep for each trained number, measured with one of its kind on a small matrix."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    matrix = torch.nn.Parameter(torch.zeros(SIBLINGS, SIBLINGS, device=trainer.args.device))
    matrix.grad = torch.zeros_like(matrix)
    try:
        optimizer = kind([matrix], **options)
        optimizer.step()
    except Exception:
        return 8.0  # one that wants more than a matrix: as much as AdamW
    states = [value for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in states) / matrix.numel()
