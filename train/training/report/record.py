"""The data of a report: numbers and images of the run so far, stored in the page for a resumed run to continue."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_adapters.train.training.validation import HeldOut

_DATA = re.compile(r'<script type="application/json" id="record">(.*?)</script>', re.DOTALL)
CLOSE = 0.01  # a rank is good enough if its held-out loss is within 1 % of the lowest


@dataclass
class Record:
    """losses: (step, loss, learning rate); held_out: (step, rank, loss); samples: (step, image as base64 JPEG)."""

    losses: list[tuple[int, float, float]] = field(default_factory=list)
    held_out: list[tuple[int, int | None, float]] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)

    def add_held_out(self, measured: Iterable[HeldOut]) -> None:
        """Add the measurements that are not yet in the record."""
        known = {(step, rank) for step, rank, _ in self.held_out}
        self.held_out += [(loss.step, loss.rank, loss.loss) for loss in measured if (loss.step, loss.rank) not in known]

    def before(self, step: int) -> "Record":
        """The entries up to and including `step`, from which a run resumes."""
        return Record(*([entry for entry in entries if entry[0] <= step] for entries in vars(self).values()))

    def as_json(self) -> str:
        """JSON for a <script> element: `<` is escaped, so that no text can close the element."""
        return json.dumps(asdict(self)).replace("<", "\\u003c")


def read_record(page: Path) -> Record:
    """Read the record from an existing page; an empty record if there is none or it cannot be read."""
    try:
        match = _DATA.search(page.read_text(encoding="utf-8"))
        content = json.loads(match[1]) if match else {}
        return Record(**{name: [tuple(entry) for entry in content[name]] for name in vars(Record())})
    except (OSError, ValueError, KeyError, TypeError):
        return Record()


def thinned(entries: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the entries, evenly spaced, always including the last one."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round((at + 1) * len(entries) / most) - 1] for at in range(most)]


def last_by_rank(record: Record) -> dict[int, float]:
    """Rank -> held-out loss at the last measured step; empty if losses were not measured by rank."""
    last = max((step for step, _, _ in record.held_out), default=0)
    return {rank: loss for step, rank, loss in record.held_out if step == last and rank is not None}


def recommended_rank(losses: dict[int, float]) -> int | None:
    """The lowest rank whose held-out loss is within 1 % of the lowest loss.

    Args:
        losses: The held-out loss of each rank.

    Returns:
        The rank, or None without measurements.

    >>> recommended_rank({4: 0.153, 8: 0.1452, 16: 0.145})
    8
    """
    best = min(losses.values(), default=0.0)
    return min((rank for rank, loss in losses.items() if loss <= best * (1 + CLOSE)), default=None)
