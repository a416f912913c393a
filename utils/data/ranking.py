"""Rows that hold several answers to a prompt -> pairs of a better and a worse one.

Every such form is first brought to the same thing, a prompt with scored answers; then one rule chooses the pairs.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from .calls import BadRow, read_calls
from .html_text import html_to_text
from .labels import find_better, read_number
from .layouts import GIVEN, SIGNED_LABELS
from .turns import SAID_BESIDE, as_messages, check_fields, is_message, role_of

TEXT_KEYS = ("response", "text", "answer", "output", "content", "completion", "generation", "value", "body")
SCORE_KEYS = ("overall_score", "fine-grained_score", "pm_score", "score", "rating", "reward")
RANK_KEYS = ("rank", "ranking")  # the lowest is the best
CITATION = re.compile(r"[ \t]*\[\d+(?:\s*,\s*\d+)*\]")

# What is left out on purpose, of good data too: counted, never an error.
TIE = "the answers have equal scores (a tie)"
SMALL_GAP = "no two scores in the row differ by --min_score_gap"
SMALL_RATIO = "the score ratio is below --min_score_ratio"
ONE_ANSWER = "fewer than two answers with a score"
NO_OTHER_LABEL = "no answer with the other label for the same prompt"
NOT_WANTED = "the answer is labelled as bad"
ADAPTER_SKIPS = "the adapter returned None"
LEFT_OUT = frozenset({TIE, SMALL_GAP, SMALL_RATIO, ONE_ANSWER, NO_OTHER_LABEL, NOT_WANTED, ADAPTER_SKIPS})


@dataclass(frozen=True)
class Choice:
    """Which pairs are made of scored answers. `best_only`: no pair, the best answer alone (sft)."""

    pairs_per_prompt: int = 1
    min_score_gap: float | None = None
    min_score_ratio: float | None = None
    strip_citations: bool = False
    best_only: bool = False
    ordered: bool = False  # lists without scores are read as the best first
    numbered: bool = False  # the labels of two answers are numbers
    any_two: bool = False  # the first two answers whatever their scores: to see how rows are written


@dataclass(frozen=True)
class Answer:
    """A text or messages; a higher score is better."""

    value: Any
    score: float | None


def choose_pairs(answers: Sequence[Answer], choice: Choice) -> list[tuple[Answer, Answer]]:
    """Better and worse answers, at most `choice.pairs_per_prompt` pairs.

    The best comes first, against a lower-scored one that a hash of the two draws, the same in every run; once it has
    met all of those, the second best follows. With `best_only` the second answer is the best too.

    Raises BadRow, with a reason of LEFT_OUT, where no pair can be made.
    """
    if choice.any_two and answers:
        return [(answers[0], answers[-1])]
    scored = sorted((answer for answer in answers if answer.score is not None), key=lambda answer: -answer.score)
    if choice.best_only and scored:
        return [(scored[0], scored[0])]
    if len(scored) < 2:
        raise BadRow(ONE_ANSWER)
    gap = choice.min_score_gap or 0.0
    pairs: list[tuple[Answer, Answer]] = []
    for number, better in enumerate(scored[:-1]):
        worse = [a for a in scored[number + 1 :] if a.score < better.score and better.score - a.score >= gap]
        pairs += [(better, answer) for answer in sorted(worse, key=lambda answer: _draw(better, answer))]
        if len(pairs) >= choice.pairs_per_prompt:
            break
    if not pairs:
        raise BadRow(TIE if scored[0].score == scored[-1].score else SMALL_GAP)
    return pairs[: choice.pairs_per_prompt]


def _draw(better: Answer, worse: Answer) -> bytes:
    return blake2b(repr((better.value, worse.value)).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def make_rows(
    prompt: Any, answers: Sequence[Answer], parts: Mapping[str, Any], choice: Choice, scored: bool = True
) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen`, `rejected`, their scores where `scored`, and the parts that hold for all."""
    common = {name: parts[name] for name in ("system", "tools", "context", *GIVEN) if name in parts}
    return [
        {
            "prompt": prompt,
            "chosen": better.value,
            "rejected": worse.value,
            "chosen_score": better.score if scored else None,
            "rejected_score": worse.score if scored else None,
            **common,
        }
        for better, worse in choose_pairs(answers, choice)
    ]


def expand_list(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """A list of answers that carry their scores or ranks, or one with a second list of scores or ranks."""
    values = parts.get("answers")
    if not isinstance(values, list):
        raise BadRow(f"'{names['answers']}' is not a list of answers")
    if "scores" in parts or "ranks" in parts:
        scores = _listed_scores(parts, names, len(values))
    elif choice.ordered and not any(isinstance(value, Mapping) for value in values):
        scores = [-float(index) for index in range(len(values))]
    else:
        scores = _inner_scores(values)
    answers = [
        Answer(text, score)
        for text, score in zip((_answer_text(value, names) for value in values), scores, strict=True)
        if not _is_blank(text)
    ]
    return make_rows(parts.get("prompt"), answers, parts, choice)


def expand_html_list(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """The same, with prompt and answers in HTML."""
    rows = expand_list(parts, names, choice)
    return [row | {part: _plain(row[part]) for part in ("prompt", "chosen", "rejected")} for row in rows]


def _plain(value: Any) -> Any:
    return html_to_text(value) if isinstance(value, str) else value


def _answer_text(value: Any, names: Mapping[str, str]) -> Any:
    if value is None or isinstance(value, str | list) or is_message(value):
        return value
    if isinstance(value, Mapping):
        check_fields(value, names["answers"], SAID_BESIDE)
        return next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)
    raise BadRow(f"'{names['answers']}' is not a list of answers")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def _inner_scores(values: Sequence[Any]) -> list[float | None]:
    """By the first kind of score that two answers have; a rank counts down."""
    entries = [value if isinstance(value, Mapping) else {} for value in values]
    for key in (*SCORE_KEYS, *RANK_KEYS):
        scores = [read_number(entry.get(key)) for entry in entries]
        if sum(score is not None for score in scores) >= min(2, len(scores)):
            return [None if s is None else -s for s in scores] if key in RANK_KEYS else scores
    return [None] * len(values)


def _listed_scores(parts: Mapping[str, Any], names: Mapping[str, str], count: int) -> list[float | None]:
    part = "scores" if "scores" in parts else "ranks"
    listed = parts[part]
    if not isinstance(listed, list) or len(listed) != count:
        raise BadRow(f"'{names[part]}' is not a list as long as '{names['answers']}'")
    scores = [read_number(value) for value in listed]
    return scores if part == "scores" else [None if score is None else -score for score in scores]


def expand_two(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """Two answers with a label that names the better one, or with a score each."""
    scores = [read_number(parts.get("first_score")), read_number(parts.get("second_score"))]
    has_scores = "first_score" in parts
    if "label" in parts and not choice.any_two:
        scores, has_scores = _labelled_scores(parts["label"], names, choice, scores if has_scores else None)
        if choice.min_score_gap is not None and not has_scores:
            raise BadRow(SMALL_GAP)  # the scores are missing, or say the contrary of the label
    ratio = read_number(parts.get("ratio"))
    if choice.min_score_ratio is not None and not choice.any_two and (ratio is None or ratio < choice.min_score_ratio):
        raise BadRow(SMALL_RATIO)
    values = [parts[part] for part in ("first", "second")]
    if choice.strip_citations:
        values = [CITATION.sub("", value) if isinstance(value, str) else value for value in values]
    answers = [Answer(value, score) for value, score in zip(values, scores, strict=True)]
    return make_rows(parts.get("prompt"), answers, parts, choice, has_scores)


def _labelled_scores(
    label: Any, names: Mapping[str, str], choice: Choice, scores: list[float | None] | None
) -> tuple[list[float | None], bool]:
    """Scores that agree with the label, which decides, and whether they say more than the label does."""
    if names["label"] in SIGNED_LABELS:
        strength = read_number(label)
        if strength is None:
            raise BadRow(f"'{names['label']}' is not a number")
        return [max(-strength, 0.0), max(strength, 0.0)], True
    better = find_better(label, names, choice.numbered)
    if better is None:
        raise BadRow(TIE)
    if scores is not None and None not in scores and scores[better] > scores[1 - better]:
        return scores, True
    return [float(better == 0), float(better == 1)], False


def expand_tree(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """A tree of messages: the ranked replies of the assistant to each message of a person, whose way is the prompt."""
    rows: list[dict[str, Any]] = []
    reasons: list[BadRow] = []
    for path, replies in _walk(parts, is_sample=choice.any_two):
        answers = [
            Answer([{"role": "assistant", "content": reply["text"]}], _rank_score(reply, len(replies)))
            for reply in replies
        ]
        try:
            rows += make_rows(path, answers, {}, choice, scored=False)
        except BadRow as reason:
            reasons.append(reason)
    if not rows:
        raise reasons[0] if reasons else BadRow(ONE_ANSWER)
    return rows


def _rank_score(reply: Mapping[str, Any], siblings: int) -> float | None:
    rank = read_number(reply.get("rank"))
    return 0.0 if rank is None and siblings == 1 else None if rank is None else -rank


def _walk(parts: Mapping[str, Any], is_sample: bool) -> Iterator[tuple[list[dict[str, str]], list[Mapping[str, Any]]]]:
    """Each message of a person with the way to it, and the replies that were not deleted, from the root down."""
    if not _is_said(parts):
        raise BadRow("the tree has no first message")
    waiting: deque[tuple[list[dict[str, str]], Any]] = deque([([], parts)])
    while waiting:
        path, node = waiting.popleft()
        role = role_of(node)
        if role not in ("user", "assistant"):
            raise BadRow("the tree has a message with an unknown role")
        if not is_sample:
            check_fields(node, "the tree", SAID_BESIDE)
        path = [*path, {"role": role, "content": node["text"]}]
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise BadRow("the tree has replies that are not a list of messages")
        replies = [reply for reply in replies if _is_said(reply)]
        if role == "user" and replies:
            yield path, replies
        waiting += [(path, reply) for reply in replies]


def _is_said(node: Mapping[str, Any]) -> bool:
    return isinstance(node.get("text"), str) and bool(node["text"].strip()) and node.get("deleted") is not True


def add_context(prompt: str, context: Any) -> str:
    """An instruction with its input, where it has any."""
    return f"{prompt}\n\n{context}" if prompt and isinstance(context, str) and context.strip() else prompt


def expand_history(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """A row whose earlier rounds stand in a list of [question, answer]: the prompt becomes messages."""
    rounds = parts.get("history") or []
    prompt = parts.get("prompt")
    if not isinstance(rounds, list) or not all(isinstance(r, list) and len(r) == 2 for r in rounds):
        raise BadRow(f"'{names['history']}' is not a list of rounds of two texts")
    if not all(isinstance(text, str) for r in rounds for text in r):
        raise BadRow(f"'{names['history']}' is not a list of rounds of two texts")
    turns = [
        {"role": role, "content": text} for r in rounds for role, text in zip(("user", "assistant"), r, strict=True)
    ]
    if isinstance(prompt, str):
        prompt = add_context(prompt, parts.get("context"))
        prompt = [*turns, {"role": "user", "content": prompt}] if prompt.strip() else None
    return [dict(parts) | {"prompt": prompt}]


def expand_answered(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """A dialogue whose last reply is the chosen one, beside a rejected one."""
    messages = parts.get("prompt")
    if messages is None:
        raise BadRow(f"'{names['prompt']}' is missing")
    messages = as_messages(messages)
    if messages is None:
        raise BadRow(f"'{names['prompt']}' is not a list of messages")
    start = len(messages)
    while start > 0 and role_of(messages[start - 1]) == "assistant":
        start -= 1
    if messages and start == len(messages):
        raise BadRow(
            f"'{names['prompt']}' ends with a turn of the {role_of(messages[-1])}: there is no reply to train on"
        )
    return [dict(parts) | {"prompt": messages[:start], "chosen": messages[start:]}]


def expand_calls(parts: Mapping[str, Any], names: Mapping[str, str], choice: Choice) -> list[dict[str, Any]]:
    """A row whose answer is a list of tool calls."""
    if parts.get("completion") in (None, ""):
        raise BadRow(f"'{names['completion']}' is missing")
    calls = read_calls(parts["completion"], names["completion"])
    if not calls:
        raise BadRow(f"'{names['completion']}' is empty")
    return [dict(parts) | {"completion": [{"role": "assistant", "content": None, "tool_calls": calls}]}]


# By the names that layouts give them.
EXPANSIONS: dict[str, Callable[[Mapping[str, Any], Mapping[str, str], Choice], list[dict[str, Any]]]] = {
    "two answers": expand_two,
    "list of answers": expand_list,
    "list of answers in HTML": expand_html_list,
    "tree of messages": expand_tree,
    "answered dialogue": expand_answered,
    "earlier rounds": expand_history,
    "calls as the answer": expand_calls,
}
