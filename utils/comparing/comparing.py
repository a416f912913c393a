"""A comparison from beginning to end: two models answer the same prompts, judges say whose answers are better."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..arguments import command_line
from ..errors import UserError, gather
from ..interruptions import stop_if_asked
from ..models.side_by_side import Contender, load_side_by_side
from ..models.trained import as_in_run
from ..report.links import link_pages, refresh_report
from ..responses.generation import Continuation
from ..run.folder import named_as_given
from ..run.names import COMPARISON_FILES
from ..run.processes import count_processes
from ..run.program import join_command
from ..run.record import now
from ..run.results import write_results
from ..runtime import Precision, choose_precision, device_name, find_device, read_versions, say
from ..settings.training import Settings
from ..settings.verbs import SamplingSettings
from .folder import PAGE, RECORD, ROWS, find_folder
from .judges import Judge, Judgement, ask, by_scores, choose_judges, find_reference
from .measures import count_outcomes, describe_responses
from .page import make_page
from .questions import Questions, read_questions
from .rewards import encode_responses, implicit_rewards
from .sides import (
    Reader,
    Side,
    bound_new_tokens,
    choose_fitting,
    find_sides,
    read_readers,
    write_responses,
)
from .summary import OWN_REWARD, summarize

FROM_THE_RUN = ("dtype", "attn_implementation", "bnb_4bit_quant_type", "chat_template_kwargs")
Sides = tuple[Side, Side]
Readers = tuple[Reader, Reader]
Written = tuple[list[Continuation], list[Continuation]]


def compare_models(settings: Settings) -> None:
    """Has both models answer, has the answers judged, writes the files and says how it went.

    Raises:
        UserError: models, prompts, judges or folder cannot be used.
    """
    started, clock, words = now(), time.monotonic(), command_line(settings)
    sides, _ = gather(lambda: find_sides(settings), _check_launcher)
    settings = as_in_run(settings, sides[0].trained, FROM_THE_RUN)
    judges, folder, questions = gather(
        lambda: choose_judges(settings, sides[0]),
        lambda: find_folder(settings, sides[0]),
        lambda: read_questions(settings, sides[0].trained),
    )
    readers = read_readers(sides, settings, questions)
    settings = bound_new_tokens(settings, readers)
    precision = choose_precision(settings.model.dtype, find_device())
    asked = choose_fitting(questions, readers, settings.of(SamplingSettings).max_new_tokens)
    _describe(sides, readers, questions, len(asked.prompts), judges, settings, precision)

    written, rewarded = _compute(sides, readers, asked, judges, settings, precision)
    stop_if_asked()
    model, baseline = ([row.text for row in side] for side in written)
    judgements = [
        rewarded if judge.name == OWN_REWARD else ask(judge, asked, model, baseline, folder, settings)
        for judge in judges
    ]
    rows = [_as_row(place, asked, written, judgements) for place in range(len(asked.prompts))]
    record = {
        "verb": "compare",
        "started": started,
        "seconds": round(time.monotonic() - clock, 1),
        "settings": settings.flat(),
        "command": join_command(words),
        "versions": read_versions(),
        "model": sides[0].as_record(),
        "baseline": sides[1].as_record(),
        "prompts": {
            "source": questions.source,
            "count": len(asked.prompts),
            "without_room": len(questions.prompts) - len(asked.prompts),
        },
        "sampling": dataclasses.asdict(settings.of(SamplingSettings)) | {"seed": settings.training.seed},
        "chat_templates": [reader.template for reader in readers],
        "precision": precision.name,
        "device": device_name(precision.device),
        "judges": [_count(judgement) for judgement in judgements],
        "responses": {side.name: describe_responses(own) for side, own in zip(sides, written, strict=True)},
        "identical_responses": sum(own == other for own, other in zip(model, baseline, strict=True)),
    }
    page = make_page(record, rows, link_pages(sides[0].trained.folder, folder / PAGE))
    with named_as_given(settings.run.output_dir):
        write_results(folder, COMPARISON_FILES, record, rows, page)
    refresh_report(sides[0].trained.folder)
    _say_result(record, rows, folder, words)


def _say_result(record: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path, words: Sequence[str]) -> None:
    for line in summarize(record, rows):
        say(line)
    if not record["judges"]:
        say("\nNo judge was named. The page shows the responses side by side; to judge them blind in a browser:")
        say(f"  {join_command([*words, '--judge', 'vote'])}")
    say(f"\npage ({PAGE}), rows ({ROWS}) and record ({RECORD}): {folder}")


def _check_launcher() -> None:
    """One process answers and judges; several would each do all of it, and write the same files."""
    if count_processes() > 1:
        raise UserError("compare runs in one process; start it with plain python, not with a launcher")


def _describe(
    sides: Sides,
    readers: Readers,
    questions: Questions,
    count: int,
    judges: Sequence[Judge],
    settings: Settings,
    precision: Precision,
) -> None:
    """Says what will be compared, on what, by whom."""
    for side in sides:
        say(f"{side.name}: {side.source.name}, {side.how}{' (held in 4 bits)' if side.in_4bit else ''}")
    if readers[0].tokenizer is not readers[1].tokenizer:
        say("      each uses its own tokenizer, so token counts cannot be compared")
    say(f"prompts: {count:,} of {questions.source}")
    if count < len(questions.prompts):
        left_out = len(questions.prompts) - count
        say(f"      {left_out:,} left out: too long for a context with room for --max_new_tokens")
    templates = dict.fromkeys(reader.template for reader in readers if reader.template)
    if templates:
        say(f"      chat template: {'; for the baseline: '.join(templates)}")
    for judge in judges:
        say(f"judge: {judge.name}, {judge.how}")
    sampling = settings.of(SamplingSettings)
    how, drawn = "greedy decoding", ""
    if sampling.temperature > 0:
        how, drawn = f"temperature {sampling.temperature:g}", f", seed {settings.training.seed} for both"
    say(
        f"device: {device_name(precision.device)}; computing in {precision.name} ({precision.reason}); {how}, at most "
        f"{sampling.max_new_tokens:,} new tokens{drawn}"
    )


def _compute(
    sides: Sides,
    readers: Readers,
    asked: Questions,
    judges: Sequence[Judge],
    settings: Settings,
    precision: Precision,
) -> tuple[Written, Judgement | None]:
    """The responses of both, and the run's own reward of them where that judges. The models are let go of after it."""
    reward = next((judge for judge in judges if judge.name == OWN_REWARD), None)
    wanted = {side.name: side.wanted() for side in sides}
    if reward is not None:
        stands = find_reference(sides[0], settings)
        if (stands.source, stands.in_4bit) != (sides[1].source, sides[1].in_4bit):
            wanted["reference"] = stands
    contenders = load_side_by_side(wanted, settings.model, precision)
    own, other = (
        write_responses(contenders[side.name], side.name, reader, asked, settings)
        for side, reader in zip(sides, readers, strict=True)
    )
    rewarded = None
    if reward is not None:
        reference = contenders.get("reference", contenders["baseline"])
        beta = sides[0].trained.setting("beta")
        rewarded = _reward(reward, contenders["model"], reference, readers, asked, (own, other), beta)
    contenders.clear()
    gc.collect()
    if precision.device.type == "cuda":
        torch.cuda.empty_cache()
    return (own, other), rewarded


def _reward(
    judge: Judge,
    policy: Contender,
    reference: Contender,
    readers: Readers,
    asked: Questions,
    written: Written,
    beta: float,
) -> Judgement:
    say("      scoring the responses with the run's own reward")
    reader = readers[0]
    (own, _), (other, changed) = (
        encode_responses(reader, writer, asked, rows) for writer, rows in zip(readers, written, strict=True)
    )
    rewards = implicit_rewards(policy, reference, own + other, beta, reader.tokenizer.pad_token_id)
    judgement = by_scores(judge, rewards[: len(own)], rewards[len(own) :])
    if changed:
        say(f"warning: the model's chat template drops a part of {changed:,} responses of the baseline;")
        say("      they are scored without it")
        judgement.details["responses_not_rendered_whole"] = changed
    return judgement


def _count(judgement: Judgement) -> dict[str, Any]:
    """A judge's part of the record."""
    counts = {"judge": judgement.judge, "how": judgement.how, **count_outcomes(judgement.outcomes)}
    if judgement.scores is not None:
        counts["mean_scores"] = [sum(side) / len(side) for side in zip(*judgement.scores, strict=True)]
    return counts | {"details": {name: value for name, value in judgement.details.items() if name != "verdicts"}}


def _as_row(place: int, asked: Questions, written: Written, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """A line of comparison.jsonl."""
    own, other = written[0][place], written[1][place]
    judges = {}
    for judgement in judgements:
        found: dict[str, Any] = {"outcome": judgement.outcomes[place]}
        if judgement.scores is not None:
            found |= dict(zip(("score", "baseline_score"), judgement.scores[place], strict=True))
        if "verdicts" in judgement.details:
            found["model_first"], found["baseline_first"] = judgement.details["verdicts"][place]
        judges[judgement.judge] = found
    return {
        "prompt": asked.prompts[place],
        **asked.told[place],
        "response": own.text,
        "baseline_response": other.text,
        "tokens": len(own.ids),
        "baseline_tokens": len(other.ids),
        "ended": own.ended,
        "baseline_ended": other.ended,
        "judges": judges,
    }
