"""The data of a run, read again and split as it did."""

from __future__ import annotations

import dataclasses

from ..data.loading import PreferenceData, load_pairs
from ..errors import UserError
from ..models.trained import TrainedModel, as_in_run
from ..settings.data import DataSettings
from ..settings.training import Settings
from .config import rows_of_run

SIZE = ("seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")  # what is held out


def read_as_run(trained: TrainedModel, adapter: str | None = None, dataset_name: str | None = None) -> PreferenceData:
    """The data of the run, read and split as it did.

    Args:
        adapter: the function of --dataset_adapter that the person named. Code is not run because a record names it.
        dataset_name: where the data are now, where they have moved.

    Raises:
        UserError: they cannot be read, or only by a function that the person did not name.
    """
    run = _settings_of_run(trained)
    wish = dataclasses.replace(run.data, dataset_adapter=adapter)
    if dataset_name is not None:
        wish = dataclasses.replace(wish, dataset_name=dataset_name)
    recorded = trained.setting("dataset_adapter")
    if recorded is not None and adapter is None:
        raise UserError(
            f"the run read its data with the function {recorded}; a record alone does not run code, only "
            f"--dataset_adapter {recorded} does"
        )
    processes = trained.setting("dataset_num_proc")
    return load_pairs(wish, trained.record["verb"], run.training.seed, processes, rows_of_run(run))


def _settings_of_run(trained: TrainedModel) -> Settings:
    """The settings that decided what the run read."""
    names = [field.name for field in dataclasses.fields(DataSettings)]
    return as_in_run(Settings(trained.record["verb"]), trained, (*names, *SIZE))
