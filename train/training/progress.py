"""Progress bar and metric logging: loss, learning rate and speed while a run trains."""

import logging
from collections import deque
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.terminal import is_quiet
from lora_adapters.train.training.checkpoints import Position
from lora_adapters.train.training.report.report import Report
from lora_adapters.train.training.setup import Run
from lora_adapters.train.training.step_values import StepValues
from lora_adapters.train.training.trackers import tracker_names

log = logging.getLogger(__name__)


class Progress:
    """The progress bar, the logs, and the mean loss over the last epoch. Use it as a context manager."""

    def __init__(self, run: Run, step: int):
        self.run = run
        self.bar = tqdm(
            total=run.steps,
            initial=step,
            desc="training",
            unit="step",
            smoothing=0.1,
            disable=is_quiet() or not run.accelerator.is_local_main_process,
        )
        self.recent: deque[float] = deque(maxlen=min(1000, max(1, run.steps_per_epoch)))
        self.report = Report(run)
        self.logging = bool(tracker_names(run.settings))
        self.messages = logging_redirect_tqdm()  # log messages are printed above the bar

    def __enter__(self) -> "Progress":
        self.messages.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.messages.__exit__(*error)
        self.bar.close()

    def stepped(self, position: Position, values: StepValues) -> None:
        """Show and log a completed step."""
        self.recent.append(values.loss)
        mean = sum(self.recent) / len(self.recent)
        rates = learning_rates(self.run.optimizer)
        rate = next(iter(rates.values()), 0.0)
        epoch = min(position.epoch + 1, self.run.epochs)  # there is no epoch after the last step
        self.bar.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.2e}", epoch=epoch, refresh=False)
        self.bar.update()
        self.report.stepped(position.step, values.loss, rate)
        if self.logging:
            logged = {"loss/current": values.loss, "loss/average": mean}
            logged |= {f"lr/{name}": rate for name, rate in rates.items()}
            self._log(logged | values.others, position.step)

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Log held-out losses, and print them to the console."""
        if self.logging:
            self._log(values, step)
        if self.run.accelerator.is_main_process:
            text = ", ".join(f"{_short(name)}{value:.5f}" for name, value in values.items())
            if not is_quiet():
                tqdm.write(f"step {step}: held-out loss {text}")

    def _log(self, values: dict[str, float], step: int) -> None:
        """Log values. After an error nothing more is logged, and training continues."""
        try:
            self.run.accelerator.log(values, step=step)
        except Exception as error:  # trackers raise many kinds of errors: full disk, lost connection
            self.logging = False
            log.error("logging failed, and nothing is logged from step %d on (%s)", step, first_line(error))


def _short(name: str) -> str:
    """The console's label of a held-out loss: its rank, if it has one."""
    _, of_rank, rank = name.partition("rank")
    return f"rank {rank}: " if of_rank else ""


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each group by name; for D-Adaptation and Prodigy also d * rate."""
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = group.get("name", str(number))
        if group["lr"] is not None:
            rates[name] = float(group["lr"])
            if "d" in group:
                rates[f"d*{name}"] = float(torch.as_tensor(group["d"]) * group["lr"])
    return rates
