"""What is said of a file that was written."""

import math

import pytest

from lora_adapters import Adapter, cli
from lora_adapters.convert.deltas.svd import Fit, report, verdict
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.tools.summary import shown_size, written
from tests.convert.checkpoints import GOLDEN

FILE = GOLDEN / "sd15" / "c3lier.safetensors"
DIAL = GOLDEN / "sd15" / "dylora.safetensors"


def test_file_size_ranks_words_and_how_to_load(tmp_path) -> None:
    adapter = Adapter.load(FILE)
    saved = adapter.replaced(metadata={**adapter.metadata, "modelspec.trigger_phrase": "sks"}).save(
        tmp_path / "a.safetensors"
    )
    first, words, load, others = written(saved, Adapter.load(saved)).splitlines()
    ranks = {pair.rank for pair in adapter.pairs().values()}
    shown = f"rank {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"rank {ranks.pop()}"
    assert first == (
        f"wrote {saved}: {shown_size(saved.stat().st_size)}, LoRA, {shown}, {len(adapter.modules)} modules of "
        + " and ".join(adapter.components)
    )
    assert (words, load) == ("  trigger words: sks", f'  to load it in diffusers: pipe.load_lora_weights("{saved}")')
    assert "<lora:a:1>" in others


def test_dylora_and_folder(tmp_path) -> None:
    adapter = Adapter.load(DIAL)
    folder = adapter.save(tmp_path / "folder", format="peft")
    text = written(folder, adapter, "from training")
    assert "DyLoRA of unit" in text
    assert "trigger words: from training" in text
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert f"{shown_size(size)}, " in text
    assert "load_lora_weights" not in text


@pytest.mark.parametrize(("error", "amount"), [(0.05, "little"), (0.1, "little"), (0.2, "some"), (0.39, "much")])
def test_whether_an_error_is_much(error, amount) -> None:
    assert verdict(error).startswith(f"{amount} of the change is lost")
    fits = {ModuleName("unet", "conv_in"): Fit(4.0, 4.0 * error**2)}
    said = report(fits, "a higher --dim")
    assert f"all {error:.4g} " in said
    assert ("a higher --dim keeps more" in said) == (amount != "little")
    kept = float(verdict(error).partition("(")[2].partition(" %")[0])
    assert math.isclose(kept, 100 * (1 - error**2), abs_tol=0.01)


def test_programs_end_with_it(tmp_path, capsys) -> None:
    file = tmp_path / "sum.safetensors"
    assert cli.main(["merge", "--models", str(FILE), str(FILE), "--save_to", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {file}: ")
