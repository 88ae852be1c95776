"""The tab Tools: the file tools as forms, each run as a job."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from lora_adapters.convert.choices import FORMATS
from lora_adapters.train.studio import file_tools as tools
from lora_adapters.train.studio.jobs import Jobs
from lora_adapters.train.studio.page import Lists, shown
from lora_adapters.train.studio.paths import Folders


class ToolsTab:
    """The tab's forms and their events."""

    def __init__(self, folders: Folders, jobs: Jobs, lists: Lists):
        self._folders, self._jobs, self._lists = folders, jobs, lists

    def build(self) -> None:
        """Add the forms to the current tab, and connect their events."""
        gr.Markdown("Results are written to the `--output` folder. A tool's progress and output are shown at the top.")
        with gr.Tab("Merge"):
            gr.Markdown("Merges adapters exactly into one, whose rank is the sum of their ranks, or into the model.")
            with gr.Row():
                fields = [self._adapters(True, "merge"), _weights("merge"), gr.Checkbox(False, label="into the model")]
            self._end("merge", tools.merge, fields)
        with gr.Tab("SVD merge"):
            gr.Markdown("Merges adapters into one of a given rank: the best approximation of their sum.")
            with gr.Row():
                fields = [self._adapters(True, "svd-merge"), _weights("svd-merge"), _rank(), _conv_rank()]
            self._end("svd-merge", tools.svd_merge, fields)
        with gr.Tab("Extract"):
            gr.Markdown("Saves the difference between another model and the studio's model as an adapter.")
            with gr.Row():
                fields = [self._models(), _rank(), _conv_rank("empty: left out"), _error()]
            self._end("extract", tools.extract, fields)
        with gr.Tab("Resize"):
            gr.Markdown("Reduces the rank of an adapter: the best approximation.")
            with gr.Row():
                fields = [self._adapters(False, "resize"), _rank(), _conv_rank(), _error()]
            self._end("resize", tools.resize, fields)
        with gr.Tab("Convert"):
            gr.Markdown("Converts an adapter's format. With a rank, LoHa, LoKr, DoRA and others become low-rank pairs.")
            with gr.Row():
                fields = [
                    self._adapters(False, "convert"),
                    gr.Dropdown(list(FORMATS), value=FORMATS[0], label="format"),
                    _rank(None),
                ]
            self._end("convert", tools.convert, fields)

    def _end(self, tool: str, words: Callable[..., list[str]], fields: list[Any]) -> None:
        """The last fields of a form: the result's name, its precision, and the button."""
        with gr.Row():
            name = gr.Textbox(label="name of the result", elem_id=f"{tool}-into-name", scale=2)
            precision = gr.Dropdown(list(tools.PRECISIONS), value=tools.OWN, label="precision")
        button = gr.Button(tool.capitalize(), variant="primary", elem_id=f"{tool}-start")

        def start(*values: Any) -> None:
            self._jobs.start(f"{tool} {values[-2]}", words(self._folders, *values), self._folders.private / "tools.log")

        button.click(shown(start), [*fields, name, precision], None)

    def _adapters(self, several: bool, tool: str) -> Any:
        return self._lists.field(
            self._folders.adapter_files,
            value=[] if several else None,
            label="adapters" if several else "adapter",
            multiselect=several,
            allow_custom_value=True,
            info="from the folders, or owner/name on the Hub",
            elem_id=f"{tool}-adapters",
            scale=3,
        )

    def _models(self) -> Any:
        info = "a Diffusers folder or a checkpoint in the folders of adapters"
        return self._lists.field(self._folders.model_files, label="the other model", info=info, scale=3)


def _weights(tool: str) -> Any:
    info = "comma-separated; empty: 1 each"
    return gr.Textbox(label="weights", info=info, placeholder="0.8, 0.5", elem_id=f"{tool}-weights", scale=2)


def _rank(value: int | None = 16) -> Any:
    return gr.Number(value, label="rank", precision=0, minimum=1, info="of the result" if value else "empty: none")


def _conv_rank(info: str = "empty: the same") -> Any:
    return gr.Number(None, label="rank of 3x3", precision=0, minimum=1, info=info)


def _error() -> Any:
    return gr.Number(None, label="relative error", minimum=0, maximum=1, info="empty: use only the rank")
