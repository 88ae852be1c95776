"""The tab Inspect: one adapter, or two side by side."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
import pandas

from lora_adapters.train.studio import inspection
from lora_adapters.train.studio.inspection import Report, Row
from lora_adapters.train.studio.page import Lists, shown
from lora_adapters.train.studio.paths import Folders

_FILES = (("Adapter", "from the folders, or owner/name on the Hub"), ("Compare with", "another adapter"))
_PLOTS = (("norm", "Norm of the weight change in each block"), ("rank", "Largest rank in each block"))
_TABLES = (
    ("Summary", ["fact", "value"], inspection.summary),
    ("Blocks", ["block", "modules", "ranks", "alphas", "norm"], inspection.block_rows),
    ("Tags", ["tag", "count"], lambda report: inspection.tags(report.adapter.metadata)),
    ("Modules", ["module", "kind", "rank", "alpha", "tensors"], inspection.module_rows),
    ("Metadata", ["key", "value"], inspection.metadata),
)


class InspectTab:
    """The tab's fields, and their content."""

    def __init__(self, folders: Folders, lists: Lists):
        self._folders, self._lists = folders, lists

    def build(self) -> None:
        """Add the fields to the current tab, and connect their events."""
        with gr.Row():
            files = [
                self._lists.field(
                    self._folders.adapter_files, allow_custom_value=True, label=label, info=info, elem_id=f"inspect-{n}"
                )
                for n, (label, info) in enumerate(_FILES, start=1)
            ]
        plots = []
        for what, title in _PLOTS:
            with gr.Row():
                for side in (1, 2):
                    plots.append(
                        gr.BarPlot(
                            None, x="block", y=what, title=title, height=230, x_label_angle=-60, visible=side == 1,
                            elem_id=f"{what}-{side}",
                        )
                    )  # fmt: skip
        tables = []
        for title, headers, _ in _TABLES:
            with gr.Tab(title), gr.Row():
                for side in (1, 2):
                    tables.append(
                        gr.Dataframe(
                            headers=headers, datatype="str", interactive=False, wrap=True, max_height=460,
                            show_label=False, visible=side == 1, elem_id=f"{title.lower()}-{side}",
                        )
                    )  # fmt: skip
        gr.on([file.change for file in files], shown(self._look), files, [*plots, *tables])

    def _look(self, *sources: str | None) -> list[Any]:
        reports = [inspection.look(self._folders.adapter(source)) if source else None for source in sources]
        plots = [plot for what, _ in _PLOTS for plot in _plots(reports, what)]
        tables = [
            gr.Dataframe(
                value=_frame(rows(report), headers) if report else None, visible=report is not None or side == 0
            )
            for _, headers, rows in _TABLES
            for side, report in enumerate(reports)
        ]
        return [*plots, *tables]


def _frame(rows: Sequence[Row], headers: list[str]) -> list[list[Any]]:
    return [["" if value is None else value for value in row] for row in rows] or [[""] * len(headers)]


def _plots(reports: Sequence[Report | None], what: str) -> list[Any]:
    """A plot for each adapter, with the same scale."""
    rows = [inspection.bars(report, what) if report else [] for report in reports]
    largest = max((value for each in rows for _, value in each), default=0.0)
    return [
        gr.BarPlot(
            value=pandas.DataFrame(each, columns=["block", what]),
            sort=[block for block, _ in each],
            y_lim=[0, 1.05 * largest],
            visible=report is not None or side == 0,
        )
        for side, (report, each) in enumerate(zip(reports, rows, strict=True))
    ]
