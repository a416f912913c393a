"""The table of losses, and what follows from it: flags, their checks, the objective of a run, its evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.evaluation.sides import settings_of_evaluation
from utils.models.sources import ModelSource
from utils.models.trained import TrainedModel
from utils.objectives.losses import BY_NAME, LOSSES, reading
from utils.objectives.pairs import Divergence
from utils.runtime import Precision
from utils.settings.training import GROUPS_OF_RUN, Settings
from utils.training.config import build_config, make_objective

SMOOTHED, DIVERGED = reading("label_smoothing"), reading("divergence")
NEEDED = ("--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o")


def parse(*flags: str, verb: str = "train") -> Settings:
    return parse_arguments([verb, *NEEDED, *flags])


def refusal(*flags: str) -> str:
    """What is said against these flags; nothing where they are taken."""
    try:
        parse(*flags)
    except UserError as error:
        return "\n".join(error.faults)
    return ""


def with_needs(loss: str) -> list[str]:
    """The loss, with the label smoothing that it cannot do without."""
    return ["--loss_type", loss, *(["--label_smoothing", "0.1"] if loss in LOSSES[loss].needs_smoothing else [])]


@pytest.mark.parametrize("loss", LOSSES)
def test_label_smoothing_is_taken_for_the_losses_that_have_it_alone(loss):
    said = refusal("--loss_type", loss, "--label_smoothing", "0.1")
    expected = f"--label_smoothing: has no effect on {loss}; it is for {', '.join(SMOOTHED)}"
    assert said == ("" if loss in SMOOTHED else expected)
    assert refusal("--loss_type", loss, "ipo" if loss != "ipo" else "robust", "--label_smoothing", "0.1") == (
        ""
        if loss in (*SMOOTHED, "ipo")
        else f"--label_smoothing: has no effect on {loss} ipo; it is for {', '.join(SMOOTHED)}"
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_f_divergences_are_taken_for_the_losses_that_they_are_defined_for_alone(loss):
    said = refusal(*with_needs(loss), "--f_divergence_type", "forward_kl")
    expected = f"--f_divergence_type forward_kl: is not defined for the loss {loss}"
    # Without a reference there is nothing to diverge from.
    assert said == ("" if loss in DIVERGED or not LOSSES[loss].reads_reference else expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_sort_the_pairs_of_a_micro_batch_keep_it_whole(loss):
    assert refusal(*with_needs(loss), "--max_tokens_per_batch", "100") == (
        f"--max_tokens_per_batch: would change the groups of pairs that {loss} sorts"
        if LOSSES[loss].sorts_pairs
        else ""
    )
    assert refusal(*with_needs(loss), "--use_weighting") == (
        f"--use_weighting: cannot weigh the pairs of {loss}, which sorts them" if LOSSES[loss].sorts_pairs else ""
    )
    assert make_objective(parse(*with_needs(loss)).loss).sorting == ((loss,) if LOSSES[loss].sorts_pairs else ())


@pytest.mark.parametrize("name", BY_NAME)
def test_a_name_stands_for_one_loss(name):
    loss = BY_NAME[name].name
    smoothing = ["--label_smoothing", "0.1"] if loss in SMOOTHED else []
    assert make_objective(parse("--loss_type", name, *smoothing).loss).names == (loss,)
    for other, meant in BY_NAME.items():
        if other != name:
            said = refusal("--loss_type", name, other, "--label_smoothing", "0.1")
            assert (f"--loss_type: {name} and {other} are the same loss; name it once" in said) == (meant.name == loss)


def test_cdpo_and_exo_pair_alone_need_label_smoothing():
    needing = {name: said for name in BY_NAME if (said := refusal("--loss_type", name))}
    assert needing == {
        "cdpo": "--loss_type cdpo: needs --label_smoothing above 0 (0.1 is usual)",
        "exo_pair": "--loss_type exo_pair: needs --label_smoothing above 0 (1e-3 is usual)",
    }


def test_a_parameter_of_its_own_is_a_flag_of_that_loss_alone(capsys):
    with pytest.raises(SystemExit):
        parse("--help", "loss")
    shown = capsys.readouterr().out
    for loss in LOSSES.values():
        assert loss.parameters.keys() <= set(loss.reads)
        for name, own in loss.parameters.items():
            assert f"--{name} X" in shown
            assert f"{loss.name}: {own.help[:20]}" in shown
            assert make_objective(parse(*with_needs(loss.name)).loss).parameters[name] == own.default
            for other in LOSSES.keys() - {loss.name}:
                said = refusal(*with_needs(other), f"--{name}", str(own.default))
                assert said == f"--{name}: has no effect without --loss_type {loss.name}"
    assert refusal("--loss_type", "discopop", "--discopop_tau", "0") == "--discopop_tau is 0.0: must be above 0"


def test_every_loss_finds_what_it_reads_in_the_settings():
    objective = make_objective(
        parse("--f_divergence_type", "alpha_divergence", "--f_alpha_divergence_coef", "0.3").loss
    )
    assert objective.parameters["divergence"] == Divergence("alpha_divergence", 0.3)
    for loss in LOSSES.values():
        assert set(loss.reads) <= objective.parameters.keys()


def test_the_objective_is_what_the_flags_say():
    objective = make_objective(
        parse("--loss_type", "rdpo", "discopop", "sft", "--loss_weights", "1", "0.5", "2", "--label_smoothing", "0.2",
              "--beta", "0.3", "--discopop_tau", "0.1").loss
    )  # fmt: skip
    assert (objective.names, objective.weights) == (("robust", "discopop", "sft"), (1.0, 0.5, 2.0))
    assert objective.beta == 0.3
    assert objective.parameters["label_smoothing"] == 0.2
    assert objective.parameters["discopop_tau"] == 0.1
    assert make_objective(parse("--loss_type", "ipo", "sft").loss).weights == (1.0, 1.0)


def test_the_trainer_s_config_shows_the_losses_by_their_own_names(tmp_path):
    settings = parse("--loss_type", "rdpo", "slic", "--f_divergence_type", "js_divergence", "--label_smoothing", "0.1")
    precision = Precision(torch.float32, torch.device("cpu"), "")
    config = build_config(settings, precision, tmp_path, adapts=False, evaluates=False)
    assert (config.loss_type, config.loss_weights) == (["robust", "hinge"], None)
    assert (config.f_divergence_type, config.label_smoothing) == ("js_divergence", 0.1)


OTHER_VALUES = {
    "loss_type": ("discopop", "robust"),
    "loss_weights": (1.0, 0.5),
    "f_divergence_type": "alpha_divergence",
    "ld_alpha": 0.5,
    "use_weighting": True,
}


def test_an_evaluation_scores_with_every_loss_setting_of_the_run(tmp_path):
    """Each has another value than by default: one that is left out would be scored with the default."""
    loss: dict[str, Any] = {
        field.name: OTHER_VALUES[field.name] if field.name in OTHER_VALUES else field.default / 2 or 0.125
        for field in dataclasses.fields(GROUPS_OF_RUN["loss"])
    }
    assert all(loss[field.name] != field.default for field in dataclasses.fields(GROUPS_OF_RUN["loss"]))
    source = ModelSource("m", "m", None, "m", None)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in loss.items()}
    trained = TrainedModel(source, Path(tmp_path), {"verb": "train", "settings": settings})
    scoring = settings_of_evaluation(parse_arguments(["evaluate", "--model_name_or_path", "m"]), trained)
    assert dataclasses.asdict(scoring.loss) == loss
    scoring = settings_of_evaluation(parse_arguments(["evaluate", "--model_name_or_path", "m", "--beta", "7"]), trained)
    assert dataclasses.asdict(scoring.loss) == loss | {"beta": 7.0}
