"""--blocks_to_swap on a CPU: weights that wait are NaN, so that any use of one shows, and copies are counted."""

import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.models import block_swap
from lora_adapters.train.models.block_swap import bytes_away, swap_blocks, swapped_blocks
from lora_adapters.train.models.memory import check_machine
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.dry_run import memory
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare

from ..transformers import build_flux, build_sd3


class Poisoned:
    """Main memory whose weights are NaN; `bring` copies the true ones. `most` is the largest number of weights that
    were there at once, `times` how often each was brought."""

    def __init__(self, device: object = None):
        self.true: dict[int, torch.Tensor] = {}
        self.here: set[int] = set()
        self.most, self.times = 0, Counter[int]()

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(weight.float(), float("nan")).to(weight.dtype)
        self.true[kept.data_ptr()] = weight
        return kept

    def bring(self, kept: torch.Tensor) -> torch.Tensor:
        true, key = self.true[kept.data_ptr()], kept.data_ptr()
        size = true.nbytes
        owner = np.empty(size + 64, np.uint8)  # lives as long as the storage, whoever has that
        start = (true.data_ptr() - owner.ctypes.data) % 64  # kernels round differently at another alignment
        copy = torch.from_numpy(owner[start : start + size]).view(true.dtype).view(true.shape).copy_(true)
        assert key not in self.here, "brought while a copy is still there"
        self.here.add(key)
        self.times[key] += 1
        self.most = max(self.most, len(self.here))
        weakref.finalize(owner, self.here.discard, key)
        return copy


@pytest.fixture(params=["flux", "sd3"])
def options(request, basics, tmp_path) -> dict:
    build = {"flux": build_flux, "sd3": build_sd3}[request.param]
    more = {"pretrained_model_name_or_path": str(build(tmp_path / "m")), "t5xxl_max_token_length": 16}
    return {**basics, **more, "network_train_unet_only": True, "gradient_checkpointing": True, "seed": 3}


@pytest.fixture
def poisoned(monkeypatch) -> list[Poisoned]:
    """A run's main memory is poisoned, and its machine has a CUDA device."""
    made: list[Poisoned] = []
    monkeypatch.setattr(
        "lora_adapters.train.training.setup.MainMemory", lambda device: made.append(Poisoned()) or made[-1]
    )
    monkeypatch.setattr("lora_adapters.train.training.setup.check_machine", lambda settings: None)
    return made


def step(run) -> list[torch.Tensor]:
    run.training_mode()
    batch = next(run.data.batches(0))
    run.tell_step(0, 0, batch)
    loss = run.loss.training(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in run.parameters)]


def equal(ones, others) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("module", ["networks.lora", "networks.dylora"])
def test_a_step_is_the_same_and_one_block_is_there_at_once(options, poisoned, module, fp8) -> None:
    options |= {"network_module": module, "fp8_base": fp8}
    plain, run = prepare(settings(**options)), prepare(settings(**options, blocks_to_swap=2))
    blocks = swapped_blocks(run.models, 2)
    assert equal(step(run), step(plain))
    main = poisoned[-1]
    assert len(blocks) > 1
    largest = max(sum(not p.requires_grad for p in block.parameters()) for block in blocks)
    assert main.most <= largest
    assert set(main.times.values()) == {2}  # forward, and recomputed
    assert not main.here
    assert all(p.isnan().all() for block in blocks for p in block.parameters() if not p.requires_grad)
    assert not any(p.isnan().any() for p in run.parameters)
    assert {type(p) for p in run.models.denoiser.parameters()} == {torch.nn.Parameter}


def test_held_out_loss_samples_and_resuming(options, poisoned, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 1\n")
    options |= {"sample_prompts": str(prompts), "sample_every_n_steps": 2, "validation_split": 0.25}
    options |= {"max_train_steps": 4, "save_state": True, "save_every_n_steps": 2, "learning_rate": 1e-2}
    outputs = [tmp_path / name for name in ("plain", "swapped", "again")]
    plain = train(settings(**options | {"output_dir": str(outputs[0])}))
    swapped = train(settings(**options | {"output_dir": str(outputs[1])}, blocks_to_swap=2))
    state = outputs[1] / "at-step00000002-state"
    again = train(settings(**options | {"output_dir": str(outputs[2]), "resume": str(state)}, blocks_to_swap=2))
    assert swapped.losses == plain.losses
    assert again.losses == plain.losses[2:]
    assert swapped.held_out == plain.held_out
    assert plain.held_out
    files = [load_file(output / "last.safetensors") for output in outputs]
    assert equal(files[0].values(), files[1].values())
    assert equal(files[0].values(), files[2].values())
    images = [(output / "sample" / "sample-step00000004.png").read_bytes() for output in outputs]
    assert images[0] == images[1] == images[2]


@pytest.mark.parametrize(
    "asked",
    [
        {"network_module": "networks.loha", "scale_weight_norms": 0.01},
        {"network_module": "networks.loha", "network_args": ["dora_wd=True"]},
        {"network_module": "networks.lokr"},
        {"scale_weight_norms": 0.01},
    ],
    ids=str,
)
def test_other_kinds(options, poisoned, tmp_path, asked) -> None:
    options |= {**asked, "max_train_steps": 3, "learning_rate": 1e-2}
    plain = train(settings(**options))
    swapped = train(settings(**options | {"output_dir": str(tmp_path / "swapped")}, blocks_to_swap=2))
    assert swapped.losses == plain.losses
    files = [load_file(Path(folder) / "last.safetensors") for folder in (options["output_dir"], tmp_path / "swapped")]
    assert equal(files[0].values(), files[1].values())


def test_waiting_weights_go_nowhere(options) -> None:
    """Neither by `to` nor by DistributedDataParallel, which refuses models on two types of devices."""
    run = prepare(settings(**options))
    before = {name for name, p in run.plain.named_parameters()}
    swap_blocks(run.models, run.plain, 2, Poisoned())
    run.plain.to("cpu").to(torch.float64)
    away = {name for name, p in run.plain.named_parameters() if p.dtype != torch.float64}
    assert {name for name, _ in run.plain.named_parameters()} == before
    assert not any("lora_" in name for name in away)
    blocks = [name for name, module in run.plain.named_modules() if module in swapped_blocks(run.models, 2)]
    expected = {name for name in before if name.startswith(tuple(f"{b}." for b in blocks)) and "lora_" not in name}
    assert away == expected
    for name in away:
        module, _, last = name.rpartition(".")
        meta = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
        run.plain.get_submodule(module).register_parameter(last, meta)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        DistributedDataParallel(run.plain)
    finally:
        torch.distributed.destroy_process_group()


def test_the_estimate_is_without_what_waits(options, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lora_adapters.train.training.setup.check_machine", lambda settings: None)
    run, plain = (prepare(settings(**options, **more, dry_run=True)) for more in ({"blocks_to_swap": 2}, {}))
    title = run.models.family.denoiser_title
    sizes = [sum(p.nbytes for p in b.parameters() if not p.requires_grad) for b in swapped_blocks(run.models, 2)]
    assert memory(plain)[title] - memory(run)[title] == sum(sizes) - max(sizes) > 0
    assert bytes_away(run.models, None) == 0


def test_numbers_are_those_of_kohyas_trainer(options, monkeypatch) -> None:
    """Of Flux.1 with 19 and 38 blocks it takes up to 35: 17 and 36."""
    models = prepare(settings(**options)).models
    counts = models.family.blocks_to_swap(35)
    assert counts in ({"transformer_blocks": 17, "single_transformer_blocks": 36}, {"transformer_blocks": 35})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gradient_checkpointing": False}, "--blocks_to_swap needs --gradient_checkpointing"),
        ({"quantize_base": "nf4"}, "cannot be combined with --quantize_base"),
        ({"lowram": True}, "cannot be combined with --lowram"),
        ({"torch_compile": True}, "cannot be combined with --torch_compile"),
        ({}, "--blocks_to_swap needs a CUDA device"),
    ],
)
def test_what_it_cannot_be_beside_is_refused_in_a_line(basics, monkeypatch, asked, said) -> None:
    monkeypatch.setattr("lora_adapters.train.models.memory.bitsandbytes", lambda: None)
    with pytest.raises(OneLineError, match=said) as caught:
        check_machine(settings(**{"gradient_checkpointing": True, "blocks_to_swap": 2, **asked}))
    assert "\n" not in str(caught.value)


def test_more_blocks_than_there_are(options, poisoned) -> None:
    with pytest.raises(
        OneLineError, match=r"--blocks_to_swap 9 needs \d+ transformer_blocks, but this transformer has 2"
    ):
        prepare(settings(**options, blocks_to_swap=9))


def test_a_unet_has_none(basics, monkeypatch) -> None:
    monkeypatch.setattr(block_swap.torch.cuda, "is_available", lambda: True)
    with pytest.raises(OneLineError, match="--blocks_to_swap is for flow matching"):
        prepare(settings(**basics, gradient_checkpointing=True, blocks_to_swap=2))
