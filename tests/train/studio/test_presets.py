"""Presets fill in the page's fields, and reach the trainer whole."""

import pytest

from lora_adapters.kohya_options import without_effect
from lora_adapters.train.options.arguments import parse
from lora_adapters.train.preparing.presets import presets as all_presets
from lora_adapters.train.studio import presets, runs
from lora_adapters.train.studio.paths import StudioError
from lora_adapters.train.studio.runs import TYPES, Recipe

MACHINES, PURPOSES = ([name for _, name in listed] for listed in presets.choices())


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_choice_of_every_preset_reaches_the_trainer(machine, purpose, tmp_path):
    filled = presets.values(machine, purpose)
    recipe = Recipe("mine", str(tmp_path), machine=machine, purpose=purpose, **filled)
    settings = parse(recipe.words("a model", tmp_path)[1:])
    for preset in (all_presets()[machine], all_presets()[purpose]):
        for name, choice in preset.options.items():
            batch = recipe.batch if name in ("max_train_steps", "save_every_n_steps") else None
            wanted = choice.value if batch is None else max(1, choice.value // batch)
            given = getattr(settings, name)
            if name == "network_module":
                assert TYPES[recipe.type] == {"networks.lora": "lierla", "networks.dylora": "dylora"}[wanted]
            else:
                assert given == wanted, name
        for name, choice in preset.dataset.items():
            assert {"resolution": recipe.resolution, "batch_size": recipe.batch}[name] == choice.value
    said = {name for name, *_ in presets.reasons(machine, purpose)}
    assert said == {*all_presets()[machine].options, *all_presets()[machine].dataset, *all_presets()[purpose].options}


def test_without_presets_nothing_is_added():
    assert presets.values("", "") == {}
    assert presets.words("", "") == []
    with pytest.raises(StudioError, match="is not a preset"):
        presets.words("--output_config", "")


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_takes_what_the_page_gives_it(kind, tmp_path):
    recipe = Recipe("mine", str(tmp_path), type=kind, conv_rank=4)
    settings = parse(recipe.words("a model", tmp_path)[1:])
    args = dict(text.split("=") for text in settings.network_args or [])
    assert without_effect(settings.network_module, args) == {}
    assert ("unit" in args) == (kind == "DyLoRA")
    assert runs.TYPES[kind] == settings.network_module
