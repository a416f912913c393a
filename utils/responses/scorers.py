"""Scores of responses, higher is better: by a Python function or a reward model.

Every scorer is called with prompts, as many responses, those to one prompt standing together, and what the template of
each prompt is given beside it (JSON texts); it returns one number for each.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.tools import list_tools
from ..errors import UserError
from ..models.untrusted import PICKLED, check_folder, explain_library
from ..user_code import describe_failure, load_function, path_of

Prompt = str | list[dict[str, Any]]
Told = Sequence[Mapping[str, str]]
Scorer = Callable[..., list[float]]  # (prompts, responses, told=None)

# Scores as near as this are the same: in what order a mean was summed says nothing about a response.
ROUNDING = 1e-9

FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def load_scorer(wish: str, flag: str = "--scorer") -> Scorer:
    """The scorer that `file.py:function` names. One with a parameter `tools` is given the tools of each prompt too.

    Raises:
        UserError: there is no such file or function, or what it returns is not one finite number per response.
    """
    function, path = load_function(flag, wish), path_of(wish)
    takes_tools = "tools" in _parameters(function)

    def score(prompts: Sequence[Prompt], responses: Sequence[str], told: Told | None = None) -> list[float]:
        more = {"tools": [list_tools(one.get("tools")) for one in told or [{}] * len(prompts)]} if takes_tools else {}
        try:
            scores = function(list(prompts), list(responses), **more)
            scores = list(scores) if isinstance(scores, Iterator) else scores
        except (Exception, SystemExit) as error:
            raise UserError(f"{flag} {wish}: failed ({describe_failure(error, path)})") from None
        try:
            numbers = [float(score) for score in scores]
        except Exception:
            raise UserError(f"{flag} {wish}: must return a list of numbers; it returned {scores!r:.80}") from None
        if len(numbers) != len(responses) or not all(map(math.isfinite, numbers)):
            raise UserError(
                f"{flag} {wish}: must return one finite number per response; for {len(responses)} responses it "
                f"returned {len(numbers)} numbers{'' if all(map(math.isfinite, numbers)) else ', some not finite'}"
            )
        return numbers

    return score


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a callable that has none to show
        return ()


def are_equal(one: float, other: float) -> bool:
    """Whether two scores differ by no more than the rounding of their computation."""
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING**2)


def check_reward_model(wish: str, trust_remote_code: bool = False, flag: str = "--scorer") -> None:
    """Refuses, before its weights are loaded, what is no reward model.

    Raises:
        UserError: there is no such model, it has more than one output, or it reaches out of its folder.
    """
    from transformers import AutoConfig

    check_folder(flag, wish)
    if os.path.isdir(wish) and not list(Path(wish).glob("*.safetensors")) and list(Path(wish).glob("*.bin")):
        raise UserError(f"{flag} {wish}: only pickled weights (.bin), which {PICKLED}; convert them to safetensors")
    config = _translating_reason(
        f"{flag} {wish}", lambda: AutoConfig.from_pretrained(wish, trust_remote_code=trust_remote_code)
    )
    architectures = config.architectures or []
    if architectures and not any("SequenceClassification" in name for name in architectures):
        raise UserError(f"{flag} {wish}: a reward model has a head that scores; this one is a {architectures[0]}")
    _check_outputs(f"{flag} {wish}", config)


def _check_outputs(flag: str, config: Any) -> None:
    if config.num_labels != 1:
        raise UserError(f"{flag}: a reward model has one output; this one has {config.num_labels}")


def _translating_reason(flag: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # what a file from elsewhere makes a library stumble over has no end
        raise UserError(
            f"{flag}: is neither a file.py:function nor a URL, and no reward model can be loaded from it "
            f"({explain_library(error)})"
        ) from None


def load_reward_model(wish: str, trust_remote_code: bool = False, flag: str = "--scorer") -> Scorer:
    """The scorer of a sequence-classification model with one output; dialogues take its chat template.

    Raises:
        UserError: it cannot be loaded, has more than one output, or has no chat template for a dialogue.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ..models.translating import translating
    from ..runtime import find_device

    check_reward_model(wish, trust_remote_code, flag)
    flag = f"{flag} {wish}"
    options = {"trust_remote_code": trust_remote_code}
    tokenizer, model = _translating_reason(
        flag,
        lambda: (
            AutoTokenizer.from_pretrained(wish, **options),
            AutoModelForSequenceClassification.from_pretrained(wish, use_safetensors=True, **options),
        ),
    )
    model = model.to(find_device()).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    longest = getattr(model.config, "max_position_embeddings", None)

    def score_one(prompt: Prompt, response: str, told: Mapping[str, str]) -> float:
        if isinstance(prompt, str):
            ids = tokenizer(prompt + response)["input_ids"]
        elif tokenizer.chat_template:
            turns, tools = [*prompt, {"role": "assistant", "content": response}], list_tools(told.get("tools"))
            text = tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            raise UserError(f"{flag}: its tokenizer has no chat template, which prompts of messages need")
        # One by one: padding would have to be on the side that each architecture reads its score from.
        with torch.no_grad():
            row = torch.tensor([ids[-longest:] if longest else ids], device=model.device)
            return model(input_ids=row).logits[0, 0].item()

    def score(prompts: Sequence[Prompt], responses: Sequence[str], told: Told | None = None) -> list[float]:
        texts = zip(prompts, responses, told or [{}] * len(prompts), strict=True)
        return translating(f"{flag}: cannot score", lambda: [score_one(*text) for text in texts])

    score(["Is this a text?"], [" Yes, 1."])  # before responses are written that it cannot score
    return score
