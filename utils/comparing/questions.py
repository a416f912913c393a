"""What both models are asked: the prompts of a file or data set, else those that the model's own run held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.calls import plain_turns
from ..data.prompts import Asked, name_split, read_prompts, take_different
from ..data.template_kwargs import TOLD, told
from ..errors import UserError
from ..models.trained import TrainedModel
from ..responses.scorers import Prompt
from ..run.paths import read_path
from ..runtime import say
from ..settings.data import DataSettings
from ..settings.training import Settings
from ..settings.verbs import ComparisonSettings, SamplingSettings
from ..training.run_data import read_as_run

DEFAULT_COUNT = 100


@dataclass(frozen=True)
class Questions:
    """Different prompts, in the order of their source, each with what its template is given beside it."""

    source: str
    prompts: list[Prompt]
    told: list[dict[str, str]]

    @property
    def are_messages(self) -> bool:
        """Whether they are lists of messages rather than texts."""
        return not isinstance(self.prompts[0], str)

    def select(self, places: Sequence[int]) -> Questions:
        """Those at these places."""
        return Questions(self.source, [self.prompts[i] for i in places], [self.told[i] for i in places])


def read_questions(settings: Settings, trained: TrainedModel) -> Questions:
    """The prompts that --prompts names, else those that the run of the model held out; the first --num_prompts.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    most = settings.of(SamplingSettings).num_prompts or DEFAULT_COUNT
    name = settings.of(ComparisonSettings).prompts
    prompts: Iterable[Asked]
    if name is None:
        source, prompts = _read_held_out(trained)
    elif name.lower().endswith(".txt"):
        source, prompts = Path(name).name, ((line, {}) for line in _read_lines(read_path(name), name))
    else:
        source, prompts = _read_data(name, settings.data)
    different = list(islice(take_different(prompts), most))
    return Questions(source, [prompt for prompt, _ in different], [told for _, told in different])


def _read_lines(path: Path, name: str) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {name}: not a text file in UTF-8 ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {name}: has no prompts; write one on each line")
    return prompts


def _read_data(name: str, settings: DataSettings) -> tuple[str, Iterator[Asked]]:
    read = read_prompts(name_split(settings, name), "--prompts")
    for line in read.describe_left_out("rows left out"):
        say(line)
    return f"{read.source}: {read.description}", read.each()


def _read_held_out(trained: TrainedModel) -> tuple[str, list[Asked]]:
    """The prompts that the run held out, read and split as in the run."""
    advice = "name prompts with --prompts"
    if trained.folder is None:
        raise UserError(
            f"--prompts is missing: {trained.source.name} is not a run of this script, so it held out none; {advice}"
        )
    try:
        data = read_as_run(trained)
    except UserError as error:
        what = "--prompts is missing, and the data of the run cannot be read"
        raise UserError(*(f"{what} ({fault}); {advice}" for fault in error.faults)) from None
    if data.held_out is None:
        raise UserError(f"--prompts is missing, and the run held out none (--validation_split none); {advice}")
    if data.fingerprint != trained.record.get("data", {}).get("fingerprint"):
        say(f"warning: {data.source} changed since the run; its prompts are split as in the run all the same")
    columns = [name for name in ("prompt", *TOLD) if name in data.held_out.column_names]
    rows = data.held_out.select_columns(columns).to_list()
    prompts = [(plain_turns(row["prompt"]), told(row)) for row in rows if row["prompt"]]
    if len(prompts) < len(rows):
        say(f"      {len(rows) - len(prompts):,} rows left out: without a prompt")
    if not prompts:
        raise UserError(f"--prompts is missing, and the rows that the run held out have none; {advice}")
    return f"those that the run held out ({data.source})", prompts
