"""The inspection from beginning to end: read, look at every pair, check, measure, write what was asked for."""

from __future__ import annotations

import sys
import time
from typing import Any

import datasets

from ..data.wishes import read_wishes
from ..data.writing import write_pairs
from ..errors import UserError
from ..run.paths import read_path
from ..settings.data import InspectionSettings
from ..settings.training import Settings
from .call_checks import check_calls
from .classifier import measure_words
from .cleaning import choose_clean
from .findings import NOTE, PROBLEM, Finding, count_problems
from .leaks import check_held_out, check_overlap
from .pair_checks import (
    check_bad_rows,
    check_copies,
    check_ends,
    check_labels,
    check_sources,
    check_stains,
)
from .scanning import Scan, scan_pairs
from .statistics import (
    check_rules,
    count_languages,
    count_pairs,
    count_sources,
    count_starts,
    describe_lengths,
    measure_rules,
)
from .subject import Subject, load_subject

CLEAN, PROBLEMS = 0, 3  # exit codes


def inspect_data(settings: Settings) -> dict[str, Any]:
    """Everything that was found and counted, as it goes into JSON; writes --output_file.

    Raises:
        UserError: data, tokenizer or --compare cannot be read, or --output_file cannot be written.
    """
    started = time.monotonic()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    _refuse_input_as_output(settings)
    subject = load_subject(settings)
    scan = scan_pairs(subject.pairs)
    findings = [*check_bad_rows(subject), *check_sources(subject)]
    record: dict[str, Any] = {"source": subject.description, "reading": subject.reading.description}
    record["counts"] = count_pairs(subject, scan)
    record["sources"] = count_sources(subject, scan)
    if len(scan):
        found, numbers = _look_at_pairs(subject, scan, settings)
        findings += found
        record |= numbers
    if settings.of(InspectionSettings).output_file is not None:
        record["output"] = _write_clean(subject, findings, settings)
    order = sorted(findings, key=lambda finding: (finding.severity != PROBLEM, -finding.count))
    code = PROBLEMS if count_problems(findings) else CLEAN
    return {
        "verdict": "problems" if code else "clean",
        "exit_code": code,
        "problems": count_problems(findings),
        "notes": sum(finding.severity == NOTE for finding in findings),
        **record,
        "findings": [finding.as_record() for finding in order],
        "seed": settings.training.seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def _refuse_input_as_output(settings: Settings) -> None:
    output = settings.of(InspectionSettings).output_file
    for wish in read_wishes(settings.data.dataset_name):
        if output is not None and read_path(output).resolve() == read_path(wish.name).resolve():
            raise UserError(f"--output_file is {output}: is one of the sources; name another file")


def _look_at_pairs(subject: Subject, scan: Scan, settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    rules = measure_rules(scan)
    numbers: dict[str, Any] = {}
    findings = [
        *check_copies(subject, scan),
        *check_labels(subject, scan),
        *check_ends(subject, scan),
        *check_held_out(subject, scan),
        *check_stains(subject, scan),
        *check_calls(subject, scan),
        *check_rules(rules, len(scan)),
    ]
    if settings.of(InspectionSettings).compare is not None:
        found, numbers["compare"] = check_overlap(subject, scan, settings)
        findings += found
    if settings.model.model_name_or_path is not None:
        found, numbers["tokens"] = _look_at_tokens(subject, settings)
        findings += found
    return findings, numbers | {
        "lengths": describe_lengths(scan),
        "languages": count_languages(scan),
        "shortcuts": rules,
        "first_words": count_starts(scan),
        "words_classifier": measure_words(subject, scan, settings.training.seed),
    }


def _look_at_tokens(subject: Subject, settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    from .tokens import check_tokens, count_tokens, load_encoder, measure_tokens

    encoder, template, max_length = load_encoder(subject, settings)
    counts = count_tokens(subject.pairs, encoder, max_length)
    numbers = measure_tokens(counts, max_length, settings.training.seed)
    numbers |= {"tokenizer": settings.model.model_name_or_path, "chat_template": template}
    return check_tokens(subject, counts, encoder, numbers), numbers


def _write_clean(subject: Subject, findings: list[Finding], settings: Settings) -> dict[str, Any]:
    path = read_path(settings.of(InspectionSettings).output_file)
    keep, removed = choose_clean(subject, findings, settings.of(InspectionSettings).remove or ())
    if len(keep):
        write_pairs(path, subject.pairs.select(keep))
    return {"file": str(path), "pairs": len(keep), "removed": removed}
