"""The forms of data: which columns hold what, and in which order forms are tried.

A `Layout` is known by the columns it needs, not by the data set's name, so local copies and look-alikes are read too.
This file is a table that imports nothing of ours: --dataset_format offers what it names. Shapes, `expand` and `fits`
name what `shapes.py` and `ranking.py` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

# What --dataset_format takes, in the order in which it is told to people: forms of pairs, and what else sft reads.
PAIR_FORMATS = (
    "explicit_prompt",
    "implicit_prompt",
    "transcripts",
    "openai",
    "sharegpt",
    "alpaca",
    "scored_answers",
    "ranked_answers",
    "two_answers",
    "webgpt",
    "shp",
    "stack_exchange",
    "stack_exchange_paired",
    "message_tree",
    "unpaired",
)
SFT_FORMATS = ("prompt_completion", "function_calls", "messages", "instruction", "text")

KWARGS, DOCUMENTS = "chat_template_kwargs", "documents"
GIVEN = (KWARGS, DOCUMENTS)  # parts that a row gives its chat template beside messages and tools
SIGNED_LABELS = ("preference_strength", "overall_preference")  # below 0: the first is better, by so much
ANY_SHAPE = ("texts with a system prompt", "texts", "messages with a prompt", "messages")


@dataclass(frozen=True)
class Layout:
    """Which columns play which part: the first candidate that exists. Parts in `optional` may be absent.

    `shapes` are the ways in which the values may be written. Where `expand` is given, it makes simple rows (`prompt`,
    `chosen`, `rejected`) of one that holds several answers; those are then read by their shape. `fits` looks at the
    first rows where names alone do not tell. `pairs_up`: pairs are made of several rows (those with a `label`).
    `both_sides`: where one reply alone is read (sft), the other one's column is needed as well.
    """

    name: str
    parts: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = (
        *("system", "tools", "rejected_tools", "context", "chosen_score", "rejected_score"),
        *GIVEN,
    )
    shapes: tuple[str, ...] = ANY_SHAPE
    expand: str | None = None
    says: str = ""
    fits: str | None = None
    strips_citations: bool = False
    pairs_up: bool = False
    both_sides: bool = False

    def is_scored(self, names: Mapping[str, str]) -> bool:
        """Whether the rows say how good each answer is."""
        return {"chosen_score", "rejected_score"} <= set(names) or bool(
            {"answers", "first_score"} & set(names) or names.get("label") in SIGNED_LABELS
        )


OF_TEMPLATE = {name: (name,) for name in GIVEN}
# Where each side has its own tools, they must be the same: the prompt is one.
TOOLS = {"tools": ("tools", "chosen_tools", "functions"), "rejected_tools": ("rejected_tools",)}
SYSTEM = {"system": ("system", "system_prompt")} | TOOLS | OF_TEMPLATE
PROMPT = {"prompt": ("prompt", "question")} | SYSTEM
REPLY_NAMES = ("{}", "{}_response", "{}_answer", "{}_output", "{}_completion", "{}_text", "{}_messages", "response_{}")
SIDES = {"chosen": ("chosen", "preferred", "accepted"), "rejected": ("rejected", "dispreferred", "non_preferred")}
REPLIES = {part: tuple(name.format(word) for word in words for name in REPLY_NAMES) for part, words in SIDES.items()}
SCORES = {
    "chosen_score": ("score_chosen", "chosen_score", "chosen_rating"),
    "rejected_score": ("score_rejected", "rejected_score", "rejected_rating"),
}
ANY_PROMPT = {
    "prompt": ("prompt", "question", "instruction", "query", "context", "history", "input"),
    "context": ("input",),
} | SYSTEM
CONVERSATION = ("conversations", "conversation", "messages")
INSTRUCTION = {"prompt": ("instruction", "query", "input"), "context": ("input",)} | SYSTEM

TRANSCRIPTS = Layout(
    "transcripts", PROMPT | REPLIES | SCORES, (*Layout.optional, "prompt"), ("transcripts",)
)  # the prompt is in the transcripts; a column of its own is not needed
EXPLICIT = Layout("explicit_prompt", PROMPT | REPLIES | SCORES, shapes=ANY_SHAPE[:3])
IMPLICIT = Layout("implicit_prompt", SYSTEM | REPLIES | SCORES, shapes=("messages",))
ALIKE = Layout(
    "implicit_prompt", REPLIES | SCORES, shapes=("texts that begin alike",), fits="begin alike", both_sides=True
)
ASSUMED_ALIKE = replace(ALIKE, fits=None)  # as it is told to be; other columns or rows may speak against it
OPENAI = Layout(
    "openai",
    {
        "prompt": ("input.messages",),
        "chosen": ("preferred_output",),
        "rejected": ("non_preferred_output",),
        "tools": ("input.tools", "tools"),
    }
    | OF_TEMPLATE,
    shapes=ANY_SHAPE[:3],
)
SHAREGPT = Layout("sharegpt", {"prompt": CONVERSATION} | SYSTEM | REPLIES | SCORES, shapes=("messages with a prompt",))
ANSWERED = Layout(
    "sharegpt",
    {"prompt": CONVERSATION} | SYSTEM | {"rejected": REPLIES["rejected"]} | SCORES,
    shapes=("messages with a prompt",),
    expand="answered dialogue",
    says="a dialogue that ends with the chosen reply",
)
HISTORY = Layout(
    "alpaca",
    INSTRUCTION | REPLIES | SCORES | {"history": ("history",)},
    shapes=("messages with a prompt",),
    expand="earlier rounds",
    says="instruction, input and earlier rounds",
)
ALPACA = Layout("alpaca", INSTRUCTION | REPLIES | SCORES, shapes=ANY_SHAPE[:3])
STACK_PAIRED = Layout(
    "stack_exchange_paired",
    {"prompt": ("question",), "chosen": ("response_j",), "rejected": ("response_k",)},
    shapes=ANY_SHAPE[:3],
)

TWO = "two answers; the better one is chosen"
WEBGPT = Layout(
    "webgpt",
    {
        "prompt": ("question.full_text", "question"),
        "first": ("answer_0",),
        "second": ("answer_1",),
        "first_score": ("score_0",),
        "second_score": ("score_1",),
    },
    expand="two answers",
    says=TWO,
    strips_citations=True,
)
SHP = Layout(
    "shp",
    {
        "prompt": ("history",),
        "first": ("human_ref_A",),
        "second": ("human_ref_B",),
        "label": ("labels",),
        "first_score": ("score_A",),
        "second_score": ("score_B",),
        "ratio": ("score_ratio",),
    },
    ("first_score", "second_score", "ratio"),
    expand="two answers",
    says=TWO,
)
STACK_EXCHANGE = Layout(
    "stack_exchange",
    {"prompt": ("question",), "answers": ("answers",), "id": ("qid",)},
    expand="list of answers in HTML",
    says="scored answers in HTML, read as text; the best against a lower-scored one",
    fits="rated answers",
)
ANSWERS = ("completions", "answers", "responses", "generations", "candidates", "outputs", "all_generated_responses")
BEST = "the best against a lower-scored one"
SCORE_LIST = Layout(
    "scored_answers",
    ANY_PROMPT | {"answers": ANSWERS, "scores": ("scores", "ratings", "rating", "rewards", "all_rm_scores", "score")},
    expand="list of answers",
    says=f"answers with a list of scores; {BEST}",
    fits="lists",
)
RANK_LIST = Layout(
    "scored_answers",
    ANY_PROMPT | {"answers": ANSWERS, "ranks": ("ranks", "rank", "ranking", "rankings")},
    expand="list of answers",
    says=f"answers with a list of ranks; {BEST}",
    fits="lists",
)
SCORED = Layout(
    "scored_answers",
    ANY_PROMPT | {"answers": ANSWERS},
    expand="list of answers",
    says=f"answers with their scores or ranks; {BEST}",
    fits="rated answers",
)
RANKED = Layout(
    "ranked_answers",
    ANY_PROMPT | {"answers": (*ANSWERS, "output")},
    expand="list of answers",
    says="answers, the best first; the best against a later one",
    fits="lists",
)  # only when it is asked for: the order of a list alone says nothing
TREE = Layout(
    "message_tree",
    {
        "text": ("prompt.text", "text"),
        "role": ("prompt.role", "role"),
        "replies": ("prompt.replies", "replies"),
        "deleted": ("prompt.deleted", "deleted"),
    },
    ("deleted",),
    ("messages with a prompt",),
    expand="tree of messages",
    says="trees of messages; the replies to each message of a person, by rank",
)
UNPAIRED = Layout(
    "unpaired",
    PROMPT | {"completion": ("completion", *CONVERSATION), "label": ("label", "kto_tag")},
    (*Layout.optional, "prompt"),
    says="answers with a true/false label, paired where a prompt has both labels",
    fits="yes or no",
    pairs_up=True,
)

LABELS = {
    "label": (
        *("winner", "preference", "preferred", "better", "better_response_id", "label", "labels", "choice", "chosen"),
        *SIGNED_LABELS,
    )
}
ENDINGS = (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
STEMS = ("response", "output", "answer", "completion", "conversation", "generation", "summary", "text", "human_ref")


def _two_answers(stem: str, endings: tuple[str, str]) -> tuple[Layout, Layout]:
    """Columns such as response_a and response_b: with a label, and with scores alone."""
    scores = {
        part: tuple(f"{word}{ending}" for word in ("score", "rating", f"{stem}_score"))
        for part, ending in zip(("first_score", "second_score"), endings, strict=True)
    }
    parts = ANY_PROMPT | {"first": (stem + endings[0],), "second": (stem + endings[1],)} | scores
    may_lack = (*Layout.optional, "prompt", "ratio")
    return (
        Layout(
            "two_answers",
            parts | LABELS | {"ratio": ("score_ratio",)},
            (*may_lack, "first_score", "second_score"),
            expand="two answers",
            says=TWO,
            fits="short labels",
        ),
        Layout("two_answers", parts, may_lack, expand="two answers", says=TWO),
    )


TWO_ANSWERS = tuple(layout for names in product(STEMS, ENDINGS) for layout in _two_answers(*names))

# For sft.
COMPLETION = Layout(
    "prompt_completion",
    PROMPT | {"completion": ("completion",)},
    (*Layout.optional, "prompt"),
    ("transcripts", *ANY_SHAPE),
)
FUNCTION_CALLS = Layout(
    "function_calls",
    {"prompt": ("query",), "completion": ("answers",), "tools": ("tools",), "system": SYSTEM["system"]},
    ("system",),
    shapes=("messages with a prompt",),
    expand="calls as the answer",
    says="a question, answered by the calls of tools",
)
DIALOGUE = Layout(
    "messages", {"completion": ("messages", "conversations", "conversation")} | SYSTEM, shapes=("messages",)
)
TASK = {"prompt": ("instruction",), "context": ("input",), "completion": ("output", "response"), "system": ("system",)}
DEMONSTRATION_HISTORY = Layout(
    "instruction",
    TASK | {"history": ("history",)},
    shapes=("messages with a prompt",),
    expand="earlier rounds",
    says="instruction, input and earlier rounds",
)
DEMONSTRATION = Layout("instruction", TASK, shapes=ANY_SHAPE[:2])
WHOLE_TEXT = Layout("text", {"text": ("text",)}, shapes=("whole texts",))

PAIRS = (TRANSCRIPTS, EXPLICIT, IMPLICIT, OPENAI, SHAREGPT, HISTORY, ALPACA, STACK_PAIRED, ALIKE)
RATED = (WEBGPT, SHP, STACK_EXCHANGE, SCORE_LIST, RANK_LIST, SCORED, TREE, *TWO_ANSWERS)
ONLY_ASKED_FOR = (RANKED, ASSUMED_ALIKE)
LAYOUTS = {
    "train": (*PAIRS, ANSWERED, *RATED, UNPAIRED, *ONLY_ASKED_FOR),
    "sft": (
        UNPAIRED,
        COMPLETION,
        FUNCTION_CALLS,
        *PAIRS,
        DIALOGUE,
        ANSWERED,
        DEMONSTRATION_HISTORY,
        DEMONSTRATION,
        *RATED,
        WHOLE_TEXT,
        *ONLY_ASKED_FOR,
    ),
}
FLAGS = {"train": ("prompt", "chosen", "rejected"), "sft": ("prompt", "chosen", "completion", "text")}


def sft_reply(layout: Layout) -> str:
    """The part that is imitated."""
    known = ("completion",) if layout.expand else ("completion", "chosen", "text")
    return next((part for part in known if part in layout.parts), "chosen")
