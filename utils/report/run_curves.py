"""The curves of a run: training as lines, evaluations of the held-out rows as dots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .charts import Line, draw_lines
from .html import make_chart, make_table
from .run_files import RunFiles

MOST_ROWS = 40  # of the table beside a curve


@dataclass(frozen=True)
class Curve:
    """What one chart shows: names in metrics.jsonl -> how they are called in it."""

    heading: str
    trained: dict[str, str]
    held_out: dict[str, str]
    mark: float | None = None
    scale: float = 1.0
    share: bool = False


def _same(heading: str, *names: str, mark: float | None = None, share: bool = False) -> Curve:
    """A curve of training and of the held-out rows under the same names: `chosen_reward` is called "chosen"."""
    called = {name: name.partition("_")[0] for name in names} if len(names) > 1 else {names[0]: names[0]}
    return Curve(heading, called, called, mark, share=share)


PREFERENCE = (
    _same("Loss", "loss"),
    _same("Rewards", "chosen_reward", "rejected_reward", mark=0.0),
    _same("Margin: chosen minus rejected reward", "margin", mark=0.0),
    _same("Accuracy: share of pairs ranked correctly", "accuracy", mark=0.5, share=True),
    Curve("KL from the reference, nats a response", {}, {"chosen_kl": "chosen", "rejected_kl": "rejected"}, mark=0.0),
    _same("Log-probs of the responses, nats", "chosen_logps", "rejected_logps"),
    Curve("Probability of ending where the chosen response ends", {}, {"chosen_end_prob": "ends"}, share=True),
)
IMITATION = (
    _same("Loss per token", "loss"),
    _same("Accuracy: share of tokens predicted correctly", "token_accuracy", share=True),
)
BOTH = (
    Curve("Gradient norm", {"grad_norm": "norm"}, {}),
    Curve("Learning rate", {"learning_rate": "rate"}, {}, mark=0.0),
    Curve("Tokens per second", {"tokens_per_second": "tokens"}, {}, mark=0.0),
    Curve("Peak memory, GiB", {"peak_memory_bytes": "memory"}, {}, mark=0.0, scale=2.0**-30),
)


def show_curves(run: RunFiles) -> str:
    """All charts for which there are numbers."""
    curves = (*(PREFERENCE if run.is_preference else IMITATION), *BOTH)
    charts = "".join(filter(None, (show_curve(run, curve) for curve in curves)))
    return f'<div class="charts">{charts}</div>' if charts else ""


def show_curve(run: RunFiles, curve: Curve) -> str:
    """One chart with the numbers behind it; nothing when there are none."""
    trained = {called: _scaled(run.trained(name), curve.scale) for name, called in curve.trained.items()}
    held_out = {called: _scaled(run.held_out(name), curve.scale) for name, called in curve.held_out.items()}
    trained, held_out = ({name: line for name, line in part.items() if line} for part in (trained, held_out))
    ends = [f"{name} {line[0][1]:.4g} at first, {line[-1][1]:.4g} at last" for name, line in trained.items()]
    ends += [f"{name} held out {line[0][1]:.4g} at first, {line[-1][1]:.4g} at last" for name, line in held_out.items()]
    title = f"{curve.heading}, by step: {'; '.join(ends)}"
    chart = draw_lines(title, trained, "step", held_out, curve.mark, curve.share, (0, run.last_step))
    columns = {**trained, **{f"{name}, held out": line for name, line in held_out.items()}}
    return make_chart(curve.heading, chart, _number_table(columns)) if chart else ""


def _scaled(line: Line, scale: float) -> Line:
    return [(x, y * scale) for x, y in line]


def _number_table(columns: dict[str, Line]) -> str:
    """The values by step, at most so many rows, evenly drawn, the last among them."""
    steps = sorted({x for line in columns.values() for x, _ in line})
    every = -(-len(steps) // MOST_ROWS)
    shown = steps[::-1][::every][::-1]
    values: Sequence[dict[float, float]] = [dict(line) for line in columns.values()]
    rows = [(f"{x:,.0f}", *(f"{by[x]:.4g}" if x in by else "" for by in values)) for x in shown]
    caption = "by step" if every == 1 else f"by step, one row in {every}"
    return make_table(caption, ("step", *columns), rows)
