"""What a family of base models is stands in its own module: nothing else names one, or assumes its denoiser."""

import ast
from pathlib import Path

import pytest
import torch

from lora_adapters.convert.families import registry
from lora_adapters.train.models.latents import LatentSpace
from lora_adapters.train.models.registry import FAMILIES, KIND_FLAGS, family_of_kind, known_titles
from tests.train.drawn import small_vae

TRAIN = Path(__file__).parents[3] / "train"
FREE = {"models", "objective", "options"}  # an option may have a family's name: --sdxl
ELSEWHERE = sorted(path for path in TRAIN.rglob("*.py") if not FREE & set(path.relative_to(TRAIN).parts))


def test_families_have_the_names_that_they_have_in_files() -> None:
    assert set(FAMILIES) <= {family.name for family in registry.FAMILIES}
    assert all(FAMILIES[name].name == name for name in FAMILIES)


def test_a_kind_is_of_one_family() -> None:
    kinds = [kind for family in FAMILIES.values() for kind in family.kinds]
    assert sorted(kinds) == ["flux_dev", "flux_schnell", "sd1", "sd2", "sdxl"]
    names = {"flux_dev": "flux", "flux_schnell": "flux", "sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
    assert {kind: family_of_kind(kind).name for kind in kinds} == names
    assert KIND_FLAGS == {"v1": "sd1", "v2": "sd2", "sdxl": "sdxl"}
    assert known_titles() == ["SD1.x", "SD2.x", "SDXL", "Flux.1 dev", "Flux.1 schnell"]


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(TRAIN)))
def test_no_other_code_names_a_family_or_its_denoiser(path) -> None:
    if path.parts[-2:] == ("generation", "options.py"):
        pytest.skip("it declares --sdxl")
    if path.parts[-2:] == ("preparing", "options.py"):
        pytest.skip("it declares --family")
    families = FAMILIES.values()
    names = {*FAMILIES, *(kind for one in families for kind in one.kinds), *(one.denoiser for one in families)}
    found = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert found == []


def test_a_latent_space_is_that_of_the_vaes_config() -> None:
    vae = small_vae()
    assert LatentSpace.of(vae) == LatentSpace(4, 8, vae.config.scaling_factor, 0.0)
    latents = torch.randn(2, 4, 8, 8)
    shifted = LatentSpace(4, 8, scale=0.5, shift=0.25)
    assert (shifted.normalised(latents) == (latents - 0.25) * 0.5).all()
    assert (shifted.unnormalised(shifted.normalised(latents)) - latents).abs().max() < 1e-6
