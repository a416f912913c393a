"""What the policy writes while it is trained: the same held-out prompts, answered at each evaluation."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.models.utils import disable_gradient_checkpointing

from ..data.calls import plain_turns
from ..data.layouts import KWARGS
from ..data.rendering import Turns
from ..errors import UserError
from ..models.loading import longest_context
from ..report.html import BY_NUMBER
from ..report.messages import show_messages
from ..responses.generation import find_fitting, sample_continuations
from ..run.metrics import read_json_lines
from ..run.names import SAMPLES
from ..run.writing import write_json_lines
from ..runtime import say
from ..settings.verbs import SamplingSettings
from .context import Run
from .rows import Rows
from .trackers import log_samples
from .trainer import RunTrainer

TRIED = 256  # held-out rows looked at for each prompt that is wanted
SHOWN_PROMPT, SHOWN_RESPONSE = 150, 400  # characters on the console
WIDTH = 100


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts to answer, with the tools that each one's template is shown and what else it is given (JSON)."""

    prompts: list[str | Turns]
    tools: list[str | None]
    kwargs: list[str | None]
    rows: Rows  # what they were tokenized with


def choose_prompts(run: Run, trainer: RunTrainer) -> SamplePrompts:
    """The first different held-out prompts that leave room for an answer.

    Raises:
        UserError: there is none.
    """
    data, rows, settings = run.data, run.rows, run.settings.run
    if data.held_out is None or trainer.eval_dataset is None:
        raise UserError("--sample_during_eval: no rows are held out; raise --validation_split, or leave this out")
    wanted, most = settings.num_eval_samples, settings.sample_max_new_tokens
    head = data.held_out.select(range(min(TRIED * wanted, len(data.held_out))))
    none = [None] * len(head)
    given = (head[name] if name in head.column_names else none for name in ("tools", KWARGS))
    asked = zip(map(plain_turns, head["prompt"]), *given, strict=True)
    different = {json.dumps(one): one for one in asked if one[0]}
    prompts, tools, kwargs = ([one[place] for one in different.values()] for place in range(3))
    context = longest_context(trainer.model.config.get_text_config())
    fits = find_fitting(rows.tokenizer, prompts, most, context, tools, kwargs)
    chosen = [index for index, fitting in enumerate(fits) if fitting][:wanted]
    if not chosen:
        raise UserError(
            f"--sample_during_eval: no held-out prompt leaves room for --sample_max_new_tokens {most} in the model's "
            f"{f'{context:,} ' if context else ''}tokens; lower it, or leave this out"
        )
    prompts, tools, kwargs = ([values[index] for index in chosen] for values in (prompts, tools, kwargs))
    return SamplePrompts(prompts, tools, kwargs, rows)


class SampleWriter(TrainerCallback):
    """At each evaluation lets the policy answer the prompts: on the console, in samples.jsonl, and in the trackers.

    The random numbers are the same at each evaluation, so that what differs is the policy; those of the training are
    not touched. With several processes the main one writes alone.
    """

    def __init__(self, run: Run, trainer: RunTrainer) -> None:
        self.trainer, self.chosen, self.folder = trainer, choose_prompts(run, trainer), run.folder
        self.seed = run.settings.training.seed
        self.sampling = SamplingSettings(max_new_tokens=run.settings.run.sample_max_new_tokens)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows = self.sample(state.global_step)
        show_samples(rows, self.sampling.max_new_tokens)
        if self.folder is not None:
            path = self.folder / SAMPLES
            before = [row for row in read_json_lines(path) if row.get("step", 0) < state.global_step]
            write_json_lines(path, [*before, *rows])
            log_samples(self.trainer, rows, state.global_step)

    def sample(self, step: int) -> list[dict[str, Any]]:
        """The policy's answers as rows of samples.jsonl."""
        trainer, chosen = self.trainer, self.chosen
        model, was_training = trainer.model, trainer.model.training
        model.eval()
        try:
            with (
                trainer.machine.stopwatch.paused("sampling"),
                torch.no_grad(),
                trainer.accelerator.autocast(),
                disable_gradient_checkpointing(model, trainer.args.gradient_checkpointing_kwargs),
            ):
                written = sample_continuations(
                    model,
                    chosen.rows.tokenizer,
                    chosen.prompts,
                    self.sampling,
                    seed=self.seed,
                    end_ids=chosen.rows.end_ids,
                    tools=chosen.tools,
                    kwargs=chosen.kwargs,
                    batch_size=trainer.args.per_device_eval_batch_size,
                )
        finally:
            model.train(was_training)
        return [
            {"step": step, "prompt": prompt, "response": answer.text, "ended": answer.ended}
            for prompt, answer in zip(chosen.prompts, written, strict=True)
        ]


def show_samples(rows: Sequence[Mapping[str, Any]], most: int) -> None:
    """Prints each prompt's end and the beginning of its answer; the whole is in samples.jsonl."""
    for row in rows:
        prompt, response = readable(show_messages(row["prompt"], "\n")), readable(row["response"])
        if len(prompt) > SHOWN_PROMPT:
            prompt = "..." + prompt[-SHOWN_PROMPT:]
        end = "" if row["ended"] else f" [stopped after {most} tokens]"
        if len(response) > SHOWN_RESPONSE:
            response, end = response[:SHOWN_RESPONSE] + "...", f" [{len(response):,} characters]{end}"
        for label, text in (("prompt", prompt), ("writes", response + end)):
            start = f"    {label}  "
            say(
                textwrap.fill(
                    text.strip() or "(nothing)", WIDTH, initial_indent=start, subsequent_indent=" " * len(start)
                )
            )


def readable(text: str) -> str:
    """The text in one line; what would move the cursor or change colours is made visible."""
    return text.replace("\r\n", "\n").replace("\n", "\u23ce ").replace("\r", "\u23ce ").translate(BY_NUMBER)
