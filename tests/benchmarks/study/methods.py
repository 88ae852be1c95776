"""The compared methods. Each adds its own trainable layers to a U-Net, and returns them as an `Adapter`."""

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peers import lycoris_network
from torch import nn

from lora_adapters import Adapter, DyLoraConfig, LierLaConfig
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.dylora.config import RATE_POWER, SORT_AT

RANK = 16
RANKS = (1, 2, 4, 8, 16)
ADAPTER = "study"


@dataclass(frozen=True)
class Fitted:
    """A U-Net with a method's layers: the trained parameters, and a function that returns the present adapter."""

    parameters: list[nn.Parameter]
    adapter: Callable[[], Adapter]


@dataclass(frozen=True)
class Method:
    """A method to get adapters of one or all ranks from one training. Scales are 1 at the full rank (alpha = r)."""

    name: str
    ranks: tuple[int, ...] = RANKS
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "dylora"

    def put_on(self, unet: Any, seed: int, kohya: Path | None) -> Fitted:
        """Add the layers to a frozen U-Net, with weights drawn from the seed."""
        torch.manual_seed(seed)
        random.seed(seed)  # the other projects draw ranks from this generator
        return {"plain": _ours, "dylora": _ours, "kohya": _kohya, "lycoris": _lycoris}[self.kind](self, unet, kohya)


def methods(kohya: Path | None) -> Iterator[Method]:
    """All methods that can be run here."""
    for rank in sorted(RANKS, reverse=True):
        yield Method(f"plain r{rank}", (rank,), {"r": rank}, "plain")
    kinds = {
        "": {"rank_sampling": "uniform"},
        " frozen": {"rank_sampling": "uniform", "freeze_lower": True},
        " spread": {"rank_sampling": "spread"},
    }
    for kind, settings in kinds.items():
        for scaling in ("constant", "sqrt", "rank"):
            yield Method(f"ours {scaling}{kind}", settings={"rank_scaling": scaling, **settings})
    yield Method("ours sorted", settings={"sort_at": float(SORT_AT), "rate_power": float(RATE_POWER)})
    if kohya is not None:
        yield Method("kohya", kind="kohya")
    if importlib.util.find_spec("lycoris"):
        yield Method("lycoris", kind="lycoris")


def _ours(method: Method, unet: Any, kohya: Path | None) -> Fitted:
    if method.kind == "plain":
        rank = method.settings["r"]
        config = LierLaConfig(r=rank, lora_alpha=rank)
    else:
        config = DyLoraConfig(r=RANK, lora_alpha=RANK, unit=1, **method.settings)
    unet.add_adapter(config, adapter_name=ADAPTER)
    trained = [one for one in unet.parameters() if one.requires_grad]
    return Fitted(trained, lambda: Adapter.from_models({"unet": unet}, ADAPTER))


def _kohya(method: Method, unet: Any, checkout: Path | None) -> Fitted:
    network = _kohyas_module(checkout).create_network(1.0, RANK, RANK, None, [], unet, unit=1)
    network.apply_to([], unet, False, True)
    unet.kohya = network  # keeps the network alive

    def adapter() -> Adapter:  # without rank_scaling a file is truncated like with kohya's script: scale alpha/b
        return Adapter.from_tensors(network.state_dict()).as_dylora(DyLora(1, "rank"))

    return Fitted(list(network.parameters()), adapter)


def _kohyas_module(checkout: Path | None) -> ModuleType:
    """Import networks/dylora.py of the checkout. From kohya's `library`, which imports OpenCV and torchvision, it needs
    only setup_logging, which is replaced by an empty function."""
    library, utils = ModuleType("library"), ModuleType("library.utils")
    utils.setup_logging = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    sys.modules.setdefault("library", library)
    sys.modules.setdefault("library.utils", utils)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("networks.dylora")


def _lycoris(method: Method, unet: Any, checkout: Path | None) -> Fitted:
    network = lycoris_network(unet, RANK, network_module="dylora", block_size=1)

    def adapter() -> Adapter:  # LyCORIS scales the weight of the first b blocks by alpha/b
        tensors = {}
        for module in network.loras:
            own = module.custom_state_dict()
            down, up = own["lora_down.weight"].detach(), own["lora_up.weight"].detach()
            tensors[f"{module.lora_name}.lora_down.weight"] = down
            tensors[f"{module.lora_name}.lora_up.weight"] = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
            tensors[f"{module.lora_name}.alpha"] = torch.tensor(float(own["alpha"]))
        return Adapter.from_tensors(tensors).as_dylora(DyLora(1, "rank"))

    return Fitted(list(network.parameters()), adapter)
