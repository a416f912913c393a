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
from utils.arguments.cross_checks import HELD_OUT_METRICS
from utils.arguments.parsing import NAMES_CODE, known_flags
from utils.evaluation.sides import AS_IN_PREFERENCE_RUN, AS_IN_RUN
from utils.run.names import RESULTS
from utils.settings import flags as bounds
from utils.settings.changes import CANNOT_CHANGE, FREE_TO_CHANGE
from utils.settings.data import DataSettings
from utils.settings.flags import SAVES, TRAINS, Bound
from utils.settings.registry import DEFAULT_VERB, ROWS, VERBS, find_verb, load_named
from utils.settings.training import Settings, flags_of, groups_of
from utils.settings.verbs import READ_WITH

NAMES = [verb.name for verb in ROWS]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_names_a_function_of_the_settings_and_checks_of_flags(name):
    run = load_named(VERBS[name].run)
    assert [*inspect.signature(run).parameters] == ["settings"]
    known = {flag for other in NAMES for flag in known_flags(other)}
    checks = VERBS[name].checks
    for check in load_named(checks) if checks else ():
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


BOUNDS = {  # name -> values at its ends that hold, and those beyond
    "ABOVE_ZERO": ((1e-9,), (0, -1)),
    "AT_LEAST_ZERO": ((0,), (-1, -1e-9)),
    "AT_LEAST_ONE": ((1,), (0,)),
    "AT_LEAST_TWO": ((2,), (1,)),
    "HALF_OPEN_UNIT": ((0, 0.999), (-1e-9, 1)),
    "CLOSED_UNIT": ((0, 1), (-1e-9, 1.001)),
    "SHARE_ABOVE_ZERO": ((1e-9, 1), (0, 1.001)),
    "BELOW_HALF": ((0, 0.499), (-1e-9, 0.5)),
    "STEPS_OR_SHARE": ((1e-9, 0.999, 1, 1.0, 2, 500), (0, -1, 1.5)),
    "PORT": ((1, 65535), (0, 65536)),
    "SEED": ((0, 2**32 - 1), (-1, 2**32)),
    "MAX_STEPS": ((-1, 1), (0, -2)),
    "TEMPLATE_KWARGS": (({"enable_thinking": False}, {"documents": []}, {}), ({"tools": [], "x": 1}, {"messages": 1})),
}


def test_bounds_hold_up_to_their_ends():
    found = {name: bound for name, bound in vars(bounds).items() if isinstance(bound, Bound)}
    assert BOUNDS.keys() == found.keys()
    for name, bound in found.items():
        holding, beyond = BOUNDS[name]
        assert [value for value in holding if not bound.holds(value)] == [], name
        assert [value for value in beyond if bound.holds(value)] == [], name


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


def test_tables_of_flags_and_verbs_name_ones_that_there_are():
    flags = {name for verb in NAMES for name in known_flags(verb)}
    assert set(READ_WITH) <= set(flags_of("evaluate"))
    assert flags >= NAMES_CODE - {"config"}
    assert flags >= FREE_TO_CHANGE
    assert flags >= CANNOT_CHANGE - {"architecture"}  # which is what a trained model is compared by
    assert set(RESULTS) == {verb.name for verb in ROWS if SAVES in verb.does and not {TRAINS, "merge"} & verb.kinds}
    assert set(HELD_OUT_METRICS) == {verb.name for verb in ROWS if TRAINS in verb.does}


def test_what_evaluation_takes_from_a_run_leaves_no_flag_to_chance():
    """Each flag that `train` and `evaluate` share is taken from the run, or is known to be no matter of its record."""
    never = {
        "model_name_or_path",
        "model_revision",
        "ref_model_name_or_path",
        "trust_remote_code",
        "output_dir",
        "seed",
    }
    of_data = {field.name for field in fields(DataSettings)} - {"max_length", "truncation"}  # pairs of one's own
    in_the_tokenizer = {"chat_template"}
    shared = set(flags_of("train")) & set(flags_of("evaluate"))
    assert shared - never - of_data - in_the_tokenizer <= {*AS_IN_RUN, *AS_IN_PREFERENCE_RUN}
    assert {"dtype", "use_4bit", "bnb_4bit_quant_type"} <= set(AS_IN_RUN), "how the run held its weights"
    assert {*AS_IN_RUN, *AS_IN_PREFERENCE_RUN} <= set(flags_of("train"))
