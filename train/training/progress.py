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
    """The bar, the logs, and the mean loss over the last epoch. Use it as a context."""

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
        self.messages = logging_redirect_tqdm()  # messages stand above the bar, not behind it on its line

    def __enter__(self) -> "Progress":
        self.messages.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.messages.__exit__(*error)
        self.bar.close()

    def stepped(self, position: Position, values: StepValues) -> None:
        """Show a step that was made."""
        self.recent.append(values.loss)
        mean = sum(self.recent) / len(self.recent)
        rates = learning_rates(self.run.optimizer)
        rate = next(iter(rates.values()), 0.0)
        epoch = min(position.epoch + 1, self.run.epochs)  # after the last step there is no next one
        self.bar.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.2e}", epoch=epoch, refresh=False)
        self.bar.update()
        self.report.stepped(position.step, values.loss, rate)
        if self.logging:
            logged = {"loss/current": values.loss, "loss/average": mean}
            logged |= {f"lr/{name}": rate for name, rate in rates.items()}
            self._log(logged | values.others, position.step)

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Put held-out losses into the logs and, the last of them, onto the console."""
        if self.logging:
            self._log(values, step)
        if self.run.accelerator.is_main_process:
            text = ", ".join(f"{_short(name)}{value:.5f}" for name, value in values.items())
            if not is_quiet():
                tqdm.write(f"step {step}: held-out loss {text}")

    def _log(self, values: dict[str, float], step: int) -> None:
        """Put values into the logs. Where that fails training goes on without."""
        try:
            self.run.accelerator.log(values, step=step)
        except Exception as error:  # trackers raise errors of many kinds: a full disk, a connection
            self.logging = False
            log.error("nothing is logged from step %d on (%s)", step, first_line(error))


def _short(name: str) -> str:
    """The name of a held-out loss in the log as the console shows it: its rank, where it has one."""
    _, of_rank, rank = name.partition("rank")
    return f"rank {rank}: " if of_rank else ""


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each group by name; with D-Adaptation and Prodigy also the rate times their d."""
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = group.get("name", str(number))
        if group["lr"] is not None:
            rates[name] = float(group["lr"])
            if "d" in group:
                rates[f"d*{name}"] = float(torch.as_tensor(group["d"]) * group["lr"])
    return rates
