"""The registry of verbs: each row names what is there, and its flags can be told apart."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
from shared.runs import ROOT

from utils.arguments.candidate import Check
from utils.arguments.parsing import known_flags
from utils.settings.registry import DEFAULT_VERB, ROWS, VERBS, find_verb, load_named
from utils.settings.training import Settings, flags_of, groups_of

NAMES = [verb.name for verb in ROWS]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_names_a_function_of_the_settings_and_checks_of_flags(name):
    run = load_named(VERBS[name].run)
    assert [*inspect.signature(run).parameters] == ["settings"]
    known = {flag for other in NAMES for flag in known_flags(other)}
    for check in load_named(VERBS[name].checks):
        assert isinstance(check, Check)
        assert set(check.rests_on) <= known, check


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_of_a_verb_stands_in_one_of_its_groups_alone(name):
    count = Counter(field.name for group in groups_of(name) for field in fields(group))
    assert [flag for flag in flags_of(name) if count[flag] > 1] == []
    assert set(VERBS[name].objects) <= set(flags_of(name))


def test_every_flag_is_taken_by_a_verb():
    """So a misspelt verb, or what it does, is seen where a flag names it."""
    kinds = frozenset().union(*(verb.kinds for verb in ROWS))
    flags = {(group, field.name) for name in NAMES for group in groups_of(name) for field in fields(group)}
    taken = set()
    for verb in ROWS:
        for group in groups_of(verb.name):
            assert all(set(field.metadata["verbs"]) <= kinds for field in fields(group))
            taken |= {(group, field.name) for field in fields(group) if verb.takes(group, field)}
    assert taken == flags


def test_each_way_to_say_a_verb_is_of_one():
    ways = Counter(way for verb in ROWS for way in (verb.name, *verb.also))
    assert set(ways.values()) == {1}
    assert find_verb("plan train") is VERBS["plan"]
    assert find_verb(DEFAULT_VERB) is VERBS[DEFAULT_VERB]


def test_values_are_set_by_the_names_of_their_flags():
    settings = Settings("compare").with_values({"seed": 7, "temperature": 0.5, "judge": ("vote",)})
    flat = settings.flat()
    assert (flat["seed"], flat["temperature"], flat["judge"]) == (7, 0.5, ("vote",))
    assert settings.with_values({}) == settings
    assert flat.keys() == flags_of("compare").keys()


def test_the_registry_imports_no_room():
    code = (
        "import sys, utils.settings.training\nprint(*{n.split('.')[1] for n in sys.modules if n.startswith('utils.')})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"settings", "objectives", "data"}  # of these the tables of losses and layouts
