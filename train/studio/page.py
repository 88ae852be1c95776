"""Functions for all tabs: errors as messages on the page, the running job's progress, and dropdowns of files."""

import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.studio.jobs import Jobs, as_lines, log_text, progress_of
from lora_adapters.train.studio.paths import Folders

TICK = 1.5  # seconds
_LINES = 60  # of a log that are shown

CSS = """
.job {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; font-size: 0.95em}
.job .bar {background: var(--background-fill-secondary); border-radius: 4px; height: 8px; margin-top: 6px}
.job .bar div {background: var(--color-accent); border-radius: 4px; height: 8px}
.job .said {color: var(--body-text-color-subdued); font-family: var(--font-mono); font-size: 0.85em}
.blocks-of input[type=number] {width: 4.2em}
.stays {position: sticky; top: 8px; align-self: flex-start}
footer {display: none !important}
"""


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that expected errors are shown as messages on the page."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except torch.OutOfMemoryError:
            said = "out of device memory: try smaller images, or start the studio with --fp16"
        except OneLineError as error:
            said = str(error)
        except OSError as error:
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise gr.Error(html.escape(said), print_exception=False)

    return call


def framed(report: Path | None) -> str:
    """HTML that shows a run's report in a sandboxed frame, without scripts or popups."""
    if report is None:
        return "There is no report yet: it is written at each save."
    text = html.escape(report.read_text(encoding="utf-8"), quote=True)
    name = html.escape(str(report))
    return f'<p>{name}</p><iframe sandbox srcdoc="{text}" style="width: 100%; height: 900px; border: 0"></iframe>'


def job_bar(jobs: Jobs) -> str:
    """The job's status and progress, as HTML."""
    status = jobs.status()
    if status.job is None:
        return '<div class="job">Nothing is running.</div>'
    lines = [f"<b>{html.escape(status.text)}</b>"]
    log = log_text(status.job)
    if status.running:
        share, said = progress_of(log)
        lines.append(f'<span class="said">{html.escape(said) or "starting"}</span>')
        lines.append(f'<div class="bar"><div style="width: {share:.0%}"></div></div>')
    else:
        lines.append(f'<span class="said">{html.escape(_last(log))}</span>')
    return f'<div class="job">{" &nbsp; ".join(lines[:2])}{"".join(lines[2:])}</div>'


def job_log(jobs: Jobs) -> str:
    """The last lines of the job's output."""
    job = jobs.status().job
    return "" if job is None else "\n".join([line for line in as_lines(log_text(job)) if line][-_LINES:])


def _last(log: str) -> str:
    """The last line of a program's output, ignoring progress bars and indented details."""
    lines = [line for line in as_lines(log) if line and "%|" not in line and not line.startswith(("$ ", " "))]
    return lines[-1] if lines else ""


class Lists:
    """The dropdowns of files, which are refreshed together."""

    def __init__(self, folders: Folders):
        self._folders = folders
        self.fields: list[Any] = []
        self._listed: list[Callable[[], list[str]]] = []

    def field(self, listed: Callable[[], list[str]], **options: Any) -> Any:
        """Create a dropdown of the paths from `listed`, shown relative to their folders. options: for Gradio."""
        self.fields.append(gr.Dropdown(choices=self._choices(listed), **{"value": None, **options}))
        self._listed.append(listed)
        return self.fields[-1]

    def refreshed(self) -> list[Any]:
        """Updates for all dropdowns."""
        return [gr.Dropdown(choices=self._choices(listed)) for listed in self._listed]

    def _choices(self, listed: Callable[[], list[str]]) -> list[tuple[str, str]]:
        return [(self._folders.shown(path), path) for path in listed()]
