"""Adapters of diffusion transformers in every spelling, against dense arithmetic."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError, UnknownFormatError, UnknownModuleError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import by_name
from tests.convert.families.transformer_names import FUSES, LAYERS, H, deltas, pairs

TOLD = {"flux": "flux1", "chroma": "chroma", "sd3": "5-medium", "flux2": "flux_2_dev"} | {
    name: name for name in ("lumina2", "qwen_image")
}
TOLD["zimage"] = "z_image"


def flat(prefix):
    return lambda name: prefix + name.replace(".", "_")


ORIGINAL = {  # how names of the original code are spelled, with the ends of keys
    "kohya": (flat("lora_unet_"), "lora_down.weight", "lora_up.weight", True),
    "ComfyUI": (lambda name: f"diffusion_model.{name}", "lora_down.weight", "lora_up.weight", True),
    "ComfyUI, PEFT's ends": (lambda name: f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight", True),
    "fal": (lambda name: f"base_model.model.{name}", "lora_A.weight", "lora_B.weight", False),
    "bare": (lambda name: name, "lora_A.default.weight", "lora_B.default.weight", False),
    "checkpoint": (lambda name: f"model.diffusion_model.{name}", "lora.down.weight", "lora.up.weight", True),
}
DIFFUSERS = {
    "diffusers": (lambda name: f"transformer.{name}", "lora_A.weight", "lora_B.weight", False),
    "with alpha": (lambda name: f"transformer.{name}", "lora_down.weight", "lora_up.weight", True),
    "PEFT": (lambda name: f"transformer.base_model.model.{name}", "lora_A.weight", "lora_B.weight", False),
    "OneTrainer": (flat("lora_transformer_"), "lora_down.weight", "lora_up.weight", True),
    "LyCORIS": (flat("lycoris_"), "lora_down.weight", "lora_up.weight", True),
    "musubi": (flat("lora_unet_"), "lora_down.weight", "lora_up.weight", True),
}


def file_of(made, spelling):
    spelled, down_end, up_end, has_alpha = spelling
    tensors = {}
    for name, (down, up, alpha) in made.items():
        tensors[f"{spelled(name)}.{down_end}"] = down
        tensors[f"{spelled(name)}.{up_end}"] = up if has_alpha else up * (alpha / len(down))
        if has_alpha:
            tensors[f"{spelled(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def check(adapter, family, wanted):
    assert adapter.architecture == family
    assert {module.path for module in adapter.modules} == set(wanted)
    for module, change in adapter.modules.items():
        torch.testing.assert_close(change.delta(), wanted[module.path], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spelling", ORIGINAL)
@pytest.mark.parametrize("family", LAYERS)
def test_original_names(family, spelling):
    made = pairs(family)
    check(
        Adapter.from_tensors(file_of(made, ORIGINAL[spelling]), {}, family=by_name(family)),
        family,
        deltas(family, made),
    )
    told = {"ss_base_model_version": TOLD[family]}
    check(Adapter.from_tensors(file_of(made, ORIGINAL[spelling]), told), family, deltas(family, made))


@pytest.mark.parametrize("spelling", DIFFUSERS)
@pytest.mark.parametrize("family", LAYERS)
def test_diffusers_names(family, spelling):
    """Each layer has a pair of its own, which nothing splits or swaps."""
    draw = torch.Generator().manual_seed(1)
    shapes = {}
    for _, columns, paths in LAYERS[family].values():
        shapes |= {path: (sum(one.stop - one.start for one in rows), columns) for path, rows in paths.items()}
    made = {
        path: (torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw), 3.0)
        for path, (rows, columns) in shapes.items()
    }
    wanted = {path: up @ down * 1.5 for path, (down, up, _) in made.items()}
    told = {"ss_base_model_version": TOLD[family]}
    check(Adapter.from_tensors(file_of(made, DIFFUSERS[spelling]), told), family, wanted)


@pytest.mark.parametrize("family", ["flux", "sd3", "flux2", "lumina2", "zimage", "qwen_image"])
def test_names_and_widths_tell_the_family(family):
    made = pairs(family)
    adapter = Adapter.from_tensors(file_of(made, ORIGINAL["kohya"]))
    check(adapter, family, deltas(family, made))


@pytest.mark.parametrize("family", FUSES)
def test_every_part_keeps_alpha_and_rank(family):
    made = pairs(family)
    adapter = Adapter.from_tensors(file_of(made, ORIGINAL["kohya"]), family=by_name(family))
    for name, (down, _, alpha) in made.items():
        for path in LAYERS[family][name][2]:
            pair = adapter.modules[ModuleName("transformer", path)]
            assert (pair.rank, pair.alpha) == (len(down), alpha)


def block_diagonal(ranks=(2, 2, 2, 2)):
    """Flux.1's linear1 as kohya's `split_qkv` writes it."""
    draw = torch.Generator().manual_seed(2)
    rows = (H, H, H, 4 * H)
    ups = [torch.randn(count, rank, generator=draw) for count, rank in zip(rows, ranks, strict=True)]
    return torch.randn(sum(ranks), H, generator=draw), torch.block_diag(*ups)


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 3, 2, 4)])
def test_a_block_diagonal_up_becomes_pairs_of_lower_rank(ranks, tmp_path):
    down, up = block_diagonal(ranks)
    made = {"single_blocks.20.linear1": (down, up, 3.0)}
    adapter = Adapter.from_tensors(file_of(made, ORIGINAL["kohya"]), {"ss_base_model_version": "flux1"})
    check(adapter, "flux", deltas("flux", made))
    assert tuple(pair.rank for pair in adapter.modules.values()) == ranks
    written = load_file(adapter.save(tmp_path / "a.safetensors"))
    name = "lora_unet_single_blocks_20_linear1"
    assert torch.equal(written[f"{name}.lora_down.weight"], down)
    assert torch.equal(written[f"{name}.lora_up.weight"], up)
    assert float(written[f"{name}.alpha"]) == pytest.approx(3.0)


def test_an_untrained_up_stays_of_the_full_rank():
    made = {"double_blocks.1.img_attn.qkv": (torch.randn(6, H), torch.zeros(3 * H, 6), 3.0)}
    adapter = Adapter.from_tensors(file_of(made, ORIGINAL["kohya"]), {"ss_base_model_version": "flux1"})
    assert [pair.rank for pair in adapter.modules.values()] == [6, 6, 6]


@pytest.mark.parametrize("family", ["flux", "chroma", "sd3", "flux2", "lumina2"])
def test_kohyas_format_comes_back_as_it_was(family, tmp_path):
    tensors = {key: tensor.half() for key, tensor in file_of(pairs(family), ORIGINAL["kohya"]).items()}
    adapter = Adapter.from_tensors(tensors, {"ss_base_model_version": TOLD[family]})
    written = load_file(adapter.save(tmp_path / "a.safetensors", format="kohya"))
    assert set(written) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(written[key].float(), tensor.float()), key


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("family", LAYERS)
def test_every_format_holds_the_changes(family, format, tmp_path):
    made = pairs(family)
    adapter = Adapter.from_tensors(file_of(made, ORIGINAL["kohya"]), family=by_name(family))
    path = adapter.save(tmp_path / ("a" if format == "peft" else "a.safetensors"), format=format)
    check(Adapter.load(path), family, deltas(family, made))


def test_parts_with_other_downs_become_one_pair_in_kohyas_format(tmp_path):
    draw = torch.Generator().manual_seed(3)
    made = {
        f"transformer_blocks.0.attn.to_{name}": (
            torch.randn(rank, H, generator=draw),
            torch.randn(H, rank, generator=draw),
            alpha,
        )
        for name, rank, alpha in (("q", 2, 1.0), ("k", 3, 2.0), ("v", 1, 5.0))
    }
    told = {"ss_base_model_version": "flux1"}
    adapter = Adapter.from_tensors(file_of(made, DIFFUSERS["with alpha"]), told)
    path = adapter.save(tmp_path / "a.safetensors", format="kohya")
    assert load_file(path)["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, H)
    check(Adapter.load(path), "flux", {name: up @ down * (a / len(down)) for name, (down, up, a) in made.items()})


def test_parts_that_are_missing_do_not_change(tmp_path):
    made = {"transformer_blocks.0.attn.to_k": (torch.randn(2, H), torch.randn(H, 2), 2.0)}
    made |= {"single_transformer_blocks.0.attn.to_v": (torch.randn(2, H), torch.randn(H, 2), 2.0)}
    adapter = Adapter.from_tensors(file_of(made, DIFFUSERS["diffusers"]), {"ss_base_model_version": "flux1"})
    path = adapter.save(tmp_path / "a.safetensors", format="kohya")
    assert load_file(path)["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * H, 2)
    for module, change in Adapter.load(path).modules.items():
        wanted = adapter.modules[module].delta() if module in adapter.modules else torch.zeros(1)
        torch.testing.assert_close(change.delta(), wanted.expand_as(change.delta()))


def test_a_missing_part_of_unknown_size_is_an_error(tmp_path):
    made = {"layers.0.attn.to_q": (torch.randn(2, H), torch.randn(H, 2), 2.0)}
    adapter = Adapter.from_tensors(file_of(made, DIFFUSERS["diffusers"]), {"ss_base_model_version": "lumina2"})
    with pytest.raises(AdapterError, match=r"layers\.0\.attn\.to_k.*whose size is unknown: use the format diffusers"):
        adapter.save(tmp_path / "a.safetensors", format="kohya")


def test_xlabs():
    draw = torch.Generator().manual_seed(4)
    names = {
        "double_blocks.0.processor.qkv_lora1": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
        "double_blocks.0.processor.qkv_lora2": (
            "transformer_blocks.0.attn",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
        ),
        "double_blocks.0.processor.proj_lora1": ("transformer_blocks.0.attn", ("to_out.0",)),
        "double_blocks.0.processor.proj_lora2": ("transformer_blocks.0.attn", ("to_add_out",)),
        "single_blocks.3.processor.qkv_lora": ("single_transformer_blocks.3.attn", ("to_q", "to_k", "to_v")),
        "single_blocks.3.processor.proj_lora": ("single_transformer_blocks.3", ("proj_out",)),
    }
    for prefix in ("", "diffusion_model."):
        tensors, wanted = {}, {}
        for name, (start, parts) in names.items():
            down, up = torch.randn(2, H, generator=draw), torch.randn(len(parts) * H, 2, generator=draw)
            tensors |= {f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up}
            wanted |= {f"{start}.{part}": up[i * H : (i + 1) * H] @ down for i, part in enumerate(parts)}
        check(Adapter.from_tensors(tensors), "flux", wanted)


TEXT = {
    "flux": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "lora_te3_encoder_block_5_layer_0_SelfAttention_q": "text_encoder_2.encoder.block.5.layer.0.SelfAttention.q",
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0": (
            "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0"
        ),
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.o": (
            "text_encoder_2.encoder.block.1.layer.0.SelfAttention.o"
        ),
        "text_encoder.encoder.layers.1.self_attn.q_proj": "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
    },
    "sd3": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "lora_te3_encoder_block_5_layer_0_SelfAttention_q": "text_encoder_3.encoder.block.5.layer.0.SelfAttention.q",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj": (
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
        ),
    },
    "chroma": {
        "lora_te_encoder_block_0_layer_0_SelfAttention_q": "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    },
    "lumina2": {"lora_te_layers_3_mlp_gate_proj": "text_encoder.layers.3.mlp.gate_proj"},
}


@pytest.mark.parametrize("family", TEXT)
def test_text_encoders(family):
    tensors = {}
    for name in TEXT[family]:
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, H), f"{name}.lora_up.weight": torch.randn(H, 2)}
    adapter = Adapter.from_tensors(tensors, {"ss_base_model_version": TOLD[family]})
    assert [str(module) for module in adapter.modules] == list(TEXT[family].values())
    assert adapter.architecture == family


def test_alphas_of_diffusers_metadata():
    made = pairs("flux")
    tensors = file_of({"x_embedder": made["img_in"], "proj_out": made["final_layer.linear"]}, DIFFUSERS["diffusers"])
    facts = '{"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_out": 2}}'
    adapter = Adapter.from_tensors(tensors, {"lora_adapter_metadata": facts, "ss_base_model_version": "flux1"})
    assert {module.path: pair.alpha for module, pair in adapter.modules.items()} == {"x_embedder": 8, "proj_out": 2}


def test_other_kinds_of_a_fused_layer_are_cut_and_written_as_they_were(tmp_path):
    draw = torch.Generator().manual_seed(5)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {"lokr_w1": torch.randn(3, 2, generator=draw), "lokr_w2": torch.randn(H, H // 2, generator=draw)}
    loha = {
        f"hada_w{i}_{half}": torch.randn(*shape, generator=draw)
        for i in (1, 2)
        for half, shape in (("a", (3 * H, 2)), ("b", (2, H)))
    }
    full = {"diff": torch.randn(3 * H, H, generator=draw)}
    dense = {
        "LoKr": torch.kron(factors["lokr_w1"], factors["lokr_w2"]),
        "LoHa": (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"]),
        "full": full["diff"],
    }
    for kind, tensors in {"LoKr": factors, "LoHa": loha, "full": full}.items():
        adapter = Adapter.from_tensors(
            {f"{name}.{end}": tensor for end, tensor in tensors.items()}, {"ss_base_model_version": "flux1"}
        )
        assert list(adapter.kinds) == [kind]
        for number, change in enumerate(adapter.modules.values()):
            torch.testing.assert_close(change.delta(), dense[kind][number * H : (number + 1) * H])
        written = load_file(adapter.save(tmp_path / f"{kind}.safetensors"))
        for end, tensor in tensors.items():
            assert torch.equal(written[f"{name}.{end}"], tensor)
        assert {key.partition(".")[0] for key in written} == {name}
        (path, first), *others = adapter.modules.items()
        for fewer in (dict(others), {path: first.scaled(0.5), **dict(others)}):
            part = adapter.with_modules(fewer)
            if kind == "LoKr":
                with pytest.raises(AdapterError, match="cannot write a part of a LoKr of a fused layer"):
                    part.save(tmp_path / "part.safetensors")
                continue
            again = Adapter.load(part.save(tmp_path / "part.safetensors"))
            assert set(again.modules) == set(fewer)
            for module, change in fewer.items():
                torch.testing.assert_close(again.modules[module].delta(), change.delta())


@pytest.mark.parametrize("family", FUSES)
def test_parts_of_a_fused_layer_with_factors_of_their_own_have_names_of_their_own(family, tmp_path):
    """As LyCORIS trains diffusers' models, and as one that changes a layer with swapped halves."""
    draw = torch.Generator().manual_seed(5)
    tensors, dense = {}, {}
    for _, columns, paths in LAYERS[family].values():
        for path, spans in paths.items():
            count = sum(span.stop - span.start for span in spans)
            w1, w2 = torch.randn(2, 2, generator=draw), torch.randn(count // 2, columns // 2, generator=draw)
            tensors |= {f"lycoris_{path.replace('.', '_')}.lokr_{end}": w for end, w in (("w1", w1), ("w2", w2))}
            dense[path] = torch.kron(w1, w2)
    adapter = Adapter.from_tensors(tensors, {"ss_base_model_version": TOLD[family]})
    check(adapter, family, dense)
    check(Adapter.load(adapter.save(tmp_path / "a.safetensors")), family, dense)


def test_a_lokr_of_swapped_halves_is_written_as_it_was(tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    factors = {"lokr_w1": torch.randn(4, 2), "lokr_w2": torch.randn(H // 2, H // 2)}
    tensors = {f"{name}.{end}": tensor for end, tensor in factors.items()}
    adapter = Adapter.from_tensors(tensors, {"ss_base_model_version": "flux1"})
    whole = torch.kron(*factors.values())
    (change,) = adapter.modules.values()
    torch.testing.assert_close(change.delta(), torch.cat([whole[H:], whole[:H]]))
    written = load_file(adapter.save(tmp_path / "a.safetensors"))
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


def test_kinds_that_tell_rows_alone_are_cut_where_that_is_enough():
    draw = torch.Generator().manual_seed(6)
    name, weight = "diffusion_model.double_blocks.0.img_attn.qkv", torch.randn(3 * H, H, generator=draw)
    rows, columns = torch.randn(1, 3 * H, generator=draw), torch.randn(1, H, generator=draw)
    blocks = torch.randn(6, H // 2, H // 2, generator=draw)
    skew = blocks - blocks.mT
    turns = torch.linalg.solve(torch.eye(H // 2) - skew, torch.eye(H // 2) + skew)
    dense = {
        "rows": ({"weight": rows, "on_input": torch.tensor(0)}, weight * rows.T),
        "columns": ({"weight": columns, "on_input": torch.tensor(1)}, weight * columns),
        "OFT": ({"oft_blocks": blocks}, torch.block_diag(*turns.mT) @ weight - weight),
    }
    for tensors, wanted in dense.values():
        adapter = Adapter.from_tensors(
            {f"{name}.{end}": tensor for end, tensor in tensors.items()}, {"ss_base_model_version": "flux1"}
        )
        assert [module.path.rpartition(".")[2] for module in adapter.modules] == ["to_q", "to_k", "to_v"]
        for number, change in enumerate(adapter.modules.values()):
            rows = slice(number * H, (number + 1) * H)
            torch.testing.assert_close(change.delta(weight[rows]), wanted[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        (
            "final_layer.adaLN_modulation.1",
            {"weight": torch.ones(1, 2 * H), "on_input": torch.tensor(0)},
            "input channels is unknown",
        ),
        (
            "single_blocks.0.linear1",
            {"weight": torch.ones(1, 7 * H), "on_input": torch.tensor(0)},
            "input channels is unknown",
        ),
        ("final_layer.adaLN_modulation.1", {"oft_blocks": torch.zeros(2, H, H)}, "input channels is unknown"),
        ("final_layer.adaLN_modulation.1", {"diff_b": torch.zeros(2 * H)}, "input channels is unknown"),
        ("double_blocks.0.img_attn.qkv", {"oft_blocks": torch.zeros(2, 12, 12)}, "blocks of 12 rows overlap"),
    ],
)
def test_kinds_that_do_not_tell_where_rows_are_are_refused(name, tensors, said):
    """Never read as if the original code had the order of diffusers."""
    tensors = {f"diffusion_model.{name}.{end}": tensor for end, tensor in tensors.items()}
    with pytest.raises(AdapterError, match=said):
        Adapter.from_tensors(tensors, {"ss_base_model_version": "flux1"})


def test_unknown_modules_are_named():
    made = pairs("flux")
    tensors = file_of(made, ORIGINAL["kohya"])
    tensors |= file_of({"double_blocks.0.img_atn.qkv": made["double_blocks.1.img_attn.qkv"]}, ORIGINAL["kohya"])
    with pytest.raises(UnknownModuleError, match=r"img_atn_qkv for Flux\.1; the nearest known name is .*img_attn_qkv$"):
        Adapter.from_tensors(tensors)


def test_halves_and_sizes_that_do_not_fit_are_errors():
    tensors = file_of({"double_blocks.0.img_attn.qkv": (torch.randn(2, H), torch.randn(20, 2), 1.0)}, ORIGINAL["kohya"])
    with pytest.raises(AdapterError, match="20 rows and 8 columns is not that of 3 fused layers"):
        Adapter.from_tensors(tensors)
    del tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    with pytest.raises(AdapterError, match="double_blocks_0_img_attn_qkv"):
        Adapter.from_tensors(tensors)


def test_two_names_of_one_module_with_different_changes_are_an_error():
    made = pairs("flux")
    tensors = file_of({"img_in": made["img_in"]}, ORIGINAL["kohya"])
    down, up, alpha = made["img_in"]
    tensors |= file_of({"x_embedder": (down, 1.1 * up, alpha)}, DIFFUSERS["diffusers"])
    with pytest.raises(UnknownFormatError, match=r"stand for the same module transformer\.x_embedder"):
        Adapter.from_tensors(tensors, {"ss_base_model_version": "flux1"})


@pytest.mark.parametrize("family", FUSES)
def test_a_fused_layer_with_its_parts_beside_it_is_read_once(family):
    """As files are that have q, k and v both together and apart."""
    made = pairs(family)
    tensors = file_of(made, ORIGINAL["kohya"])
    for name, (down, up, alpha) in made.items():
        for path, (rows, *more) in LAYERS[family][name][2].items():
            if not more:
                tensors |= file_of({path: (down, up[rows].clone(), alpha)}, DIFFUSERS["musubi"])
    check(Adapter.from_tensors(tensors, {"ss_base_model_version": TOLD[family]}), family, deltas(family, made))


def test_a_file_is_read_from_disk_with_its_embeddings(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({**file_of(pairs("flux"), ORIGINAL["kohya"]), "bundle_emb.tok.t5": torch.zeros(1, 4)}, path)
    assert list(Adapter.load(path).embeddings) == ["tok.t5"]
