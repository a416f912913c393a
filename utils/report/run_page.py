"""The report of a run as a page: what came of it, how it went, what it was made of; from the run folder alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..arguments.recorded_command import check_arguments
from ..errors import UserError
from ..run.names import REPORT
from ..run.program import join_command
from ..runtime import readable_bytes, readable_seconds
from .axes import round_step
from .charts import draw_histogram
from .html import (
    make_chart,
    make_command,
    make_details,
    make_document,
    make_facts,
    make_paragraph,
    make_section,
    make_table,
    make_tiles,
    show,
)
from .links import link_pages
from .messages import show_messages
from .run_curves import show_curves
from .run_files import RunFiles, read_run
from .run_verdict import describe_run, headline, held_out_of

VERBS = {"train": "DPO run", "sft": "SFT run"}
MEANINGS = {  # held-out metric -> its name for a reader, and how it is written
    "accuracy": ("accuracy: pairs ranked correctly", "{:.1%}"),
    "loss": ("loss", "{:.4f}"),
    "margin": ("margin: chosen minus rejected reward", "{:+.3f}"),
    "chosen_reward": ("reward of chosen responses", "{:+.3f}"),
    "rejected_reward": ("reward of rejected responses", "{:+.3f}"),
    "chosen_logps": ("log-prob of chosen responses, nats", "{:.2f}"),
    "rejected_logps": ("log-prob of rejected responses, nats", "{:.2f}"),
    "chosen_kl": ("KL from the reference along chosen responses, nats", "{:.2f}"),
    "rejected_kl": ("KL along rejected responses, nats", "{:.2f}"),
    "chosen_end_prob": ("probability of ending where the response ends", "{:.3f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
}
READING = {  # whether it is a preference run -> how its metrics are read
    True: "Held out: not trained on. A reward is --beta times the log-ratio of a response's probability under the "
    "model and under the reference. The margin is the chosen response's reward minus the rejected one's; a pair is "
    "ranked correctly where it is above 0, and it should grow. Where the reference is the initial model, all rewards "
    "are 0 before training, and half of the pairs count as correct. KL is how far the model has moved from the "
    "reference: lower is closer.",
    False: "Held out: not trained on. The loss is how unlikely the model finds a token of the responses, on average; "
    "perplexity says the same as a number of equally likely tokens to choose from. Both should fall.",
}
BARS = 24  # of the histogram of margins
COUNTED = ("train_pairs", "train_rows", "held_out_pairs", "held_out_rows")
SHOWN_PROMPTS = 6  # of the samples
MAIN_SETTINGS = {  # name for a reader -> setting -> how its value is written
    "learning rate": {"learning_rate": "{}", "lr_scheduler_type": "{} schedule", "warmup_steps": "warm-up steps {}"},
    "batch": {"rows_per_step": "{} rows per step", "per_device_train_batch_size": "{} at a time on each device"},
    "epochs, steps": {"num_train_epochs": "{} epochs requested", "max_steps": "{} steps"},
    "loss": {"loss_type": "{}", "beta": "beta {}"},
    "LoRA": {"lora_r": "r {}", "lora_alpha": "alpha {}", "lora_dropout": "dropout {}"},
    "optimizer": {"optim": "{}", "weight_decay": "weight decay {}", "max_grad_norm": "gradients clipped at norm {}"},
    "checkpointing of activations": {"gradient_checkpointing": "{}"},
}
MEASURED = ("train_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes")
LONGEST_TEXT = 3000  # characters of a text


def make_run_page(folder: Path) -> str:
    """The page of the run in `folder`, from what is there so far."""
    run = read_run(folder)
    record = run.record
    sentence, kind = describe_run(record)
    title = f"{VERBS.get(record.get('verb', ''), 'Run')}: {folder.name}"
    model = (record.get("settings") or {}).get("model_name_or_path") or "?"
    content = [
        "<header>",
        link_pages(folder, folder / REPORT),
        f"<h1>{show(title)}</h1>",
        make_paragraph(f"{model}, trained on {(record.get('data') or {}).get('source', '?')}", "soft"),
        make_paragraph(sentence, f"verdict {kind}"),
        make_tiles(headline(record)),
        make_paragraph(_when(record), "soft"),
        "</header>",
        make_section("Warnings", *(_show_warning(text) for text in record.get("warnings") or [])),
        make_section("Before and after", *_show_change(record)),
        make_section("Curves", show_curves(run)),
        make_section("Samples", _show_samples(run.samples)),
        make_section("Held-out pairs" if run.is_preference else "Held-out rows", *_show_held_out(run)),
        make_section("Data", *_show_data(record.get("data") or {})),
        make_section("How it was run", *_show_settings(record)),
    ]
    return make_document(title, "\n".join(part for part in content if part))


def _when(record: Mapping[str, Any]) -> str:
    started, updated = (_clock(record.get(name)) for name in ("started", "updated"))
    if record.get("status") == "running":
        return (
            f"Started {started}. This page is of {updated}; it is rewritten while the run continues (status shows "
            "whether it does)."
        )
    return f"Started {started}, ended {updated}."


def _clock(time: str | None) -> str:
    return f"{time[:10]} {time[11:16]} UTC" if time else "?"


def _show_warning(text: str) -> str:
    return f'<article class="finding"><span class="tag">warning</span>{make_paragraph(text)}</article>'


def _show_change(record: Mapping[str, Any]) -> Iterator[str]:
    before, after = held_out_of(record)
    if not before or not after:
        return
    rows = [
        (name, *(_write(form, part[key]) for part in (before, after)), _change(form, after[key] - before[key]))
        for key, (name, form) in MEANINGS.items()
        if isinstance(before.get(key), int | float) and isinstance(after.get(key), int | float)
    ]
    count = after.get("pairs") or after.get("rows") or 0
    kind = "pairs" if "pairs" in after else "rows"
    when = "after" if record.get("status") == "finished" else f"at step {after.get('step', 0):,}"
    yield make_table(f"means over {count:,} held-out {kind}", ("metric", "before", when, "change"), rows)
    yield make_paragraph(READING["accuracy" in after], "soft")


def _change(form: str, difference: float) -> str:
    """A difference in the form of what differs; of shares in points."""
    if form.endswith("%}"):
        return f"{_write('{:+.1f}', 100 * difference)} points"
    return _write(form if "+" in form else form.replace("{:", "{:+"), difference)


def _write(form: str, value: float) -> str:
    """The value in this form; what rounds to nothing is 0, not -0."""
    text = form.format(value)
    return text if any(digit in "123456789" for digit in text) else text.lstrip("+-")


def _show_samples(samples: list[dict[str, Any]]) -> str:
    """The responses to each prompt, the newest first and the others to unfold."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(show_messages(sample.get("prompt")), []).append(sample)
    shown = []
    for prompt, rows in list(by_prompt.items())[:SHOWN_PROMPTS]:
        *others, last = sorted(rows, key=lambda row: row.get("step") or 0)
        first = [others.pop(0)] if others else []
        answers = "".join(_show_answer(row) for row in (*first, last))
        more = (
            make_details(f"{len(others)} in between", f"<dl>{''.join(map(_show_answer, others))}</dl>")
            if others
            else ""
        )
        shown.append(f'<div class="example"><dl><dt>prompt</dt><dd>{_clip(prompt)}</dd>{answers}</dl>{more}</div>')
    rest = len(by_prompt) - len(shown)
    return "".join(shown) + (make_paragraph(f"{rest:,} more prompts are in samples.jsonl.", "soft") if rest > 0 else "")


def _show_answer(sample: Mapping[str, Any]) -> str:
    end = "" if sample.get("ended", True) else ", not finished"
    response = _clip(show_messages(sample.get("response")))
    return f"<dt>at step {show(sample.get('step', '?'))}{end}</dt><dd>{response}</dd>"


def _clip(text: str) -> str:
    return show(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... ({len(text):,} characters)")


def _show_held_out(run: RunFiles) -> Iterator[str]:
    margins = [row["margin"] for row in run.pairs if isinstance(row.get("margin"), int | float)]
    if margins:
        wrong = sum(margin < 0 for margin in margins)
        yield make_paragraph(f"{wrong:,} of {len(margins):,} pairs are ranked wrongly: their margin is below 0.")
        yield _margin_chart(margins)
    for summary, rows in group_examples(run.examples):
        yield make_details(summary, "".join(map(_show_example, rows)))


def group_examples(examples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """The held-out rows that are shown with their texts, in groups: what they have in common, and the rows."""
    worst, best = ([row for row in examples if row.get("kind") == kind] for kind in ("worst", "best"))
    for of, rows in (
        ("most confidently wrong", [row for row in worst if row.get("margin", 0.0) < 0]),
        ("ranked correctly, with the smallest margins", [row for row in worst if row.get("margin", -1.0) >= 0]),
        ("with the largest margins", [row for row in best if "margin" in row]),
    ):
        margins = [row["margin"] for row in rows if "margin" in row]
        if margins:
            ends = dict.fromkeys(f"{end:+.2f}" for end in (min(margins), max(margins)))
            count = f"{len(rows)} pairs" if len(rows) > 1 else "1 pair"
            yield f"{count} {of}: margin {' to '.join(ends)}", list(rows)
    rest = [row for row in (*worst, *best) if "margin" not in row]
    if rest:
        yield f"{len(rest)} rows with the least likely tokens", rest


def _margin_chart(margins: list[float]) -> str:
    low, high = min(*margins, 0.0), max(*margins, 0.0)
    step = round_step(high - low, BARS) if high > low else 1.0
    first, last = math.floor(low / step), math.floor(high / step) + 1
    edges = [float(f"{place * step:.6g}") for place in range(first, last + 1)]
    counts = [0] * (last - first)
    for margin in margins:
        counts[math.floor(margin / step) - first] += 1
    title = f"Margins of {len(margins)} held-out pairs, from {low:.2f} to {high:.2f}"
    chart = draw_histogram(title, edges, {"pairs": counts}, "margin", (0.0, "") if low < 0 else None)
    rows = [(f"{a:g} to {b:g}", f"{count:,}") for (a, b), count in zip(pairwise(edges), counts, strict=True)]
    return make_chart("Margins", chart, make_table("pairs by margin", ("margin", "pairs"), rows))


def _show_example(row: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    facts = ", ".join(f"{name.replace('_', ' ')} {value:+.2f}" for name, value in numbers.items())
    texts = "".join(
        f"<dt>{show(name)}</dt><dd>{_clip(str(row[name]))}</dd>"
        for name in ("prompt", "chosen", "rejected", "completion")
        if name in row
    )
    place = show(row.get("place", "?"))
    return f'<div class="example"><strong>{place}</strong> <span class="soft">{facts}</span><dl>{texts}</dl></div>'


def _show_data(data: Mapping[str, Any]) -> Iterator[str]:
    if not data:
        return
    counts = {name: data[name] for name in COUNTED if name in data}
    facts = [("source", data.get("source")), ("read as", data.get("reading"))]
    facts += [(name.replace("held_out_", "held-out ").replace("train_", "training "), f"{value:,}")
              for name, value in counts.items()]  # fmt: skip
    facts += [
        ("length limit", f"{data.get('max_length', 0):,} tokens (--max_length)"),
        ("shortened to fit", f"{data.get('truncated', 0):,}"),
        ("chat template", data.get("chat_template") or "none: plain texts"),
        *([("reasoning", data["reasoning"])] if data.get("reasoning") else []),
        ("fingerprint", data.get("fingerprint")),
        *([] if data.get("dropped") else [("dropped", "nothing")]),
    ]
    if data.get("shared_prompts"):
        facts.append(("prompts on both sides", f"{data['shared_prompts']:,}: held-out metrics are too optimistic"))
    yield make_facts(facts)
    dropped = data.get("dropped") or {}
    if dropped:
        yield make_table("dropped", ("reason", "rows"), [(name, f"{count:,}") for name, count in dropped.items()])
    sources = data.get("sources") or []
    if len(sources) > 1:
        heads = ("source", "good rows", "drawn", "to train on", "held out")
        keys = ("good", "drawn", "train", "held_out")
        rows = [(source["name"], *(f"{source.get(key) or 0:,}" for key in keys)) for source in sources]
        yield make_table("by source", heads, rows)


def _show_settings(record: Mapping[str, Any]) -> Iterator[str]:
    if record.get("arguments"):
        yield from _show_command(record)
        if record.get("status") in ("interrupted", "failed"):
            yield make_paragraph(
                "With --resume_from_checkpoint auto (and without --overwrite_output_dir) it resumes from its newest "
                "checkpoint, where it has one."
            )
    model, used = record.get("model") or {}, record.get("resources") or {}
    facts = [("reference", record.get("reference") or "none"), ("computing in", record.get("precision", "?"))]
    if model.get("trainable_parameters") and model.get("parameters"):
        trained = f"{model['trainable_parameters']:,} of {model['parameters']:,} parameters"
        facts.append(("trained", f"{trained} ({model.get('architecture', '?')})"))
    facts += _main_settings(record)
    if record.get("device"):
        processes = (record.get("process") or {}).get("processes") or 1
        facts.insert(0, ("device", record["device"] if processes == 1 else f"{processes} x {record['device']}"))
    if used.get("seconds"):
        used = dict.fromkeys(MEASURED, 0.0) | {name: value for name, value in used.items() if value is not None}
        kind = "pairs" if record.get("verb") == "train" else "rows"
        facts += [
            ("time", f"{readable_seconds(used['seconds'])}, of it {readable_seconds(used['train_seconds'])} training"),
            ("speed", f"{used['pairs_per_second']:.1f} {kind} and {used['tokens_per_second']:,.0f} tokens a second"),
            ("peak memory", readable_bytes(used["peak_memory_bytes"])),
            ("GPU hours", f"{used['gpu_hours']:.3f}" if used.get("gpu_hours") else "none"),
            ("cost", f"{used['cost']:,.2f}" if used.get("cost") is not None else "unknown: pass --cost_per_hour"),
        ]
    yield make_facts(facts)
    settings, values = record.get("settings") or {}, record.get("used") or {}
    given = set(record.get("given") or ())
    rows = [
        (name, _setting(values.get(name, settings.get(name))), "yes" if name in given else "")
        for name in dict.fromkeys((*settings, *values))
    ]
    if rows:
        table = make_table("values used", ("setting", "value used", "given"), rows, words=True)
        yield make_details(f"all {len(rows)} settings", table)
    versions = list((record.get("versions") or {}).items())
    if versions:
        yield make_details("versions", make_table("versions", ("package", "version"), versions))


def _main_settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that a person asks for first, with the values that were used; none that an older record lacks."""
    values = (record.get("settings") or {}) | (record.get("used") or {})

    def text(name: str) -> str | None:
        return None if values.get(name) in (None, -1) else _setting(values[name])  # -1: no limit of steps

    facts = [
        (label, ", ".join(form.format(text(name)) for name, form in parts.items() if text(name) is not None))
        for label, parts in MAIN_SETTINGS.items()
    ]
    if not values.get("use_lora"):
        facts = [fact for fact in facts if fact[0] != "LoRA"]
    return [(label, found) for label, found in facts if found]


def _show_command(record: Mapping[str, Any]) -> Iterator[str]:
    """The command, and what in it would run code: the record, and so the page, may come from anybody."""
    try:
        words, named = check_arguments(record)
    except UserError as error:
        yield make_paragraph(f"No command is shown: {error.faults[0]}", "soft")
        return
    yield make_command(break_command(words))
    for text in named:
        yield make_paragraph(
            f"Before you type it: {text} is part of it, and runs code or sends data that the record names."
        )


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def break_command(arguments: list[str]) -> str:
    """The command of a run with one flag per line, as a shell takes it."""
    lines = [join_command(())]
    for word in arguments:
        quoted = shlex.quote(word)
        if word.startswith("--"):
            lines.append(f"    {quoted}")
        else:
            lines[-1] += f" {quoted}"
    return " \\\n".join(lines)
