"""The report's charts as SVG, drawn by matplotlib without pyplot, which would change global state."""

import io
from collections.abc import Sequence
from typing import Any

from lora_adapters.train.training.report.record import Record, last_by_rank, recommended_rank, thinned

_POINTS = 2000
_SMOOTH = 50  # steps in the running mean, at most a tenth of the run


def loss_chart(record: Record) -> str | None:
    """The training loss of each step, its running mean and the learning rate; None before the first step."""
    if not record.losses:
        return None
    steps, losses, rates = zip(*record.losses, strict=True)
    figure, axes = _figure()
    shown = thinned(range(len(steps)), _POINTS)
    axes.plot([steps[at] for at in shown], [losses[at] for at in shown], color="0.8", linewidth=0.8, label="each step")
    mean = _running_mean(losses)
    axes.plot([steps[at] for at in shown], [mean[at] for at in shown], color="C0", label="running mean")
    axes.set(xlabel="step", ylabel="training loss")
    right = axes.twinx()
    right.plot([steps[at] for at in shown], [rates[at] for at in shown], color="C1", linewidth=1, linestyle=":")
    right.set_ylabel("learning rate (dotted)")
    right.set_ylim(bottom=0)
    axes.legend(loc="center right")
    return _svg(figure)


def held_out_chart(record: Record) -> str | None:
    """The held-out loss over steps, a curve for each rank of a DyLoRA; None before the first measurement."""
    if not record.held_out:
        return None
    figure, axes = _figure()
    ranks = sorted({rank for _, rank, _ in record.held_out}, key=lambda rank: rank or 0)
    for at, rank in enumerate(ranks):
        points = sorted((step, loss) for step, own, loss in record.held_out if own == rank)
        colour = None if rank is None else f"{0.75 - 0.75 * (at + 1) / len(ranks):.2f}"  # higher ranks are darker
        label = "held-out loss" if rank is None else f"rank {rank}"
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=label)
    axes.set(xlabel="step", ylabel="held-out loss")
    axes.legend()
    return _svg(figure)


def rank_chart(record: Record) -> str | None:
    """The last held-out loss of each rank, with the recommended rank marked; None with fewer than two ranks."""
    losses = last_by_rank(record)
    if len(losses) < 2:
        return None
    figure, axes = _figure()
    chosen = recommended_rank(losses)
    axes.plot(list(losses), list(losses.values()), color="0.7", marker="o")
    if chosen is not None:
        axes.plot([chosen], [losses[chosen]], color="C2", marker="o", markersize=10, linestyle="", label="recommended")
    axes.set_xticks(list(losses))
    axes.margins(y=0.3)
    axes.legend()
    axes.set(xlabel="rank", ylabel="held-out loss")
    return _svg(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import: half a second

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an <svg> element, without the XML header."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _running_mean(values: Sequence[float]) -> list[float]:
    width = max(1, min(_SMOOTH, len(values) // 10))
    total, means = 0.0, []
    for at, value in enumerate(values):
        total += value - (values[at - width] if at >= width else 0.0)
        means.append(total / min(at + 1, width))
    return means
