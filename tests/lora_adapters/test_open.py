"""What is written here opens without this package, in stock diffusers and stock PEFT, and does the same there."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_adapters import Adapter

from .conftest import GOLDEN, expected
from .golden_outputs import error, outputs

FILES = ("c3lier", "block_dims_alphas_conv", "dylora_conv")
STOCK = """
import sys
from pathlib import Path

sys.modules["lora_adapters"] = None  # an import of it would fail
sys.path.insert(0, {tests!r})
from safetensors.torch import save_file
from tests.lora_adapters import conftest
from tests.lora_adapters.golden_outputs import outputs
from peft import PeftModel

golden, out, results = conftest.expected("sd15"), Path({out!r}), {{}}
make = conftest.make_pipeline
for file in sorted(out.glob("*.safetensors")):
    pipe = make()
    pipe.load_lora_weights(out, weight_name=file.name)  # offline, diffusers 0.35 asks for the name
    results |= {{f"{{file.stem}}/{{part}}": value for part, value in outputs(pipe, golden).items()}}
for folder in sorted(out.glob("*.peft")):
    pipe = make()
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder / "unet").get_base_model()
    pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, folder / "text_encoder").get_base_model()
    results |= {{f"{{folder.name}}/{{part}}": value for part, value in outputs(pipe, golden).items()}}
save_file(results, out / "results")
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Outputs of stock libraries for every file that is written here, from one process without this package."""
    out = tmp_path_factory.mktemp("open")
    for name in FILES:
        adapter = Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors")
        adapter.save(out / f"{name}-folded.safetensors", fold_alpha=True)
        adapter.save(out / f"{name}-diffusers.safetensors", "diffusers")
        adapter.save(out / f"{name}.peft", "peft")
    Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors").save(out / "c3lier-kohya.safetensors", fold_alpha=True)
    Adapter.load(GOLDEN / "sd15" / "dylora_conv.safetensors").truncate(4).save(out / "dylora_conv@4.safetensors")
    script = STOCK.format(tests=str(Path(__file__).parent.parent.parent), out=str(out))
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return load_file(out / "results")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["-folded", "-diffusers", ".peft", "@4"])
def test_opens_everywhere(name, kind, stock, pipeline):
    if kind == "@4" and name != "dylora_conv":
        pytest.skip("only DyLoRA is cut")
    pipe, golden = pipeline(), expected("sd15")
    base = outputs(pipe, golden)
    adapter = Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors")
    (adapter.truncate(4) if kind == "@4" else adapter).to_pipeline(pipe)
    ours = outputs(pipe, golden)
    found = {part: stock[f"{name}{kind}/{part}"] for part in ours}
    assert error(found, ours, base) < 1e-4
