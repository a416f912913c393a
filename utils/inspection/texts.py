"""What a pass over the rows looks for in each text: its size, its form, and what should not be in it."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..data.turns import Value
from ..runtime import CONTROL

REFUSED = (
    r"(?:help|assist|provide|do|answer|comply|fulfil|create|write|generate|give|support|engage|discuss|share|offer|take"
    r"|participate|continue|respond|process|complete|perform|access|browse|advise|condone|encourage|promote|tell"
    r"|be able|in good|make|produce|accept|agree|say|recommend that)"
)
REFUSAL = re.compile(
    r"\W*(?:(?:(?:i['’]?m|i am|we['’]re) (?:(?:very|really|truly|so) )?sorry|sorry|apologies|i apologi[sz]e"
    r"|unfortunately)[,.]?(?: but)?,? )?(?:(?:i|we) (?:(?:can(?:no|['’])t|can not|won['’]?t|will not) (?:\w+ly )?"
    + REFUSED
    + r"|am not able to|am unable to|must decline|do not feel comfortable|don['’]t feel comfortable)"
    r"|i['’]?m (?:not able to|unable to|not comfortable|not going to)|as an ai|as a (?:large )?language model)\b",
    re.IGNORECASE,
)
BLANK = re.compile(
    r"[\W_]*(?:(?:n/?a|none|null|nil|nan|nothing|empty|todo|tbd|unknown|no (?:answer|response|output|comment)"
    r"|deleted|removed|i do(?:n['’]t| not) know|idk|not available|not applicable)[\W_]*)?",
    re.IGNORECASE,
)
LIST = re.compile(r"^[ \t]*(?:[-*•]|\d{1,2}[.)])[ \t]+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} \S", re.MULTILINE)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
FIRST_WORDS = re.compile(r"\W*([^\W_]+(?:['’][^\W_]+)?)(?:\W+([^\W_]+(?:['’][^\W_]+)?))?")
SENTENCE_ENDS = tuple(".!?…。！？\"'”’)]}`*>:|")


def has_markdown(text: str) -> bool:
    """Whether a text has a heading, bold words or a table."""
    return "**" in text or "|---" in text or "| ---" in text or ("#" in text and HEADING.search(text) is not None)


def has_list(text: str) -> bool:
    """Whether a line begins with a bullet or a number."""
    return LIST.search(text) is not None


def refuses(text: str) -> bool:
    """Whether a text begins by declining."""
    return REFUSAL.match(text[:200]) is not None


def says_nothing(text: str) -> bool:
    """Whether a text is a placeholder, or has no letter and no digit."""
    return len(text) < 60 and BLANK.fullmatch(text) is not None


# What a response can be chosen for without being better: name -> (said as "the response that ...", test of a text).
FORMS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "list": ("has a list", has_list),
    "markdown": ("has headings, bold words or a table", has_markdown),
    "code": ("has a block of code", lambda text: "```" in text),
    "refusal": ("declines", refuses),
    "blank": ("is empty (N/A, I don't know)", says_nothing),
    "paragraphs": ("has several paragraphs", lambda text: "\n\n" in text.strip()),
    "exclamation": ("has an exclamation mark", lambda text: "!" in text),
    "question": ("has a question mark", lambda text: "?" in text),
    "finished": ("ends a sentence", lambda text: text.rstrip().endswith(SENTENCE_ENDS)),
}

# With the marks of notes between the lines, which nobody types.
UNWRITTEN = re.compile(f"[{re.escape(''.join(map(chr, (*CONTROL, 0xFFF9, 0xFFFA, 0xFFFB))))}]")
# UTF-8 read as Latin-1 or Windows-1252 gives these; the second characters are those of continuation bytes.
MOJIBAKE = re.compile(
    "\ufffd|[\u00c3\u00c2][\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u00bf\u2122\u0153\u201c\u201d\u02dc\u00a6]"
    "|\u00f0\u0178[\u0080-\u024f\u2010-\u203a\u02c6-\u02dc]|\u00ef\u00bb\u00bf"
)
# In these the second character is a sign that stands behind such a letter in right text too.
RIGHT_AFTER_LETTER = re.compile("[\u00c3\u00c2][\u00ab\u00bb\u00ba\u00aa\u00b7\u00b0]")
HTML = re.compile(
    r"</?(?:p|div|br|span|a|li|ul|ol|table|tr|td|th|h[1-6]|strong|em|b|i|u|img|pre|code|blockquote|hr|sup|sub)"
    r"(?:\s[^<>]{0,400})?/?>|&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5}|#x[0-9a-f]{2,4});",
    re.IGNORECASE,
)


def has_control(text: str) -> bool:
    """Whether a text has control characters other than tab and line ends, or marks that reverse the writing."""
    return UNWRITTEN.search(text) is not None


def has_mojibake(text: str) -> bool:
    """Whether a text has the replacement character, or characters as a wrong decoding leaves them."""
    if text.isascii():
        return False
    return any(not RIGHT_AFTER_LETTER.match(found[0]) for found in MOJIBAKE.finditer(text))


def has_html(text: str) -> bool:
    """Whether a text has HTML tags or entities outside of code."""
    if "<" not in text and "&" not in text:
        return False
    return HTML.search(CODE.sub("", text) if "`" in text else text) is not None


STAINS: dict[str, Callable[[str], bool]] = {"control": has_control, "encoding": has_mojibake, "html": has_html}


def first_words(text: str) -> str:
    """The first two words, in small letters."""
    match = FIRST_WORDS.match(text[:80])
    return " ".join(word for word in match.groups() if word).lower()[:40] if match else ""


def repeats_prompt(prompt: Value, *replies: str) -> bool:
    """Whether a reply begins with all of a prompt of several words; of messages, with the last turn."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    asked = asked.strip()
    return " " in asked and any(reply.lstrip().startswith(asked) for reply in replies)


def has_answer(prompt: Value, reply: str) -> bool:
    """Whether a prompt ends with a turn of the assistant; one that is a text, with a reply of several words."""
    if isinstance(prompt, str):
        said = reply.strip()
        return " " in said and prompt.rstrip().endswith(said)
    return bool(prompt) and prompt[-1]["role"] == "assistant"


def nearly_equal(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but case, spacing and punctuation."""
    if abs(len(one) - len(other)) > 8 + len(one) // 8:
        return False
    left, right = _letters(one), _letters(other)
    return left == right and bool(left)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()
