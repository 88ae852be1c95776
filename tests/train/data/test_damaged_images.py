"""Images that look whole and cannot be decoded: others take their place, the same ones however a run is made."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.data.image_files import FileSource, size_if_whole
from lora_adapters.train.data_error import DataError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from tests.train.training.test_resume import same

BUCKETS = {"min_bucket_reso": 32, "max_bucket_reso": 256, "bucket_reso_steps": 32}


def noise(file: Path, size: tuple[int, int] = (64, 64)) -> None:
    Image.fromarray(np.random.default_rng(len(file.name)).integers(0, 256, (*size[::-1], 3), np.uint8)).save(file)


def damage(file: Path) -> Path:
    """A PNG whose chunks are whole and whose pixels cannot be decompressed: seen only when it is decoded."""
    noise(file)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    assert size_if_whole(FileSource(str(file))) == (64, 64)
    with pytest.raises(Exception):  # noqa: B017, PT011
        Image.open(file).load()
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five whole images and one damaged one, of one bucket, and one more of another."""
    made = tmp_path / "data" / "1_x"
    made.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"image {number}")
    damage(made / "bad.png")
    (made / "bad.txt").write_text("the damaged one")
    Image.new("RGB", (192, 64), "white").save(made / "wide.png")
    (made / "wide.txt").write_text("wide")
    return made


def opened(folder: Path, batch_size: int = 2, **options) -> TrainingData:
    subset = {"image_dir": str(folder), "caption_extension": ".txt", **options}
    config = {"resolution": 64, "enable_bucket": True, **BUCKETS}
    dataset = {"batch_size": batch_size, "subsets": [subset], **config}
    file = folder.parent / "data.json"
    file.write_text(json.dumps({"datasets": [dataset]}))
    return TrainingData(load_data_config({"dataset_config": str(file)}), seed=5)


def seen(batches) -> list:
    return [
        (batch.captions, batch.images, batch.loss_weights.tolist(), batch.sample_seeds.tolist()) for batch in batches
    ]


def equal(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2:] == b[2:] for a, b in zip(first, second, strict=True)
    )


def test_another_image_of_the_bucket_takes_its_place(folder, caplog) -> None:
    data = opened(folder)
    for epoch in range(3):
        captions = [caption for batch in data.batches(epoch) for caption in batch.captions]
        assert len(captions) == 7
        assert "the damaged one" not in captions
        assert set(captions) == {"wide", *(f"image {number}" for number in range(5))}
    assert list(data.damaged) == [str(folder / "bad.png")]
    said = [record.getMessage() for record in caplog.records if "in place of" in record.getMessage()]
    assert len(said) == 1
    assert "bad.png: cannot be read as an image" in said[0]


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_same_ones_in_workers_processes_and_after_a_resume(folder, epoch) -> None:
    alone = seen(opened(folder).batches(epoch))
    assert equal(seen(opened(folder).batches(epoch, workers=2)), alone)
    assert equal(seen(opened(folder).batches(epoch, start=2)), alone[2:])
    data = opened(folder, batch_size=1)
    halves = [seen(data.batches(epoch, rank=rank, world_size=2)) for rank in (0, 1)]
    for whole, first, second in zip(alone, *halves, strict=True):
        parts = [first, second][: len(whole[0])]
        assert whole[0] == [caption for part in parts for caption in part[0]]
        assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_workers_tell_what_is_damaged(folder) -> None:
    data = opened(folder)
    list(data.batches(0, workers=2))
    assert list(data.damaged) == [str(folder / "bad.png")]


def test_the_only_one_of_its_bucket_has_no_part_in_the_loss(folder) -> None:
    (folder / "wide.png").unlink()
    damage(folder / "wide.png")
    content = (folder / "wide.png").read_bytes()
    for path in folder.glob("?.png"):
        path.write_bytes(content)
    (folder / "bad.png").unlink()
    Image.new("RGB", (192, 64), "white").save(folder / "bad.png")
    batches = list(opened(folder).batches(0))
    weights = {weight for batch in batches for weight in batch.loss_weights.tolist()}
    assert weights == {0.0, 1.0}
    blank = next(batch for batch in batches if not batch.loss_weights.any())
    assert not blank.images.any()
    assert blank.images.shape[1:] == (3, 64, 64)


def test_nothing_that_can_be_read_is_an_error(folder) -> None:
    content = (folder / "bad.png").read_bytes()
    for path in folder.glob("*.png"):
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"none of the 7 images can be read; .*cannot be read as an image"):
        list(opened(folder).batches(0))


def test_images_that_change_or_vanish_while_training(folder) -> None:
    data = opened(folder)
    (folder / "0.png").unlink()
    Image.new("RGB", (32, 64)).save(folder / "1.png")
    captions = {caption for batch in data.batches(0) for caption in batch.captions}
    assert captions == {"wide", "image 2", "image 3", "image 4"}
    assert {Path(name).name for name in data.damaged} == {"bad.png", "0.png", "1.png"}


@pytest.mark.parametrize("to_disk", [False, True])
def test_while_caching(folder, basics, caplog, to_disk) -> None:
    options = {**basics, "train_data_dir": str(folder.parent), "enable_bucket": True, **BUCKETS}
    caching = {"cache_latents_to_disk" if to_disk else "cache_latents": True, "vae_batch_size": 2}
    trained = train(settings(**options, **caching))
    assert len(trained.losses) == 3
    assert "1 images cannot be used and are replaced by others" in caplog.text
    again = train(settings(**options, **caching))
    assert again.losses == trained.losses


def test_a_run_ends_with_their_names_and_resumes_exactly(folder, basics, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    options = {**basics, "train_data_dir": str(folder.parent), "enable_bucket": True, **BUCKETS}
    options |= {"max_train_steps": 6, "save_every_n_steps": 2, "save_state": True, "output_name": "x"}
    whole = train(settings(**options))
    assert list(whole.damaged) == [str(folder / "bad.png")]
    assert "1 images could not be used and were replaced by others: " in caplog.text
    state = tmp_path / "out" / "x-step00000002-state"
    resumed = train(settings(**options, resume=str(state)))
    assert resumed.losses == whole.losses[2:]
    assert same(resumed.adapter, whole.adapter)


def test_damaged_held_out_images_and_masks(folder) -> None:
    masks = folder.parent / "masks"
    masks.mkdir()
    for path in folder.glob("*.png"):
        Image.new("L", (64, 64), 255).save(masks / path.name)
    damage(masks / "0.png")
    data = opened(folder, conditioning_data_dir=str(masks))
    captions = {caption for batch in data.batches(0) for caption in batch.captions}
    assert "image 0" not in captions
    assert {Path(name).name for name in data.damaged} == {"bad.png", "0.png"}
