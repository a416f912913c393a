"""Who says which response is better: the run's own reward, a function, a reward model, an endpoint, or the person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ..data.tools import show_prompt
from ..errors import UserError, gather
from ..models.side_by_side import Wanted
from ..responses.ballots import Ballots, Match
from ..responses.judging import EndpointJudge, JudgeLimits, Verdicts
from ..responses.scorers import FUNCTION, Prompt, Scorer, are_equal, check_reward_model, load_reward_model, load_scorer
from ..responses.voting import check_port, collect_votes
from ..runtime import say
from ..settings.training import Settings
from ..settings.verbs import ComparisonSettings, JudgeSettings
from .questions import Questions
from .sides import Side
from .summary import OWN_REWARD

VOTE = "vote"
FLAG = "--judge"


@dataclass(frozen=True)
class Judgement:
    """What a judge said of each prompt: 1 where the model's response is better, 0 where the baseline's is, 0.5 for
    neither, None where it gave no verdict."""

    judge: str  # as the person named it
    how: str  # what it is, in words
    outcomes: list[float | None]
    scores: list[tuple[float, float]] | None = None  # of the model's and the baseline's response
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """A judge that can be asked; `score` for those that rate each response for itself."""

    name: str
    how: str
    score: Scorer | None = None


def choose_judges(settings: Settings, model: Side) -> list[Judge]:
    """The judges that --judge names, looked at before any model is loaded; without them the page alone is made.

    Raises:
        UserError: one of them cannot be used.
    """
    trained, names = model.trained, settings.of(ComparisonSettings).judge or ()
    if OWN_REWARD in names and not trained.has_reference:
        raise UserError(
            f"{FLAG} {OWN_REWARD}: {trained.source.name} is not a preference run of this script, so it has no "
            "reference to be measured against; name another judge"
        )
    return list(gather(*(lambda name=name: _find_judge(name, settings, model) for name in names)))


def _find_judge(name: str, settings: Settings, model: Side) -> Judge:
    if name == OWN_REWARD:
        beta = model.trained.setting("beta")
        return Judge(name, f"beta {beta:g} times the log-ratio to its reference: the model's own reward")
    if name == VOTE:
        check_port(settings.of(ComparisonSettings).vote_port or 0)
        return Judge(name, "blind votes on a local page")
    if is_endpoint(name):
        return Judge(name, f"{settings.of(JudgeSettings).judge_model} at {name}, asked in both orders")
    if FUNCTION.fullmatch(name):
        return Judge(name, "scores by a function", load_scorer(name, FLAG))
    check_reward_model(name, settings.model.trust_remote_code, FLAG)
    return Judge(name, "scores by a reward model")


def is_endpoint(name: str) -> bool:
    """Whether a judge is named by URL."""
    return name.startswith(("http://", "https://"))


def find_reference(model: Side, settings: Settings) -> Wanted:
    """The reference of the model's run, to be loaded for the implicit reward."""
    trained = model.trained
    return Wanted(FLAG, trained.find_reference(), trained.reference_in_4bit or settings.model.use_4bit)


def ask(
    judge: Judge,
    asked: Questions,
    model: Sequence[str],
    baseline: Sequence[str],
    folder: Path,
    settings: Settings,
) -> Judgement:
    """The judgement of any judge but the implicit reward, on responses in the order of the prompts."""
    if judge.name == VOTE:
        matches = [Match(*match) for match in zip(asked.prompts, model, baseline, asked.told, strict=True)]
        votes = collect_votes(matches, folder, settings.training.seed, settings.of(ComparisonSettings).vote_port or 0)
        both_bad = Ballots(matches, folder, settings.training.seed).both_bad
        return Judgement(judge.name, judge.how, votes, details={"both_bad": both_bad})
    if is_endpoint(judge.name):
        shown = [show_prompt(*prompt) for prompt in zip(asked.prompts, asked.told, strict=True)]
        return _ask_endpoint(judge, list(zip(shown, model, baseline, strict=True)), settings)
    score = judge.score or load_reward_model(judge.name, settings.model.trust_remote_code, FLAG)
    # Those to one prompt stand together, as in making pairs.
    doubled = asked.select([place for place in range(len(asked.prompts)) for _ in range(2)])
    texts = [text for both in zip(model, baseline, strict=True) for text in both]
    scores = score(doubled.prompts, texts, doubled.told)
    return by_scores(judge, scores[0::2], scores[1::2])


def by_scores(judge: Judge, model: Sequence[float], baseline: Sequence[float]) -> Judgement:
    """The higher score wins; those that are equal but for rounding are a tie."""
    pairs = list(zip(model, baseline, strict=True))
    outcomes = [0.5 if are_equal(own, other) else float(own > other) for own, other in pairs]
    return Judgement(judge.name, judge.how, outcomes, pairs)


def _ask_endpoint(judge: Judge, matches: list[tuple[Prompt, str, str]], settings: Settings) -> Judgement:
    wish = settings.of(JudgeSettings)
    limits = JudgeLimits(wish.max_judge_requests, wish.judge_requests_per_minute)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "judge_answers"
    endpoint = EndpointJudge(judge.name, wish.judge_model, cache, limits, flag=FLAG)
    different = sum(one != other for _, one, other in matches)
    say(f"      asking {judge.how}: up to {2 * different:,} requests, fewer where answers are cached")
    verdicts = endpoint.weigh_all(matches)
    details = count_orders([pair for pair, (_, one, other) in zip(verdicts, matches, strict=True) if one != other])
    details |= {
        "verdicts": verdicts,
        "requests": endpoint.asked,
        "unreadable_answers": endpoint.unreadable,
        "unreadable_example": endpoint.unreadable_example[:100],
    }
    return Judgement(judge.name, judge.how, [join_orders(*pair) for pair in verdicts], details=details)


def join_orders(first: float | None, second: float | None) -> float | None:
    """A win in one order that is not lost in the other is a win; one of each is a tie, and so is neither. None where an
    answer had no verdict."""
    if first is None or second is None:
        return None
    total = first + second
    return 0.5 if total == 1 else float(total > 1)


def count_orders(verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """How often a judge's verdict went by the order, of the matches with a verdict in both."""
    read = [pair for pair in verdicts if None not in pair]
    # With the model shown first, preferring what stands first is 1; with the baseline first, it is 0.
    counts = {
        "same_in_both_orders": sum(first == second for first, second in read),
        "first_in_both_orders": sum((first, second) == (1, 0) for first, second in read),
        "second_in_both_orders": sum((first, second) == (0, 1) for first, second in read),
    }
    return {"matches_with_both": len(read), **counts, "tie_in_one_order": len(read) - sum(counts.values())}
