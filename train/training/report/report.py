"""Keeps the record of a run, and writes the page next to the adapter at each save and at the end."""

import base64
import io
import logging
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.training.report.record import Record, read_record
from lora_adapters.train.training.saving import final_file
from lora_adapters.train.training.setup import Run
from lora_adapters.train.training.validation import HeldOut

log = logging.getLogger(__name__)
_WIDEST = 900  # pixels of an image in the page


class Report:
    """The report of a run. With --no_report, and in all processes but the main one, it does nothing."""

    def __init__(self, run: Run):
        self.run, self.record = run, Record()
        self._last_sample: Path | None = None

    @property
    def enabled(self) -> bool:
        return not self.run.settings.no_report and self.run.accelerator.is_main_process

    @property
    def file(self) -> Path:
        """The page's path: the adapter's name with -report.html."""
        adapter = final_file(self.run)
        return adapter.with_name(f"{adapter.stem}-report.html")

    def resume(self, step: int) -> None:
        """Continue the page of the earlier run, up to the step from which training resumes."""
        if self.enabled:
            self.record = read_record(self.file).before(step)

    def stepped(self, step: int, loss: float, rate: float) -> None:
        """Record a completed step."""
        if self.enabled:
            self.record.losses.append((step, loss, rate))

    def drawn(self, step: int) -> None:
        """Add the sample images, if new ones have been drawn."""
        file = self.run.samples
        if not self.enabled or file is None or file == self._last_sample:
            return
        self._last_sample = file
        try:
            with Image.open(file) as image:
                shown = image.convert("RGB")
            shown.thumbnail((_WIDEST, 4 * _WIDEST))
            data = io.BytesIO()
            shown.save(data, "JPEG", quality=85)
        except Exception as error:
            log.warning("the samples of step %d are missing in the report (%s)", step, first_line(error))
            return
        self.record.samples.append((step, base64.b64encode(data.getvalue()).decode("ascii")))

    def write(self, step: int, measured: Iterable[HeldOut]) -> None:
        """Write the page after `step` steps. An error is logged as a warning, and training continues."""
        if not self.enabled:
            return
        try:
            from lora_adapters.train.training.report.page import page  # needs jinja2 and matplotlib

            self.record.add_held_out(measured)
            text = page(self.run, self.record, step)
            with replacing(self.file) as partial:
                partial.write_text(text, encoding="utf-8")
        except Exception as error:  # a full disk, a chart that matplotlib cannot draw: never stop the run
            log.warning("the report is not written at step %d (%s)", step, first_line(error))
