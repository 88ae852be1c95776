"""--sweep: the columns of a sheet from settings such as `weight=0,0.5,1 rank=4,8`."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_adapters.convert.parsing import number
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.generation.networks import Network, unmerged
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.prompt_lines import parse_line, whole
from lora_adapters.train.generation.requests import OPTIONS, ImageRequest
from lora_adapters.train.models.schedulers import check_sampler
from lora_adapters.train.options.values import did_you_mean, key_values

_READ: dict[str, Callable[[str], Any]] = {
    "weight": number,
    "rank": whole,
    "steps": whole,
    "scale": number,
    "sampler": str,
}
_FIELDS = {"weight": "multipliers"}  # other settings have the same name in a request


@dataclass(frozen=True)
class Column:
    """One combination of the swept settings."""

    values: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The values as the title of the column."""
        return "\n".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in self.values.items())  # fmt: skip

    def of(self, request: ImageRequest, networks: Sequence[Network]) -> ImageRequest:
        """The request with this column's settings. A weight multiplies each adapter's own multiplier."""
        changes = {name: value for name, value in self.values.items() if name != "weight"}
        if "weight" in self.values:
            own = tuple(network.multiplier * self.values["weight"] for network in unmerged(networks))
            changes["multipliers"] = own
        return replace(request, **changes)


def columns(sweep: Sequence[str], networks: Sequence[Network], settings: GenerateSettings) -> list[Column]:
    """The columns of a sheet: all combinations of the values of --sweep, the first name changing slowest.

    Args:
        sweep: Items such as "weight=0,0.5,1".
        networks: The adapters.
        settings: The settings.

    Returns:
        The columns. Combinations with weight 0 that differ only in the rank are one column.

    Raises:
        TrainingError: A name or value is invalid, or the adapters do not support it.
    """
    values = {name: _values(name, text) for name, text in _pairs(sweep)}
    live = unmerged(networks)
    for name in ("weight", "rank"):
        if name in values and not live:
            raise TrainingError(
                f"--sweep {name}: there is no adapter to change: give --network_weights, not all merged"
            )
    for rank in values.get("rank", []):
        check_rank(rank, live, "--sweep")
    for sampler in values.get("sampler", []):
        check_sampler(sampler, settings.zero_terminal_snr)
    if any(not 1 <= steps <= 1000 for steps in values.get("steps", [])):
        raise OptionError("--sweep steps: give 1 to 1000")
    made: list[Column] = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        if chosen.get("weight") == 0:
            chosen.pop("rank", None)
        if Column(chosen) not in made:
            made.append(Column(chosen))
    return made


def check_rank(rank: int, live: Sequence[Network], where: str) -> None:
    """Raise TrainingError if no adapter is a DyLoRA, or one of the DyLoRAs does not have this rank."""
    dyloras = [network for network in live if network.adapter.dylora]
    if not dyloras:
        raise TrainingError(f"{where}: rank {rank} is for DyLoRA, and no adapter that is not merged is a DyLoRA")
    for network in dyloras:
        network.at(rank)


def check_lines(lines: Sequence[tuple[str, str]], made: Sequence[Column]) -> None:
    """Raise TrainingError for a prompt line that sets a swept setting or a file name."""
    if not made:
        return
    swept = {_FIELDS.get(name, name): name for column in made for name in column.values}
    for line, where in lines:
        for field in parse_line(line, OPTIONS, where):
            if field == "file":
                raise TrainingError(f"{where}: --f names an image, but --sweep writes one sheet (named by --sheet)")
            if field in swept:
                raise TrainingError(f"{where}: {field} is also set by --sweep {swept[field]}: leave one of them out")


def _pairs(sweep: Sequence[str]) -> list[tuple[str, str]]:
    texts = key_values(sweep, "sweep")
    names = [part.partition("=")[0] for part in sweep]
    for name, text in texts.items():
        if name not in _READ or not text:
            takes = f"it takes NAME=VALUE,VALUE,...; names are {', '.join(_READ)}"
            raise OptionError(f"--sweep {name}={text}: {takes}{did_you_mean(name, _READ)}")
        if names.count(name) > 1:
            raise OptionError(f"--sweep: {name} is given twice")
    return list(texts.items())


def _values(name: str, text: str) -> list[Any]:
    try:
        return list(dict.fromkeys(_READ[name](part.strip()) for part in text.split(",")))
    except ValueError:
        raise OptionError(f"--sweep {name}={text}: it takes values with commas between them") from None
