"""A conversation with one model: its turns, and how much of them the model is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.encoding import PromptEncoder
from ..data.rendering import Turns
from ..errors import UserError

SHARE_FOR_ANSWERS = 4  # of the context, one part in so many is kept free for an answer


@dataclass(frozen=True)
class Shown:
    """What a model is given to answer: a text or turns, the room for the answer in tokens, the turns left out."""

    prompt: str | Turns
    room: int
    left_out: int


@dataclass
class Dialogue:
    """Turns of a user and an assistant. `is_text`: the model continues texts, and each message stands alone."""

    is_text: bool
    system: str | None = None
    tools: str | None = None  # that the template is shown, as JSON
    turns: Turns = field(default_factory=list)
    said_left_out: int = 0  # what the person was told is no longer shown

    def ask(self, text: str, role: str = "user") -> None:
        """Adds a message of the user, or the result of a tool."""
        self.turns.append({"role": role, "content": text})

    def answer(self, text: str) -> None:
        """Adds the assistant's answer."""
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> dict[str, str] | None:
        """Takes back the last message with its answer; returns the message."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] != "assistant":
                rounds = sum(turn["role"] == "user" for turn in self.turns)
                self.said_left_out = min(self.said_left_out, rounds)
                return turn
        return None

    def reset(self) -> None:
        """Begins anew, with the same system prompt."""
        self.turns.clear()
        self.said_left_out = 0

    def messages(self) -> Turns:
        """All of it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    @property
    def options(self) -> dict[str, list[str | None]]:
        """What an encoder of its prompts is told beside them."""
        return {} if self.tools is None else {"tools": [self.tools]}

    def fit(self, encoder: PromptEncoder, context: int | None, max_new_tokens: int) -> Shown:
        """What to show of it: all, or as much of its end as leaves room for an answer.

        Raises:
            UserError: the last message alone fills the context.
        """
        free = 0 if context is None else min(max_new_tokens, max(1, context // SHARE_FOR_ANSWERS))
        starts = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        for start in starts[-1:] if self.is_text else starts:
            prompt = self._shown(start)
            length = len(encoder.encode_prompts([prompt], **self.options)[0])
            if context is None:
                return Shown(prompt, max_new_tokens, 0)
            if length + free <= context or (start == starts[-1] and length < context):
                return Shown(prompt, min(max_new_tokens, context - length), 0 if self.is_text else starts.index(start))
        raise UserError(f"the message is {length} tokens long, and this model reads at most {context}; shorten it")

    def _shown(self, start: int) -> str | Turns:
        if self.is_text:
            return self.turns[start]["content"]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns[start:]]
