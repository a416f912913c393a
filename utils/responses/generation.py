"""Responses that a model writes, drawn with random numbers of their own: what else is in the batch changes nothing."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..data.encoding import PromptEncoder
from ..data.rendering import Turns
from ..engine.memory import ran_out_of_memory
from ..interruptions import stop_if_asked
from ..progress import phase
from ..settings.verbs import SamplingSettings
from .drawing import DrawnToken, FiniteScores, PenaltyOnText, draw_numbers

BATCH_SIZE = 64
HALF_A_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    ids: list[int]  # without the token that ended it
    end: int | None  # that token; None where the model was stopped by --max_new_tokens

    @property
    def ended(self) -> bool:
        """Whether it stopped by itself."""
        return self.end is not None


def sample_continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    sampling: SamplingSettings,
    *,
    seed: int,
    end_ids: Iterable[int] = (),
    tools: Sequence[str | None] | None = None,
    kwargs: Sequence[str | None] | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Continuation]:
    """One continuation per prompt, in order; of a prompt that stands there several times, as many.

    The prompts are given to the model as in training. Each continuation depends on the model, `seed`, the settings, its
    prompt and how often that stood there before, and (up to the rounding of the model's numbers) on no other prompt and
    not on `batch_size`. Two models that are asked the same draw the same random numbers. The defaults that a model's
    generation_config.json may hold for sampling are not used.

    Args:
        end_ids: tokens that end a response, beside the tokenizer's end-of-text token: see `read_end_ids`.
        tools: for each prompt, as JSON, the tools that its template is shown.
        kwargs: for each prompt, as JSON, what else its template is given.
        batch_size: prompts answered at a time; halved where memory is too small for so many.
    """
    encoder = PromptEncoder(tokenizer, end_ids)
    prompt_ids = encoder.encode_prompts(prompts, tools, kwargs)
    keys = _number(prompts)
    waiting = sorted(range(len(prompts)), key=lambda place: len(prompt_ids[place]))
    continuations: dict[int, Continuation] = {}
    with phase("generating", len(prompts), "responses") as shown:
        while waiting:
            stop_if_asked()
            places = waiting[:batch_size]
            rows = [prompt_ids[place] for place in places]
            draws = [draw_numbers(seed, *keys[place], sampling.max_new_tokens) for place in places]
            try:
                written = _generate(model, encoder, rows, np.stack(draws), sampling)
            except Exception as error:
                if not ran_out_of_memory(error) or len(places) == 1:
                    raise
                batch_size = len(places) // 2
                continue
            waiting = waiting[len(places) :]
            for place, row, ids in zip(places, rows, written, strict=True):
                continuations[place] = _read(prompts[place], row, ids, encoder)
            shown.advance(len(places))
    return [continuations[place] for place in range(len(prompts))]


def stream_continuation(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Turns,
    sampling: SamplingSettings,
    *,
    seed: int,
    end_ids: Iterable[int] = (),
    tools: str | None = None,
) -> Iterator[Continuation]:
    """The continuation that `sample_continuations` gives for this prompt, while it grows.

    Each text begins with the one before and ends in a whole character; the last one is complete. Closing the iterator
    stops the model.
    """
    encoder = PromptEncoder(tokenizer, end_ids)
    (row,) = encoder.encode_prompts([prompt], [tools])
    draws = draw_numbers(seed, prompt, 0, sampling.max_new_tokens)[None]
    tokens, stop, failures = _Tokens(), _Stop(), []

    def write() -> None:
        try:
            _generate(model, encoder, [row], draws, sampling, streamer=tokens, stopping_criteria=[stop])
        except BaseException as error:
            failures.append(error)
            tokens.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        written = Continuation("", [], None)
        for ids in tokens:
            grown = _read(prompt, row, ids, encoder)
            if grown.text.startswith(written.text) and not grown.text.endswith(HALF_A_CHARACTER):
                written = grown
                yield written
        writer.join()
        if failures:
            raise failures[0]
        yield _read(prompt, row, tokens.ids, encoder)
    finally:
        stop.asked = True
        writer.join()


def find_fitting(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    max_new_tokens: int,
    context: int | None,
    tools: Sequence[str | None] | None = None,
    kwargs: Sequence[str | None] | None = None,
) -> list[bool]:
    """For each prompt, whether the model's context has room for it and a response; `context` None has no limit."""
    lengths = [len(ids) for ids in PromptEncoder(tokenizer).encode_prompts(prompts, tools, kwargs)]
    return [context is None or length + max_new_tokens <= context for length in lengths]


class _Tokens(BaseStreamer):
    """The ids of one growing continuation, handed from the thread that writes to the one that reads."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if not self._is_prompt:
            self._queue.put(int(value))
        self._is_prompt = False

    def end(self) -> None:
        """Called by `generate` at the end."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        while (token := self._queue.get()) is not None:
            self.ids.append(token)
            yield list(self.ids)


class _Stop(StoppingCriteria):
    """Ends the writing when it is asked to."""

    asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


def _number(prompts: Sequence[str | Turns]) -> list[tuple[str | Turns, int]]:
    """Each prompt with how often it stood there before."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        key = json.dumps(prompt, sort_keys=True)
        numbered.append((prompt, seen[key]))
        seen[key] += 1
    return numbered


def _generate(
    model: PreTrainedModel | PeftModel,
    encoder: PromptEncoder,
    rows: list[list[int]],
    draws: np.ndarray,
    sampling: SamplingSettings,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """The new ids of each row; those of a row that ended before others go on with padding."""
    tokenizer = encoder.tokenizer
    batch = _pad(rows, "left", tokenizer.pad_token_id, model.device)
    width = batch["input_ids"].shape[1]
    finite = FiniteScores()
    processors = LogitsProcessorList([finite])
    if sampling.repetition_penalty != 1:
        processors.append(PenaltyOnText(float(sampling.repetition_penalty), batch["attention_mask"]))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(DrawnToken(draws, width, model.device))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(encoder.end_ids),
    )
    with _defaults_of_its_own_off(model, config):
        written = model.generate(
            **batch,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(stopping_criteria),
            streamer=streamer,
        )
    finite.check()
    return written[:, width:].tolist()


@contextlib.contextmanager
def _defaults_of_its_own_off(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> Iterator[None]:
    """Keeps out of a generation what the model's own generation config asks for: penalties, beams, forced tokens."""
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    former = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, former, strict=True):
            holder.generation_config = own


def _pad(rows: list[list[int]], side: str, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """The rows as one batch; generation wants the padding on the left, where the new tokens are not."""
    width = max(map(len, rows))
    sides = [([pad_id] * (width - len(row)), [0] * (width - len(row)), row) for row in rows]
    left = side == "left"
    ids = [padding + row if left else row + padding for padding, _, row in sides]
    mask = [zeros + [1] * len(row) if left else [1] * len(row) + zeros for _, zeros, row in sides]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _read(prompt: str | Turns, row: list[int], ids: list[int], encoder: PromptEncoder) -> Continuation:
    """What was written behind the prompt whose ids are `row`."""
    end = next((i for i, token in enumerate(ids) if token in encoder.end_ids), None)
    kept = ids if end is None else ids[:end]
    # Behind the prompt: some tokenizers leave out the space before the first word of what they decode.
    start = encoder.tokenizer.decode(row, skip_special_tokens=True)
    whole = encoder.tokenizer.decode(row + kept, skip_special_tokens=True)
    if not whole.startswith(start):
        start, whole = "", encoder.tokenizer.decode(kept, skip_special_tokens=True)
    text = whole[len(start) :]
    # In a dialogue the space between a speaker's name and what is said is the template's.
    text = text if isinstance(prompt, str) else text.removeprefix(" ")
    return Continuation(text, kept, None if end is None else ids[end])


def kl_estimate(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    continuations: Sequence[Continuation],
    batch_size: int = BATCH_SIZE,
) -> float:
    """KL(policy || reference) per continuation, in nats, estimated on continuations that the policy wrote.

    Every token's full next-token distributions are compared, which has a far smaller variance than the sampled
    log-ratio and the same mean: E_y~pi [ sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t)) ].
    """
    encoder = PromptEncoder(tokenizer)
    rows = [
        (prompt, written.ids if written.end is None else [*written.ids, written.end])
        for prompt, written in zip(encoder.encode_prompts(prompts), continuations, strict=True)
    ]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            texts = [prompt + written for prompt, written in part]
            batch = _pad(texts, "right", tokenizer.pad_token_id, policy.device)
            logs = [torch.log_softmax(model(**batch).logits.float(), dim=-1) for model in (policy, reference)]
            divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)  # (continuations, tokens)
            for row, (prompt, written) in zip(divergence, part, strict=True):
                total += row[len(prompt) - 1 : len(prompt) + len(written) - 1].sum().item()
    return total / len(rows)
