"""argv and --config FILE to Settings: every fault of both is gathered and raised as one UserError.

The tokens are read here and argparse only lays out the help, because its parser stops at the first fault.
Nothing heavy is imported, so that --help and a typo answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..run.program import join_command
from ..runtime import HALF_CHARACTER, is_main_process, make_visible
from ..settings.flags import Bound
from ..settings.registry import DEFAULT_VERB, VERBS, Verb, acts_as, find_verb
from ..settings.training import Settings, flags_of
from .candidate import Candidate
from .config_file import Entry, read_config, read_entry
from .cross_checks import cross_faults
from .flag_values import YES_NO, ValueType, annotated_type, as_texts, is_number, read_list, read_text
from .foreign_configs import LIKE_OURS, describe_foreign, tool_of
from .foreign_names import NAMES, OTHER_LOSSES, OTHER_VERBS, read_as_ours, reads
from .help_text import help_text, usage, versions
from .trainer_fields import owned_reason, trainer_fields

# Settings that make the script run what they name: a person's words alone, never those of a record.
NAMES_CODE = frozenset({"trust_remote_code", "dataset_adapter", "judge", "scorer", "judge_model", "config"})

HYDRA = re.compile(r"\+{0,2}(?:[A-Za-z_]\w*\.)*(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
NEGATION = re.compile(r"(no|not|non|dont|do_not|without|disable|skip)_")
ADDRESS_WITH_PASSWORD = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://[^/\s]*@")


@dataclass(frozen=True)
class Flag:
    """A flag of the verb: one of our settings, or, where `ours` is false, a field of the trainer's config."""

    name: str
    kind: ValueType
    ours: bool
    choices: tuple[str, ...] | None = None
    bound: Bound | None = None
    usual: str | None = None


def parse_arguments(argv: list[str]) -> Settings:
    """The settings of a run, from the command line (without the program's name) and the --config file it names.

    Raises UserError with every fault found, SystemExit(0) after printing what --help or --version asks for, and
    SystemExit(2) after printing how the command is used where there are no words at all.
    """
    _answer(argv)
    faults: list[str] = []
    verb_word, entries = split_argv(argv, faults)
    notes = [f"{verb_word}: read as {DEFAULT_VERB}"] if verb_word == "dpo" else []
    path, tool = _tool_of_config(entries)
    entries, complete = _with_config(entries, faults, notes)
    _tell(notes)
    config_verb = entries.pop("verb", None)
    label = "" if verb_word or not config_verb else f"{config_verb.label} is "
    verb = choose_verb(
        _verb_of(verb_word, " ".join(config_verb.texts) if config_verb else None), label, faults, entries.values()
    )
    entries = _pass_over_other_verbs(verb, entries)
    if not complete:  # of flags that are not this verb's, nothing can be said: the file may have named another
        entries = {name: entry for name, entry in entries.items() if name in known_flags(verb)}
    values, broken = _read_entries(verb, entries.values(), faults)
    settings = _build_settings(verb, values, frozenset(values) | broken)
    labels = {entry.name: entry.label for entry in entries.values()}
    if complete:
        faults += cross_faults(Candidate(settings, labels, broken))
    if faults:
        raise UserError(*dict.fromkeys(faults), *([describe_foreign(path, tool)] if tool else []))
    return _join_trackers(settings)


def _tool_of_config(entries: Mapping[str, Entry]) -> tuple[str, str | None]:
    """The --config file and the other tool that it is of, if it is.

    Raises:
        UserError: it is of a tool whose keys are not read as they are.
    """
    path = entries["config"].texts[0] if "config" in entries and entries["config"].texts else ""
    try:
        tool = tool_of(entry.name for entry in read_config(path)) if path else None
    except UserError:  # which is said where it is read
        tool = None
    if tool and tool != LIKE_OURS:
        raise UserError(describe_foreign(path, tool))
    return path, tool


def _answer(argv: list[str]) -> None:
    """Answers what asks for no run: --help, `help VERB`, --version, or no words at all."""
    if not argv:
        if is_main_process():
            print(usage(), end="", file=sys.stderr)
        raise SystemExit(2)
    if argv[0] in ("--version", "version"):
        print(versions())
        raise SystemExit(0)
    at = 0 if argv[0] == "help" else next((n for n, token in enumerate(argv) if token in ("-h", "--help")), None)
    if at is None:
        return
    words, after = (argv[:at], argv[at + 1 :]) if at else (argv[1:], [])
    length = next((n for n in (2, 1) if find_verb(" ".join(words[:n]))), 0)
    word = " ".join(words[:length]) or (words[0] if at and not words[0].startswith("-") else None)
    topic = next((word for word in after or words[length:] * (not at) if not word.startswith("-")), None)
    print(help_text(choose_verb(word, "", []), topic), end="")
    raise SystemExit(0)


def command_line(settings: Settings) -> list[str]:
    """The argv that gives these settings again: the verb and what the person set, from flags and config alike."""
    given = {name: value for name, value in settings.flat().items() if name in settings.given}
    return settings.verb.split() + words_of(given)


def words_of(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give flags these values, by their names."""
    argv = []
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
            continue
        texts = ["none"] if name == "report_to" and not value else as_texts(value)
        if len(texts) == 1 and (not texts[0] or _is_flag(texts[0])):
            argv.append(f"--{name}={texts[0]}")
        else:
            argv += [f"--{name}", *texts]
    return argv


def read_words(words: list[str]) -> tuple[str, dict[str, Entry]]:
    """The verb and the entries of a command line that a record tells, each checked as a value of its flag. No file that
    it names is read.

    Raises:
        UserError: the script does not take it.
    """
    faults: list[str] = []
    verb_word, entries = split_argv(words, faults)
    verb = choose_verb(verb_word, "", faults)
    entries, _ = _in_our_words(entries.values(), faults)
    _read_entries(verb, entries.values(), faults)
    if faults:
        raise UserError(*faults)
    return verb, entries


def _in_our_words(entries: Iterable[Entry], faults: list[str]) -> tuple[dict[str, Entry], list[str]]:
    """The entries by the names of our flags, and a line for each that had a name of another tool."""
    ours = {name for verb in VERBS for name in known_flags(verb)}
    read, lines = read_as_ours(entries, ours, faults)
    return {entry.name: entry for entry in read}, lines


def _tell(notes: Iterable[str]) -> None:
    if is_main_process():
        for note in notes:
            print(make_visible(f"note: {note}"), file=sys.stderr, flush=True)


def split_argv(argv: list[str], faults: list[str]) -> tuple[str | None, dict[str, Entry]]:
    """The verb's word, if there is one, and an entry per flag with the texts up to the next flag."""
    verb_word = argv[0] if argv and not argv[0].startswith("-") and not _names_setting(argv[0]) else None
    if len(argv) > 1 and find_verb(" ".join(argv[:2])):  # in two words
        verb_word, argv = " ".join(argv[:2]), argv[1:]
    entries: dict[str, Entry] = {}
    current = None  # the flag that takes the next text; "" when its texts are not to be read
    verb = find_verb(verb_word or "")
    objects = list(verb.objects) if verb else []
    for token in argv[1:] if verb_word else argv:
        if not _is_flag(token):
            unnamed = next((name for name in objects if name not in entries), None)
            if _names_setting(token) and not _takes(verb or VERBS[DEFAULT_VERB], entries.get(current or ""), token):
                faults.append(_stray(token))
            elif unnamed and not _takes(verb, entries.get(current or ""), token):
                entries[unnamed] = Entry(unnamed, f"--{unnamed}", (token,))
            elif current is None:
                faults.append(_stray(token))
            elif current:
                entry = entries[current]
                entries[current] = dataclasses.replace(entry, texts=(*entry.texts, token))
            continue
        spelled, equals, text = token.partition("=")
        name, current = spelled.lstrip("-").replace("-", "_"), ""
        if not spelled.startswith("--") or not name:
            faults.append(f"{token}: is not a flag; flags start with two dashes and a name (--help lists them)")
        elif name == "verb":
            faults.append(f"{spelled}: no such flag; the verb comes first, without dashes")
        elif name in entries:
            faults.append(f"{spelled} is given twice: leave one of them out")
        else:
            entries[name] = Entry(name, spelled, (text,) if equals else ())
            current = None if equals else name
    return verb_word, entries


def _takes(verb: Verb, entry: Entry | None, token: str) -> bool:
    """Whether the token is a value of the flag before it, at a verb that takes a value without a flag too."""
    if entry is None:
        return False
    to = NAMES.get(entry.name)
    if callable(to):
        return not entry.texts and reads(to, token)
    flags = known_flags(verb.name)
    flag = flags.get(entry.name) or flags.get(str(to))
    if flag is None:
        return not entry.texts
    return flag.kind.item is not None or (
        not entry.texts and ("bool" not in flag.kind.scalars or token.strip().lower() in YES_NO)
    )


def _verb_of(word: str | None, in_config: str | None) -> str | None:
    """The verb that is meant: what the command line says, and of a plan alone what the config says that it is of."""
    both = f"{word} {in_config}"
    return both if find_verb(both) else word or in_config


def choose_verb(word: str | None, label: str, faults: list[str], entries: Iterable[Entry] = ()) -> str:
    """The verb that the word names, DEFAULT_VERB without a word, the nearest one (and a fault) for a misspelling.

    `entries` are the flags beside it, for the command that a verb of another tool is answered with.

    Raises UserError when no verb is near: without a verb the flags cannot be judged.
    """
    if not word:
        return DEFAULT_VERB
    if verb := find_verb(word):
        return verb.name
    if (typed := OTHER_VERBS.get(word.replace("-", "_"))) is not None:
        said = f"type {_with_flags(typed, entries)}" if typed else "it is not supported"
        raise UserError(*faults, f"{label}{word!r}: no such verb; {said}; the verbs are {', '.join(VERBS)}")
    near = difflib.get_close_matches(word, VERBS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    faults.append(f"{label}{word!r}: no such verb; {hint}the verbs are {', '.join(VERBS)}")
    if not near:
        raise UserError(*faults)
    return near[0]


def _with_flags(command: str, entries: Iterable[Entry]) -> str:
    """The command with the values that were typed in place of its own, as it can be typed."""
    verb, *words = shlex.split(command)
    flags: dict[str, tuple[str, ...]] = {}
    for word in words:
        flags = flags | {word: ()} if word.startswith("--") else flags | {[*flags][-1]: (word,)}
    flags |= {f"--{entry.name}": entry.texts for entry in entries}
    return join_command([verb, *(word for name, texts in flags.items() for word in (name, *texts))])


def _with_config(entries: dict[str, Entry], faults: list[str], notes: list[str]) -> tuple[dict[str, Entry], bool]:
    """The entries of the --config file and those of the command line, which win; and whether the file could be read.

    A line for each name of another tool is added to `notes`.
    """
    config = entries.pop("config", None)
    entries, lines = _in_our_words(entries.values(), faults)
    notes += lines
    if config is None:
        return entries, True
    faults += [_stray(text) for text in config.texts[1:]]
    if not config.texts or not config.texts[0]:
        faults.append(f"{config.label} has no value: name a YAML or JSON file")
        return entries, False
    try:
        from_file, lines = _in_our_words(read_config(config.texts[0]), faults)
        notes += lines
    except UserError as error:
        faults += error.faults
        return entries, False
    return from_file | entries, True


def _pass_over_other_verbs(verb: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries without those of the --config file that are flags of other verbs alone, which are named in one line:
    a file may be shared. Typed on the command line such a flag is a fault."""
    passed = [
        entry
        for name, entry in entries.items()
        if not entry.label.startswith("--") and name not in known_flags(verb) and not owned_reason(verb, name)
        if any(name in known_flags(other) for other in VERBS)
    ]
    if passed:
        file = passed[0].label.rpartition(": ")[0]
        names = ", ".join(entry.name for entry in passed)
        _tell([f"{file}: ignored, as {verb} has no such flags: {names}"])
    return {name: entry for name, entry in entries.items() if entry not in passed}


def _verbs_with(name: str, verb: str) -> list[str]:
    """The other verbs that know a flag, those that plan left out."""
    return [other for other in VERBS if acts_as(other) == other != verb and name in known_flags(other)]


def _read_entries(
    verb: str, entries: Iterable[Entry], faults: list[str]
) -> tuple[dict[str, tuple[Flag, Any]], frozenset[str]]:
    """The values that could be read, each with its flag, and the names of those that could not."""
    flags = known_flags(verb)
    values, broken = {}, set()
    for entry in entries:
        flag = flags.get(entry.name)
        if flag is None:
            faults.append(f"{entry.label}: {why_unknown(verb, entry.name)}")
            continue
        if entry.shape == "text" and not flag.kind.item:
            faults += [_stray(text) for text in entry.texts[1:]]
        try:
            value = _read_entry(flag, entry)
            _check_value(flag, value)
            values[entry.name] = (flag, value)
        except ValueError as fault:
            faults.append(f"{entry.label} {fault}")
            broken.add(entry.name)
    return values, frozenset(broken)


@functools.cache
def known_flags(verb: str) -> dict[str, Flag]:
    """Name -> flag, for everything that the verb takes: our settings and the fields of its trainer's config."""
    fields = trainer_fields(verb)
    flags = {
        field.name: Flag(field.name, field.kind, False, field.choices)
        for field in fields.values()
        if not owned_reason(verb, field.name)
    }
    for name, field in flags_of(verb).items():
        meta = field.metadata
        choices = meta["choices"] or (fields[name].choices if name in fields else None)
        flags[name] = Flag(name, annotated_type(str(field.type)), True, choices, meta["bound"], meta["usual"])
    return flags


def _read_entry(flag: Flag, entry: Entry) -> Any:
    """The value of one entry. Raises ValueError with what is wrong, to be read after the flag's name."""
    kind, texts = flag.kind, entry.texts
    if any("\0" in text for text in texts):
        raise ValueError("contains a NUL character, which is not allowed")
    if any(HALF_CHARACTER.search(text) for text in texts):
        raise ValueError(
            f"holds bytes that are not {sys.getfilesystemencoding()} text, which cannot be recorded; rename the "
            "file, or set PYTHONUTF8=1 if its name is UTF-8"
        )
    if any(ADDRESS_WITH_PASSWORD.match(text) for text in texts):
        raise ValueError(
            "is a URL with a user or password in it, which would be recorded; leave them out (the key of an "
            "endpoint is read from OPENAI_API_KEY)"
        )
    if entry.shape == "null":
        if not kind.optional:
            raise ValueError(f"is null: must be {kind.description}; leave it out for the default")
        return None
    if flag.name == "dataset_name" and entry.shape == "list" and texts:
        return ",".join(texts)  # several sources, as on the command line
    if (entry.shape == "mapping" and "dict" not in kind.scalars) or (entry.shape == "list" and not kind.item):
        raise ValueError(f"is a {entry.shape}: must be {kind.description}")
    if not texts and entry.shape == "text":
        if "bool" in kind.scalars:
            return True
        raise ValueError(f"has no value: give it {kind.description}")
    if flag.ours and kind.item is None and not texts[0].strip():
        raise ValueError(f"has an empty value: give it {kind.description}")
    if flag.name == "validation_split" and texts[0].strip().lower() == "none":
        return "none"  # a value of its own here: hold nothing out
    return _read_texts(flag, entry)


def read_recorded(verb: str, name: str, value: Any) -> Any:
    """The value of a setting as the record of a run holds it, checked as if a person had written it.

    Raises ValueError with what is wrong, to be read after the flag's name.
    """
    flag, entry = known_flags(verb)[name], read_entry(name, name, value)
    made = _read_entry(flag, entry)
    _check_value(flag, made)
    return made


def _read_texts(flag: Flag, entry: Entry) -> Any:
    kind, texts = flag.kind, entry.texts
    written = " ".join(texts) if kind.item else texts[0]
    listed = entry.shape == "list" or len(texts) > 1 or texts[0].lstrip().startswith("[") or "," in texts[0]
    try:
        if not kind.item or ("str" in kind.scalars and not listed):
            return read_text(kind, texts[0])
        items = read_list(kind, texts, split=entry.shape != "list")
    except ValueError as error:
        raise ValueError(f"is {written!r}: {error}") from None
    if not flag.ours or items is None:
        return items
    if not items and flag.name != "report_to":
        raise ValueError(f"is empty: must be {kind.description}")
    return tuple(items)


def _check_value(flag: Flag, value: Any) -> None:
    """Raises ValueError when the value, or one of several, breaks the flag's choices or bound."""
    usual = f" ({flag.usual})" if flag.usual else ""
    for item in value if isinstance(value, list | tuple) else [value]:
        if flag.choices and item is not None and item not in flag.choices:
            if flag.name == "loss_type" and item in OTHER_LOSSES:
                raise ValueError(f"is {item!r}: {OTHER_LOSSES[item]}; must be one of {', '.join(flag.choices)}")
            raise ValueError(f"is {item!r}: {_one_of(str(item), flag.choices)}{usual}")
        if flag.bound and item is not None and not flag.bound.holds(item):
            raise ValueError(f"is {item!r}: must be {flag.bound.text}{usual}")


def _one_of(word: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, choices, 1, cutoff=0.75)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}must be one of {', '.join(choices)}"


def why_unknown(verb: str, name: str) -> str:
    """Why the verb has no such flag, and what to write instead."""
    if reason := owned_reason(verb, name):
        return f"cannot be set here: {reason}"
    if others := _verbs_with(name, verb):
        *most, last = others
        named = f"{', '.join(most)} and {last}" if most else last
        hint = "; plan sft takes it" if verb == "plan" and "sft" in others else ""
        return f"is a flag of the verb {named}, not of {verb}{hint}"
    if hint := _near_hint(name, known_flags(verb)):
        return f"no such flag; {hint}"
    if VERBS[acts_as(verb)].config and not trainer_fields(verb):
        return "no such flag (TRL, whose settings are flags too, is not installed: pip install trl)"
    return "no such flag (--help lists them)"


def _near_hint(name: str, flags: dict[str, Flag]) -> str | None:
    """The flag that is meant by its spelling; never one that means the opposite."""
    negation = NEGATION.match(name)
    if negation is None:
        alike = [flag for flag in flags if not NEGATION.match(flag) and _is_misspelling(name, flag)]
        near = difflib.get_close_matches(name, alike, 1, cutoff=0.7)
        return f"did you mean --{near[0]}?" if near else None
    what = name[negation.end() :]
    negated = {flag[match.end() :]: flag for flag in flags if (match := NEGATION.match(flag))}
    if near := difflib.get_close_matches(what, negated, 1, cutoff=0.7):
        return f"did you mean --{negated[near[0]]}?"
    switches = [flag for flag in flags if "bool" in flags[flag].kind.scalars and flag not in negated.values()]
    for switch in [f"use_{what}", *difflib.get_close_matches(what, switches, 1, cutoff=0.85)]:
        if switch in switches:
            return f"--{switch} false turns it off"
    return None


def _is_misspelling(name: str, flag: str) -> bool:
    """Whether each word of the name is nearly the word of the flag in its place, so that none means another."""
    ours, theirs = flag.split("_"), name.split("_")
    if len(ours) != len(theirs):
        return difflib.SequenceMatcher(None, name.replace("_", ""), flag.replace("_", "")).ratio() > 0.9
    return all(
        word.startswith(other) or difflib.SequenceMatcher(None, word, other).ratio() > 0.6
        for word, other in zip(ours, theirs, strict=True)
    )


def _names_setting(token: str) -> re.Match[str] | None:
    """Whether the token is `name=value` as Hydra takes it, of a name that is known here, with or without its group."""
    match = HYDRA.fullmatch(token)
    known = match and (match["name"] in NAMES or any(match["name"] in known_flags(verb) for verb in VERBS))
    return match if known else None


def _stray(token: str) -> str:
    if match := _names_setting(token):
        flag = f"--{match['name']} {shlex.quote(match['value'])}"
        return f"{token!r}: write {flag}; every flag starts with two dashes"
    if token.lower().endswith((".yaml", ".yml", ".json")):
        return f"{token!r}: is an unexpected value; a config is given as --config {shlex.quote(token)}"
    if token in VERBS:
        return f"{token!r}: is an unexpected value; the verb comes first, in front of the flags"
    return f"{token!r}: is an unexpected value; write --name value"


def _is_flag(token: str) -> bool:
    return token.startswith("-") and len(token) > 1 and not is_number(token)


def _build_settings(verb: str, values: dict[str, tuple[Flag, Any]], given: frozenset[str]) -> Settings:
    ours = {flag.name: value for flag, value in values.values() if flag.ours}
    trainer = {flag.name: value for flag, value in values.values() if not flag.ours}
    return Settings(verb, trainer_fields=trainer, given=given).with_values(ours)


def _join_trackers(settings: Settings) -> Settings:
    """The settings with `report_to` holding wandb exactly when `use_wandb` is on, and empty for none."""
    names = dict.fromkeys(name for name in settings.run.report_to if name != "none")
    if settings.run.use_wandb:
        names["wandb"] = None
    run = dataclasses.replace(settings.run, report_to=tuple(names), use_wandb=not {"wandb", "all"}.isdisjoint(names))
    return dataclasses.replace(settings, run=run)
