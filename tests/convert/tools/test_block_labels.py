"""Block weights of diffusion transformers, by lists of numbers and by names of blocks."""

import pytest
import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.programs.info import _place
from lora_adapters.convert.tools.block_weights import parse, weighted

PATHS = {
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q",
    "x_embedder": None,
    "transformer_blocks.3.attn.to_q": None,
    "transformer_blocks.18.norm1.linear": None,
    "single_transformer_blocks.37.proj_mlp": None,
    "proj_out": None,
}


@pytest.fixture
def flux():
    names = [
        ModuleName("transformer", name) if path is None else ModuleName(name, path) for name, path in PATHS.items()
    ]
    modules = {name: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0) for name in names}
    return Adapter(modules, {"ss_base_model_version": "flux1"})


def factors(adapter, text):
    """CLIP, T5, in, D03, D18, S37, out."""
    return [change.scale for change in weighted(adapter, parse(text)).modules.values()]


def test_the_extensions_list_for_flux(flux):
    numbers = [0.1, 0.2, 0.3, *(1 + n for n in range(19)), *(100 + n for n in range(38)), 0.4]
    assert factors(flux, ",".join(map(str, numbers))) == [0.1, 0.2, 0.3, 4, 19, 137, 0.4]
    assert factors(flux, "FLUXALL") == [1] * 7


def test_a_number_for_each_block(flux):
    numbers = [0.5, *(1 + n for n in range(19)), *(100 + n for n in range(38))]
    assert factors(flux, str(numbers)) == [0.5, 0.5, 1, 4, 19, 137, 1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("D03", [0, 0, 0, 1, 0, 0, 0]),
        ("D3", [0, 0, 0, 1, 0, 0, 0]),
        ("double_blocks.3", [0, 0, 0, 1, 0, 0, 0]),
        ("transformer_blocks.18", [0, 0, 0, 0, 1, 0, 0]),
        ("D00-S37", [0, 0, 0, 1, 1, 1, 0]),
        ("double_blocks.0-double_blocks.18 OUT", [0, 0, 0, 1, 1, 0, 1]),
        ("NOT BASE S00-S37", [0, 0, 1, 1, 1, 0, 1]),
        ("CLIP T5", [1, 1, 0, 0, 0, 0, 0]),
        ("T5", [0, 1, 0, 0, 0, 0, 0]),
        ("ND03", [1, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_names_of_blocks(flux, text, wanted):
    assert factors(flux, text) == wanted


def test_blocks_of_another_model_are_an_error(flux):
    with pytest.raises(AdapterError, match=r"Flux\.1 has no block IN02"):
        factors(flux, "IN02")
    with pytest.raises(AdapterError, match="17 block weights are for sd, the adapter is flux"):
        factors(flux, ",".join(["1"] * 17))
    with pytest.raises(AdapterError, match="no model has both blocks of D00-J03"):
        factors(flux, "D00-J03")


@pytest.mark.parametrize("family", ["sd3", "flux2", "lumina2", "zimage", "qwen_image", "chroma"])
def test_every_family_has_a_list(family):
    blocks = by_name(family).blocks
    path = f"{blocks.stacks[0].path}.1.x"
    adapter = Adapter(
        {ModuleName("transformer", p): LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0) for p in _paths(family)},
        {"ss_base_model_version": by_name(family).stated},
    )
    assert blocks.index(path) == 1
    weights = [0.0, *(1 + n for n in range(blocks.count))]
    for module, change in weighted(adapter, parse(str(weights))).modules.items():
        assert change.scale == 1 + blocks.index(module.path)


def _paths(family):
    layout = by_name(family).denoiser.layout
    inside = [path for path in layout.paths() if by_name(family).blocks.index(path) is not None]
    return inside[:3] + inside[-3:]


def test_tables_list_text_encoders_first_and_what_is_behind_the_blocks_last():
    blocks = ["OUT", "S00", "D18", "IN", "text_encoder", "D02"]
    assert sorted(blocks, key=_place) == ["text_encoder", "IN", "D02", "D18", "S00", "OUT"]
