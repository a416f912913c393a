"""Which language a text is in, by its script and its commonest words: enough to see a mixture, no more than that.

Scripts that one language has to itself name it. Latin script is told by function words, of which a text must have
two, and at least one in twelve words; else it is "unclear" (short texts, code, lists of names).
"""

from __future__ import annotations

import re
from collections import Counter

READ = 600  # characters of a text that are looked at
FEWEST_LETTERS = 3
FEWEST_WORDS, SMALLEST_SHARE = 2, 1 / 12

# First code points of scripts, ascending; from one to the next a script holds.
_SCRIPTS = (
    (0x0000, "Latin"), (0x0370, "Greek"), (0x0400, "Cyrillic script"), (0x0530, "Armenian"), (0x0590, "Hebrew"),
    (0x0600, "Arabic script"), (0x0900, "Devanagari script"), (0x0980, "Bengali"), (0x0A00, "other"), (0x0B80, "Tamil"),
    (0x0C00, "Telugu"), (0x0C80, "other"), (0x0E00, "Thai"), (0x0E80, "other"), (0x1100, "Korean"),
    (0x1200, "other"), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, ""), (0x3040, "Japanese"), (0x3100, "Chinese"),
    (0x3130, "Korean"), (0x3190, ""), (0x3400, "Chinese"), (0x4DC0, ""), (0x4E00, "Chinese"), (0xA000, "other"),
    (0xAC00, "Korean"), (0xD7B0, ""), (0x20000, "Chinese"), (0x32000, ""),
)  # fmt: skip

_WORDS = {
    "English": "the of and to in is that it for was on with as you this be are have not what how i can your an or from"
    " there they he she his her had my we but at by if would will do does about which their has who when where why",
    "Spanish": "de la que el en y los del se las por un para con no una su al es lo como más pero qué cómo está son",
    "French": "de la le et les des en un du une que est pour qui dans par plus pas au sur ne se ce il sont avec vous",
    "German": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an wie ich sie",
    "Portuguese": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à são",
    "Italian": "di che è e la il un a per in una mi sono ho non con si da come ma del le i gli della questo più nel",
    "Dutch": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij uit nog naar ik je",
    "Polish": "i w na z do się nie że to jest o jak za po co od ale czy tak jego są dla przez przy który tego już",
    "Turkish": "ve bir bu da de için ile çok ne olarak daha gibi en kadar sonra mi ki var olan her ben o değil ama",
    "Swedish": "och i att det som en på är av för med till den har de inte om ett han var jag men så från vi kan",
    "Indonesian": "yang dan di untuk dengan ini pada tidak dari dalam akan adalah itu ke saya bisa anda oleh juga atau",
    "Vietnamese": "và là của có không được cho trong với những một các này đã người khi để từ như về bạn tôi cách",
}
_LANGUAGES_OF: dict[str, tuple[str, ...]] = {}
for _language, _words in _WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF[_word] = (*_LANGUAGES_OF.get(_word, ()), _language)
_LATIN_WORD = re.compile(r"[^\W\d_]+")

UNCLEAR = "unclear"
LANGUAGES = (UNCLEAR, *_WORDS, *sorted({name for _, name in _SCRIPTS} - {"", "Latin"}))
NUMBERS = {name: number for number, name in enumerate(LANGUAGES)}


def number_language(text: str) -> int:
    """The index in LANGUAGES of the language that a text seems to be in."""
    start = text[:READ]
    if not start.isascii():
        script = _main_script(start)
        if script != "Latin":
            return NUMBERS[script or UNCLEAR]
    words = _LATIN_WORD.findall(start.lower())
    counts: Counter[str] = Counter()
    for word in words:
        if word in _LANGUAGES_OF:
            counts.update(_LANGUAGES_OF[word])
    if not counts:
        return NUMBERS[UNCLEAR]
    (language, most), *others = counts.most_common(2)
    tied = bool(others) and others[0][1] == most
    if tied or most < FEWEST_WORDS or most < SMALLEST_SHARE * len(words):
        return NUMBERS[UNCLEAR]
    return NUMBERS[language]


def _main_script(text: str) -> str:
    """The script of most letters; kana among Chinese characters means Japanese."""
    counts: Counter[str] = Counter()
    latin = 0
    for char in text:
        if char.isalpha():
            code = ord(char)
            if code < 0x370:
                latin += 1
            else:
                counts[_script_of(code)] += 1
    counts["Latin"] += latin
    if counts["Japanese"] * 10 > counts["Chinese"] > 0:
        counts["Japanese"] += counts.pop("Chinese")
    script, most = counts.most_common(1)[0]
    return script if most >= FEWEST_LETTERS else ""


def _script_of(code: int) -> str:
    return next(name for start, name in reversed(_SCRIPTS) if code >= start)
