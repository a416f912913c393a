"""Making preference pairs: a model answers each prompt several times, a scorer ranks, best and worst become a pair.

Every finished batch is written to `OUTPUT.samples.jsonl` beside the output, with all responses and scores, so that an
interrupted run goes on where it stopped and ends in the same pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets

from ..data.calls import extra_of, make_turn
from ..data.conversion import PLAIN_TURNS, WHOLE_TURNS
from ..data.files import quiet
from ..data.prompts import Asked, read_prompts, take_different
from ..data.template_kwargs import TOLD, as_options
from ..data.wishes import read_wishes
from ..data.writing import write_pairs
from ..errors import UserError
from ..interruptions import stop_if_asked
from ..models.loading import context_length, load_policy, load_tokenizer
from ..models.sources import ModelSource, find_policy, read_end_ids
from ..models.templates import TEMPLATE_DATE, check_no_template, first_tools, set_chat_template, template_date
from ..run.manifests import hash_file
from ..run.names import COMPARISON_FILES, EVALUATION_FILES, RECORD
from ..run.paths import read_path
from ..run.writing import open_file, write_text
from ..runtime import choose_precision, find_device, say
from ..settings.data import GenerationSettings, InspectionSettings
from ..settings.training import Settings
from ..settings.verbs import JudgeSettings, SamplingSettings
from .generation import find_fitting, sample_continuations
from .judging import EndpointJudge, JudgeLimits
from .scorers import FUNCTION, Prompt, Scorer, are_equal, load_reward_model, load_scorer

PROMPTS_PER_BATCH = 8
SAID_EVERY = 10  # batches
SAMPLED_BY = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
FIRST_LINE_BYTES = 2**20
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")


@dataclass(frozen=True)
class Sampled:
    """The responses to one prompt with their scores; `told` is what the prompt's template is given beside it."""

    prompt: Prompt
    responses: list[str]
    scores: list[float]
    told: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_line(self) -> str:
        """As the file of samples keeps it."""
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name != "told" or value}
        return json.dumps(kept) + "\n"


def make_pairs(settings: Settings) -> None:
    """Samples, ranks and writes --output_file; says how many pairs came of how many prompts.

    Raises:
        UserError: prompts, model or scorer cannot be used, or not one pair came of them.
    """
    output = read_path(settings.of(InspectionSettings).output_file)
    name, asked = _read_distinct_prompts(settings)
    prompts, told = [prompt for prompt, _ in asked], [given for _, given in asked]
    scorer, judge = _load_scorer(settings)
    source = find_policy(settings.model)
    tokenizer = load_tokenizer(source, settings.model)
    kept = output.with_name(output.name + ".samples.jsonl")
    if not isinstance(prompts[0], str):
        wish, moment = settings.model.chat_template, _moment_of(kept)
        arguments = settings.model.chat_template_kwargs
        template = set_chat_template(tokenizer, wish, False, first_tools(told), moment, arguments)
        say(f"chat template: {template}")
    else:
        check_no_template(settings.model, "these prompts")
    precision = choose_precision("auto", find_device())
    model = load_policy(source, settings, precision).to(precision.device, precision.dtype).eval()
    count = settings.of(GenerationSettings).num_generations
    say(f"{len(prompts):,} prompts of {name}, {count} responses each by {source.name}")

    run = _describe_run(settings, source)
    if not isinstance(prompts[0], str):
        run[TEMPLATE_DATE] = template_date(tokenizer)
    samples = Samples(kept, run, prompts, told)
    if samples.count:
        say(f"resuming after {samples.count:,} prompts in {samples.path.name}")
    room, end_ids = context_length(source, settings.model), read_end_ids(source.base, source.revision, tokenizer)
    for start in range(samples.count, len(prompts), PROMPTS_PER_BATCH):
        batch = asked[start : start + PROMPTS_PER_BATCH]
        samples.add(_sample(model, tokenizer, scorer, batch, end_ids, room, settings))
        if start // PROMPTS_PER_BATCH % SAID_EVERY == 0:
            say(f"      {samples.count:,} of {len(prompts):,}")
    stop_if_asked()
    _write(output, samples, judge)


def _read_distinct_prompts(settings: Settings) -> tuple[str, list[Asked]]:
    """What the prompts are read from, and each different one once; says which rows have none."""
    name = settings.data.dataset_name
    if len(read_wishes(name)) > 1:
        raise UserError(f"--dataset_name {name}: --generate reads one source at a time; name one")
    prompts = read_prompts(settings.data)
    say(f"prompts: {prompts.source}, read as {prompts.description}")
    for line in prompts.describe_left_out("left out"):
        say(line)
    most = settings.of(SamplingSettings).num_prompts
    distinct = list(islice(take_different(prompts.each()), most))
    if len(distinct) < len(prompts.rows) and len(distinct) != most:
        say(f"      {len(prompts.rows) - len(distinct):,} are duplicates of an earlier prompt")
    return prompts.source, distinct


def _load_scorer(settings: Settings) -> tuple[Scorer, EndpointJudge | None]:
    wish, judging = settings.of(GenerationSettings).scorer, settings.of(JudgeSettings)
    if wish.startswith(("http://", "https://")):
        limits = JudgeLimits(judging.max_judge_requests, judging.judge_requests_per_minute)
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "judge_answers"
        judge = EndpointJudge(wish, judging.judge_model, cache, limits)
        return judge.score, judge
    if FUNCTION.fullmatch(wish):
        return load_scorer(wish), None
    return load_reward_model(wish, settings.model.trust_remote_code), None


def _describe_run(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """What the samples depend on; a file of other samples is not gone on with."""
    names = ("model_name_or_path", "adapter_name_or_path", "model_revision", "chat_template")
    model = {name: getattr(settings.model, name) for name in names}
    scorer = settings.of(GenerationSettings).scorer
    function = FUNCTION.fullmatch(scorer)
    contents = {
        "scorer_content": _hash_files("--scorer", function[1] if function else scorer),
        "model_content": _hash_files("--model_name_or_path", source.base),
        "adapter_content": _hash_files("--model_name_or_path", source.adapter),
        "chat_template_content": _hash_files("--chat_template", settings.model.chat_template),
    }
    kept: tuple[str, ...] = ("scorer", "num_generations", "judge_model", *SAMPLED_BY, "seed")
    kept += ("chat_template_kwargs",) if settings.model.chat_template_kwargs else ()
    return {name: value for name, value in settings.flat().items() if name in kept} | model | contents


def _moment_of(samples: Path) -> datetime | None:
    """What a template that writes the date was told for the samples that are there; None without any."""
    try:
        with open(samples, "rb") as file:
            return datetime.fromisoformat(json.loads(file.readline(FIRST_LINE_BYTES))["run"][TEMPLATE_DATE])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # whether the file can be gone on with is looked at when it is read


def _hash_files(flag: str, name: str | None) -> str | None:
    """A hash of the file of that name, or of a folder's files that make a model; None where there is none here.

    Raises:
        UserError: a file cannot be read.
    """
    path = read_path(name or "")
    if not name or not path.exists():
        return None
    digest = hashlib.sha256()
    try:
        for file in sorted(filter(_is_of_model, path.iterdir())) if path.is_dir() else [path]:
            digest.update(f"{file.name}\0{hash_file(file)}\0".encode())
    except OSError as error:
        raise UserError(f"{flag} {name}: {error.filename or name} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _is_of_model(file: Path) -> bool:
    """Whether a file in a model's folder decides what it writes, rather than records a run or its results."""
    records = (RECORD, *EVALUATION_FILES, *COMPARISON_FILES)
    return file.is_file() and file.suffix in MODEL_SUFFIXES and file.name not in records


def _sample(
    model: Any,
    tokenizer: Any,
    scorer: Scorer,
    batch: Sequence[Asked],
    end_ids: frozenset[int],
    room: int | None,
    settings: Settings,
) -> list[Sampled]:
    """The scored responses to a batch of prompts; none to a prompt that leaves no room for them."""
    count, seed = settings.of(GenerationSettings).num_generations, settings.training.seed
    sampling = settings.of(SamplingSettings)
    prompts, told = [prompt for prompt, _ in batch], [given for _, given in batch]
    fits = find_fitting(tokenizer, prompts, sampling.max_new_tokens, room, **as_options(told))
    asked = [one for one, fit in zip(batch, fits, strict=True) if fit for _ in range(count)]
    prompts, told = [prompt for prompt, _ in asked], [given for _, given in asked]
    options = as_options(told)
    written = sample_continuations(model, tokenizer, prompts, sampling, seed=seed, end_ids=end_ids, **options)
    responses = [continuation.text for continuation in written]
    scores = scorer(prompts, responses, told) if asked else []
    sampled, place = [], 0
    for (prompt, given), fit in zip(batch, fits, strict=True):
        end = place + count * fit
        sampled.append(Sampled(prompt, responses[place:end], scores[place:end], given))
        place = end
    return sampled


class Samples:
    """The finished samples, in the order of the prompts, in a file that grows by whole batches; `count` of them.

    Args:
        path: of the file. One that exists is gone on with.
        run: what the samples depend on, which is kept in the file's first line.
        prompts: in order.
        told: for each of them, what its template is given beside it.

    Raises:
        UserError: the file cannot be written, holds samples of another run, or has a line that was changed.
    """

    def __init__(
        self, path: Path, run: dict[str, Any], prompts: Sequence[Prompt], told: Sequence[Mapping[str, str]] = ()
    ) -> None:
        self.path = path
        self.prompts = prompts
        self.told = told or [{}] * len(prompts)
        self.count = 0
        self._most = run.get("num_generations")
        try:
            if path.is_file():
                self._go_on(run)
            else:
                self._begin(run)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        kept = f"; it keeps {self.count:,} prompts: run again to resume" if self.count else ""
        return UserError(f"--output_file: {self.path} cannot be written ({error.strerror or error}){kept}")

    def _begin(self, run: dict[str, Any]) -> None:
        write_text(self.path, json.dumps({"run": run}) + "\n")

    def _go_on(self, run: dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            first = file.readline()
            end = file.tell()
            more = file.read(1)
            if not more and (b'"run"' in first or b'{"run"'.startswith(first.strip(b"\0"))):
                return self._begin(run)  # stopped before any sample was there: nothing to go on with
            file.seek(end)
            self._check(first, run)
            count, whole, damaged = 0, 0, None
            for sampled in self._read(file):
                damaged = damaged or (sampled is None and count + 2)  # the number of its line
                if damaged and count >= whole + PROMPTS_PER_BATCH:
                    raise UserError(
                        f"{self.path} line {damaged}: is not a sample of this script, and more lines follow; "
                        "restore that line, or remove the file to start over"
                    )
                if sampled is not None and (sampled.prompt, sampled.told) != (self.prompts[count], self.told[count]):
                    raise UserError(f"{self.path} holds samples of other prompts; remove it to start over")
                count += 1
                if count % PROMPTS_PER_BATCH == 0 and not damaged:
                    whole, end = count, file.tell()
        if count == len(self.prompts) and not damaged:
            self.count = count
            return
        self.count = whole
        os.truncate(self.path, end)  # the batch that was being written

    def _check(self, first: bytes, run: dict[str, Any]) -> None:
        try:
            if not first.endswith(b"\n"):
                raise ValueError("cut off")
            former = json.loads(first)["run"]
            other = [name for name in run if former.get(name) != run[name]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.path} holds no samples of this script; move it away") from None
        if other:
            raise UserError(
                f"{self.path} holds samples made with another {', '.join(other)}; remove it to start over, or give "
                "the same flags to resume"
            )

    def _read(self, file: BinaryIO) -> Iterator[Sampled | None]:
        """The samples from there on, no more than there are prompts; None for a line that holds none."""
        for _ in self.prompts:
            line = file.readline()
            if not line.endswith(b"\n"):
                return  # the end, or the line that was being written
            yield _read_sampled(line, self._most)

    def __iter__(self) -> Iterator[Sampled]:
        with open(self.path, "rb") as file:
            file.readline()
            for sampled in islice(self._read(file), self.count):
                if sampled is None:
                    raise UserError(f"{self.path} was changed while it was read; run again")
                yield sampled

    def add(self, batch: list[Sampled]) -> None:
        """Appends a batch and has it on the disk.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with open(self.path, "a", encoding="utf-8", opener=open_file) as file:
                file.write("".join(sampled.as_line() for sampled in batch))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self.count += len(batch)


def _read_sampled(line: bytes, most: int | None) -> Sampled | None:
    """The sample of a line, with so many responses, or none for a prompt that is too long; None where it holds none."""
    try:
        sampled = Sampled(**json.loads(line))
        texts = all(isinstance(text, str) for text in sampled.responses)
        finite = all(isinstance(score, int | float) and math.isfinite(score) for score in sampled.scores)
        whole = texts and finite and len(sampled.responses) == len(sampled.scores)
        whole = whole and (most is None or len(sampled.responses) in (0, most))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return sampled if whole else None


def pick_pair(sampled: Sampled) -> dict[str, Any] | str:
    """The best and the worst response as a pair with its scores, or why there is none."""
    if not sampled.responses:
        return "prompt too long for the model's context"
    ranked = sorted(
        ((score, text) for score, text in zip(sampled.scores, sampled.responses, strict=True) if text.strip()),
        key=lambda item: item[0],
    )
    if len({text.strip() for _, text in ranked}) < 2:
        return "fewer than two different responses"
    (low, worst), (high, best) = ranked[0], ranked[-1]
    if are_equal(low, high) or worst.strip() == best.strip():
        return "no response scores higher than another"
    is_text = isinstance(sampled.prompt, str)
    chosen, rejected = (text if is_text else [{"role": "assistant", "content": text}] for text in (best, worst))
    scores = {"score_chosen": high, "score_rejected": low}
    return {"prompt": sampled.prompt, "chosen": chosen, "rejected": rejected, **sampled.told} | scores


def _write(output: Path, samples: Samples, judge: EndpointJudge | None) -> None:
    dropped = Counter(pair for pair in map(pick_pair, samples) if isinstance(pair, str))
    pairs = samples.count - dropped.total()
    for reason, count in dropped.items():
        say(f"      {count:,} without a pair: {reason}")
    if judge is not None:
        say(f"      {judge.asked:,} requests to the judge, {judge.unreadable:,} answers without a verdict")
        if judge.unreadable:
            say(f"      such as: {judge.unreadable_example[:100]!r}; they count as ties")
    if not pairs:
        raise UserError(f"--output_file {output}: not written, as no pair came of {samples.count:,} prompts")
    try:
        with tempfile.TemporaryDirectory() as folder, quiet(0):
            made = datasets.Dataset.from_generator(
                _make_rows,
                _find_features(samples),
                cache_dir=folder,
                gen_kwargs={"samples": samples},
                fingerprint="made",
            )
            write_pairs(output, made)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"--output_file {output}: not written, as temporary files cannot be written in {tempfile.gettempdir()} "
            f"({getattr(cause, 'strerror', None) or cause}); the samples are kept: run again"
        ) from None
    say(f"wrote {pairs:,} pairs to {output}; all responses and scores are in {samples.path.name}")


def _find_features(samples: Samples) -> datasets.Features:
    """The types of the pairs' columns, whatever the first of them have."""
    value = prompt = datasets.Value("string")
    if not isinstance(samples.prompts[0], str):
        value = prompt = PLAIN_TURNS
        if any(extra_of(turn) for asked in samples.prompts if not isinstance(asked, str) for turn in asked):
            prompt = WHOLE_TURNS
    told = {name: datasets.Value("string") for name in TOLD if any(name in given for given in samples.told)}
    scores = {name: datasets.Value("float64") for name in ("score_chosen", "score_rejected")}
    return datasets.Features({"prompt": prompt, "chosen": value, "rejected": value, **told, **scores})


def _make_rows(samples: Samples) -> Iterator[dict[str, Any]]:
    for pair in map(pick_pair, samples):
        if isinstance(pair, dict):
            prompt = pair["prompt"]
            if not isinstance(prompt, str):
                prompt = [make_turn(turn["role"], turn["content"], extra_of(turn)) for turn in prompt]
            yield dict.fromkeys(TOLD) | pair | {"prompt": prompt}
