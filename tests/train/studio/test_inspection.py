"""What Inspect shows is what the file holds."""

import json

import pytest
import torch

from lora_adapters import Adapter, LowRank, ModuleName
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.studio import inspection


@pytest.fixture
def report(tmp_path):
    up = torch.zeros(8, 2)
    up[0, 0], up[1, 1] = 3.0, 4.0
    names = {
        "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder": "text_model.encoder.layers.0.mlp.fc1",
    }
    metadata = {
        "ss_tag_frequency": json.dumps({"1_a": {"cat": 3, " dog": 1}, "1_b": {"cat": 2, "odd": "x"}}),
        "ss_steps": "40",
    }
    pairs = {ModuleName(*name): LowRank(torch.eye(2, 4), up.clone(), alpha=2.0) for name in names.items()}  # ‖ΔW‖ is 5
    adapter = Adapter(pairs, metadata).as_dylora(DyLora(unit=1))
    return inspection.look(str(adapter.save(tmp_path / "a.safetensors")))


def test_summary_blocks_and_modules(report):
    facts = dict(inspection.summary(report))
    assert facts["type"].startswith("DyLoRA (unit 1)")
    assert facts["rank"] == "2"
    assert facts["modules"] == "1 in text_encoder, 1 in unet"
    assert facts["parameters"] == "48 in float32"
    assert facts["hash"] == "matches the metadata"
    assert facts["ss_steps"] == "40"
    assert inspection.block_rows(report) == [("text_encoder", 1, "2", "2", 5.0), ("MID", 1, "2", "2", 5.0)]
    assert inspection.bars(report, "norm") == [("text_encoder", 5.0), ("MID", 5.0)]
    assert inspection.bars(report, "rank") == [("text_encoder", 2.0), ("MID", 2.0)]
    (row, _) = inspection.module_rows(report)
    assert row[1:4] == ("LoRA", 2, 2.0)
    assert "8x2" in row[4]
    assert dict(inspection.metadata(report))["ss_network_module"] == "networks.dylora"


def test_tags_and_trigger_words(report):
    metadata = report.adapter.metadata
    assert inspection.tags(metadata) == [("cat", 5), ("dog", 1)]
    assert inspection.trigger_words(metadata) == "none named; most frequent tags: cat (5), dog (1)"
    assert inspection.trigger_words({**metadata, inspection.TRIGGERS: "sks cat"}) == "sks cat"
    for foreign in ("[1]", "not json", '{"a": 1}', "{" * 5000):
        assert inspection.tags({inspection.TAGS: foreign}) == []
    assert inspection.trigger_words({}) == "none named"
