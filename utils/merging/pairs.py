"""The texts that a merged model is checked on: the held-out rows of the run, or those of data that are named."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.encoding import PromptEncoder
from ..data.loading import PreferenceData, load_pairs
from ..data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS, tokenize_rows
from ..engine.counted import count_tokens
from ..errors import UserError
from ..models.loading import choose_max_length, context_length
from ..models.sources import read_end_ids
from ..models.templates import choose_template, recorded_moment
from ..models.trained import TrainedModel, as_in_run
from ..run.names import PAIRS
from ..run.records import ROW, read_lines
from ..settings.training import ModelSettings, Settings
from ..training.run_data import read_as_run

DEFAULT_ROWS = 64
ADVICE = "name pairs to check on with --dataset_name, or pass --skip_verification"


@dataclass(frozen=True)
class CheckedTexts:
    """Prompts with what follows them, as token ids; of pairs, all chosen sides come before all rejected ones."""

    description: str
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    pairs: int  # 0 where the rows are demonstrations
    reference: Sequence[float] | None  # of pairs: the log-prob of each completion under the run's reference, nats

    @property
    def name(self) -> str:
        """What a person calls them."""
        return f"{self.pairs} pairs" if self.pairs else f"{len(self.prompts)} demonstrations"

    @property
    def tokens(self) -> int:
        """The tokens that are scored."""
        return sum(map(count_tokens, self.completions))


def load_texts(settings: Settings, trained: TrainedModel, tokenizer: PreTrainedTokenizerBase) -> CheckedTexts:
    """The first held-out rows of the run, read again from its data, or rows of --dataset_name.

    Raises:
        UserError: the data are not there, or cannot be read.
    """
    tokenizer = copy.deepcopy(tokenizer)  # a template that only the check needs is not saved
    wanted = settings.data.max_samples or DEFAULT_ROWS
    verb, data = _load_own(settings, wanted) if settings.data.dataset_name else _load_of_run(trained)
    held_out = data.held_out is not None
    rows = data.held_out if held_out else data.train
    rows = rows.select(range(min(wanted, len(rows))))
    max_length = as_in_run(settings, trained, ["max_length"]).data.max_length
    model = ModelSettings(**{name: trained.setting(name) for name in ("chat_template_kwargs", "reasoning")})
    choose_template(rows, data.reading.is_transcript, tokenizer, model, recorded_moment(trained.record))
    encoder = PromptEncoder(tokenizer, read_end_ids(trained.source.base, trained.source.revision, tokenizer))
    columns = PAIR_COLUMNS if verb == "train" else SFT_COLUMNS
    limit = choose_max_length(max_length, context_length(trained.source, settings.model))
    tokenized, _ = tokenize_rows(rows, encoder, columns, limit, "shorten_prompt", on_bad_rows="skip")
    reference = _read_reference(trained, tokenized) if verb == "train" else None
    return CheckedTexts(
        f"{'held out of ' if held_out else ''}{data.source}",
        list(tokenized["prompt_ids"]) * len(columns),
        [ids for name in columns for ids in tokenized[name]],
        len(tokenized) if verb == "train" else 0,
        reference,
    )


def _load_own(settings: Settings, wanted: int) -> tuple[str, PreferenceData]:
    """Data that were named: pairs or, where there are none, demonstrations."""
    held_out = settings.data.validation_split or "none"
    data = dataclasses.replace(settings.data, validation_split=held_out, max_samples=wanted, on_bad_rows="skip")
    try:
        return "train", load_pairs(data, "train", settings.training.seed)
    except UserError as fault:
        try:
            return "sft", load_pairs(data, "sft", settings.training.seed)
        except UserError:
            raise fault from None


def _load_of_run(trained: TrainedModel) -> tuple[str, PreferenceData]:
    if not trained.record:
        raise UserError(
            f"--dataset_name is missing: {trained.source.name} has no record of a run that names its data; {ADVICE}"
        )
    try:
        data = read_as_run(trained)
    except UserError as error:
        first = error.faults[0]
        raise UserError(f"the data of the run cannot be read again ({first}); {ADVICE}") from None
    if data.fingerprint != trained.record.get("data", {}).get("fingerprint", data.fingerprint):
        data = dataclasses.replace(data, source=f"{data.source} (its rows have changed since the run)")
    return trained.record["verb"], data


def _read_reference(trained: TrainedModel, rows: Dataset) -> list[float] | None:
    """What the run's reference gave these pairs, from its file of held-out pairs; None where that is not known."""
    if trained.folder is None or trained.setting("ld_alpha") is not None or "id" not in rows.column_names:
        return None
    try:
        known = {line["id"]: line for line in read_lines(trained.folder / PAIRS, ROW)}
        found = [known[name] for name in rows["id"]]
        return [line[side] for side in ("ref_chosen_logps", "ref_rejected_logps") for line in found]
    except (OSError, LookupError):
        return None
