"""The studio's page: its tabs, and the running job."""

from typing import Any

import gradio as gr

from lora_adapters.train.studio.compare_tab import CompareTab
from lora_adapters.train.studio.drawing import Artist
from lora_adapters.train.studio.inspect_tab import InspectTab
from lora_adapters.train.studio.jobs import Jobs
from lora_adapters.train.studio.page import TICK, Lists, job_bar, job_log, shown
from lora_adapters.train.studio.paths import Folders
from lora_adapters.train.studio.tools_tab import ToolsTab
from lora_adapters.train.studio.train_tab import TrainTab


def build(folders: Folders, model: list[str]) -> gr.Blocks:
    """Build the page. model: the options of `lora-adapters generate` that select the model."""
    artist, lists = Artist(model, folders.output / "compare"), Lists(folders)
    jobs = Jobs(folders.private, before=artist.release)
    train = TrainTab(folders, jobs, lists)
    with gr.Blocks(title="lora-adapters studio", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            bar = gr.HTML(lambda: job_bar(jobs), elem_id="job")
            stop = gr.Button("Stop", variant="stop", scale=0, min_width=90, size="md", elem_id="stop-job")
            again = gr.Button("Refresh lists", scale=0, min_width=150, size="md", elem_id="refresh")
        with gr.Accordion("Output of the job", open=False) as prints:
            log = gr.Textbox(lambda: job_log(jobs), lines=12, max_lines=24, show_label=False, autoscroll=True,
                             interactive=False, elem_id="log")  # fmt: skip
        with gr.Tab("Compare") as compare:
            CompareTab(folders, jobs, artist, model, lists).build()
        with gr.Tab("Inspect") as inspect:
            InspectTab(folders, lists).build()
        with gr.Tab("Train") as training:
            train.build()
        with gr.Tab("Tools") as tools:
            ToolsTab(folders, jobs, lists).build()
        stop.click(shown(lambda: gr.Info(jobs.stop()) and None), None, None, queue=False)
        occasions = [page.load, again.click, *(tab.select for tab in (compare, inspect, training, tools))]
        gr.on(occasions, lists.refreshed, None, lists.fields, show_progress="hidden")
        train.restore(page)
        train.dry.click(lambda: gr.Accordion(open=True), None, prints, show_progress="hidden")
        _refresh(jobs, bar, log, train)
    return page


def _refresh(jobs: Jobs, bar: Any, log: Any, train: TrainTab) -> None:
    """Update the job's status and output on the page periodically."""
    last = gr.State(("", ""))

    def tick(before: tuple[str, str]) -> list[Any]:
        now = (job_bar(jobs), job_log(jobs))
        changed = [new if new != old else gr.skip() for new, old in zip(now, before, strict=True)]
        return [*changed, now if now != before else gr.skip()]

    timer = gr.Timer(TICK)
    timer.tick(tick, last, [bar, log, last], show_progress="hidden", concurrency_limit=None)
    train.follow(timer)
