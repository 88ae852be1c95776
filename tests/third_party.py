"""Runs PEFT's or diffusers' own tests without this package, and with it imported before and after them.

usage: python tests/third_party.py CHECKOUT TEST... [pytest options]

CHECKOUT is a checkout of PEFT or diffusers, whose `src` is tested. Prints the counts of each run, and every test that
passes only without this package; the exit status is 1 if there are any. The runs are offline: tests that need the Hub
fail in all three runs, except that the text encoders of diffusers' LoRA tests (CLIP, T5, Gemma) are replaced by random
ones.
"""

import collections
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIPS = (
    "peft-internal-testing/tiny-clip-text-2",
    "hf-internal-testing/tiny-random-clip",
    "hf-internal-testing/tiny-sd3-text_encoder",
    "hf-internal-testing/tiny-sd3-text_encoder-2",
)
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
_GEMMA = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_GEMMA |= {"num_key_value_heads": 1, "head_dim": 4}
QWEN = "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration"
# Text encoders whose tokenizer splits text into letters: (class, class of the config, config), or None for no model.
LETTERS = {
    "hf-internal-testing/tiny-random-t5": ("T5EncoderModel", "T5Config", _T5),
    "hf-internal-testing/tiny-random-umt5": ("UMT5EncoderModel", "UMT5Config", _T5),
    "hf-internal-testing/dummy-gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "hf-internal-testing/dummy-gemma-diffusers": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    QWEN: (None, None, {}),
}
# A pytest plugin for all runs: huggingface_hub retries without waiting, since no server will answer; and transformers'
# `add_adapter` accepts the installed PEFT. Since 5.24 it requires 0.22, although older versions work: without this,
# nearly all tests of pipelines with text encoders would fail.
PLUGIN = """
import time
import types

import transformers.integrations.peft
from huggingface_hub.utils import _http

_http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
transformers.integrations.peft.MIN_PEFT_VERSION = "0.17.0"
"""
# The modules that each run imports before its tests, in order.
RUNS = {
    "without": [],
    "first": ["lora_adapters"],
    "last": ["peft", "diffusers.loaders.lora_pipeline", "diffusers.loaders.unet_loader_utils", "lora_adapters"],
}


def make_clip(cache: Path, repository: str) -> None:
    """Put a random text encoder and the tokenizer of examples/tiny-sd into huggingface_hub's cache as a repository."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    snapshot = _snapshot(cache, repository)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "examples" / "tiny-sd" / "tokenizer")
    tokenizer.save_pretrained(snapshot)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModelWithProjection(config).save_pretrained(snapshot)


def make_letters(cache: Path, repository: str) -> None:
    """Put a tokenizer of single letters and a random text encoder into huggingface_hub's cache as a repository."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    snapshot = _snapshot(cache, repository)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = [*special.values(), *map(chr, range(32, 127))]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    if repository == QWEN:
        tokenizer = transformers.Qwen2Tokenizer(vocabulary, [], model_max_length=512, **special)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    else:
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **special)
    tokenizer.save_pretrained(snapshot)
    kind, config, options = LETTERS[repository]
    if kind is not None:
        options = {"vocab_size": len(letters), **options}
        getattr(transformers, kind)(getattr(transformers, config)(**options)).save_pretrained(snapshot)


def _snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in huggingface_hub's cache."""
    folder, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def outcomes(report: Path) -> dict[str, str]:
    """Test -> outcome, from pytest's XML report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def run(checkout: Path, name: str, arguments: list[str], folder: Path) -> dict[str, str]:
    """Run the tests once, and return their outcomes."""
    (folder / "offline_run.py").write_text(PLUGIN)
    paths = [checkout / "src", checkout, folder, *([ROOT] if RUNS[name] else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # some tests go online anyway: their connections are refused at once
    }
    report = folder / f"{name}.xml"
    plugins = [option for module in (*RUNS[name], "offline_run") for option in ("-p", module)]
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}", *plugins, *arguments]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=checkout, env=environment, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run: exit status {done.returncode}")
    return outcomes(report)


def main(checkout: str, *arguments: str) -> int:
    """Run the tests, compare and print. Returns 1 if a test fails only with this package, else 0."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for repository in CLIPS:
            make_clip(folder / "hub", repository)
        for repository in LETTERS:
            make_letters(folder / "hub", repository)
        results = {name: run(Path(checkout).resolve(), name, list(arguments), folder) for name in RUNS}
    without, worse = results["without"], 0
    for name, found in results.items():
        print(f"{name}: {dict(sorted(collections.Counter(found.values()).items()))}")
        lost = [test for test, outcome in without.items() if outcome == "passed" and found.get(test) != "passed"]
        worse += len(lost)
        for test in lost:
            print(f"  {found.get(test, 'missing')}: {test}")
    return min(worse, 1)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
