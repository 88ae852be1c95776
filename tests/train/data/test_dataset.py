import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from lora_adapters.train.data.batches import Batch
from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.data_error import DataError
from tests.train.drawn import LATENT_FILES, data, folder, small_vae

SIZES = [(64, 64), (90, 64), (64, 64), (64, 96), (70, 70), (128, 64), (64, 64)]
LIVELY = {
    "enable_bucket": True, "bucket_reso_steps": 8, "batch_size": 2, "num_repeats": 2, "flip_aug": True,
    "color_aug": True, "random_crop": True, "shuffle_caption": True, "caption_tag_dropout_rate": 0.2,
    "caption_dropout_rate": 0.1,
}  # fmt: skip


def lively(tmp_path, **options) -> TrainingData:
    captions = [f"thing {number}, a, b, c, d" for number in range(len(SIZES))]
    return data(folder(tmp_path / "p", SIZES, captions), **(LIVELY | options))


def same(one: Batch, other: Batch) -> bool:
    tensors = [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]
    return one.captions == other.captions and all(torch.equal(getattr(one, n), getattr(other, n)) for n in tensors)


def equal(one, other) -> bool:
    return all(same(first, second) for first, second in zip(list(one), list(other), strict=True))


def test_shapes_and_ranges(tmp_path):
    training = lively(tmp_path)
    batches = list(training.batches(0))
    assert len(batches) == training.batches_per_epoch()
    assert sum(len(batch.captions) for batch in batches) == training.num_images == 14
    for batch in batches:
        count, channels, height, width = batch.images.shape
        assert (channels, len(batch.captions), len(batch.loss_weights)) == (3, count, count)
        assert batch.target_sizes.tolist() == [[height, width]] * count
        assert height * width <= 64 * 64
        assert batch.images.abs().max() <= 1
        assert batch.latents is batch.masks is batch.text is None
        assert len(set(batch.sample_seeds.tolist())) == count
        assert batch.loss_weights.eq(1).all()


def test_an_epoch_is_the_same_again_and_another_epoch_or_seed_is_not(tmp_path):
    training, again, other = lively(tmp_path), lively(tmp_path), data(tmp_path / "p", seed=8, **LIVELY)
    assert equal(training.batches(3), again.batches(3))
    assert not equal(training.batches(3), training.batches(4))
    assert [batch.captions for batch in training.batches(3)] != [batch.captions for batch in other.batches(3)]


def test_global_random_state_neither_matters_nor_changes(tmp_path):
    training = lively(tmp_path)
    first = list(training.batches(1))
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert equal(training.batches(1, workers=2), first)
    assert equal(training.batches(1), first)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_and_starting_late_change_nothing(tmp_path, persistent):
    images = folder(tmp_path / "p", SIZES)
    config = {"datasets": [{"resolution": 64, **LIVELY, "subsets": [{"image_dir": str(images)}]}]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    loaded = load_data_config({"dataset_config": str(tmp_path / "c.json")})
    training = TrainingData(loaded, seed=7, persistent_workers=persistent)
    whole = [list(training.batches(epoch)) for epoch in (0, 1)]
    for workers in (0, 2):
        broken_off = training.batches(0, workers=workers)
        next(broken_off)
        del broken_off
        for epoch in (1, 0):
            assert equal(training.batches(epoch, workers=workers), whole[epoch])
            assert equal(training.batches(epoch, start=3, workers=workers), whole[epoch][3:])
    assert list(training.batches(0, start=len(whole[0]))) == []


def test_starting_late_loads_nothing_before(tmp_path, monkeypatch):
    training = lively(tmp_path)
    opened = []
    real = __import__("lora_adapters.train.data.loader", fromlist=["x"]).open_image
    monkeypatch.setattr("lora_adapters.train.data.loader.open_image", lambda one: opened.append(one) or real(one))
    last = list(training.batches(0, start=training.batches_per_epoch() - 1))
    assert len(opened) == len(last[0].captions)


def test_two_processes_together_see_what_one_sees_with_twice_the_batch(tmp_path):
    training, doubled = lively(tmp_path), lively(tmp_path, batch_size=4)
    parts = [list(training.batches(2, rank=rank, world_size=2)) for rank in (0, 1)]
    whole = list(doubled.batches(2))
    assert len(parts[0]) == len(parts[1]) == training.batches_per_epoch(world_size=2) == len(whole)
    for one, first, second in zip(whole, *parts, strict=True):
        halves = [(batch.images[row], batch.captions[row], batch.loss_weights[row], batch.sample_seeds[row])
                  for batch in (first, second) for row in range(len(batch.captions))]  # fmt: skip
        used = [half for half in halves if half[2] > 0]
        assert [half[1] for half in used] == one.captions
        assert torch.equal(torch.stack([half[0] for half in used]), one.images)
        assert torch.equal(torch.stack([half[3] for half in used]), one.sample_seeds)
        losses = {seed.item(): float(index) for index, seed in enumerate(one.sample_seeds)}
        means = [
            sum(losses[s.item()] * w.item() for s, w in zip(batch.sample_seeds, batch.loss_weights, strict=True))
            / len(batch.captions)
            for batch in (first, second)
        ]
        assert sum(means) / 2 == pytest.approx(sum(losses.values()) / len(losses))


def test_cached_and_uncached_epochs_agree_in_everything_but_the_pixels(tmp_path):
    quiet = {"color_aug": False, "random_crop": False}
    plain, cached = lively(tmp_path, **quiet), lively(tmp_path, **quiet)
    cached.cache_latents(small_vae(), LATENT_FILES)
    for one, other in zip(plain.batches(1), cached.batches(1, workers=1), strict=True):
        other.images, one.latents, other.latents = one.images, None, None
        assert same(one, other)


def test_sizes_for_sdxl(tmp_path):
    training = data(folder(tmp_path / "p", [(128, 64)]), flip_aug=True)
    for epoch in range(4):
        (batch,) = training.batches(epoch)
        assert batch.original_sizes.tolist() == [[64, 128]]
        assert batch.crop_top_lefts.tolist() == [[0, 32]]  # 128x64 covers 64x64, 64 columns stand over
        assert batch.target_sizes.tolist() == [[64, 64]]


def test_regularisation_images_match_the_training_images(tmp_path):
    folder(tmp_path / "train" / "3_sks dog", [(64, 64)] * 4)
    folder(tmp_path / "reg" / "1_dog", [(64, 64)] * 5)
    line = {
        "train_data_dir": tmp_path / "train",
        "reg_data_dir": tmp_path / "reg",
        "resolution": 64,
        "train_batch_size": 4,
    }
    training = TrainingData(load_data_config(line), seed=0, prior_loss_weight=0.25)
    assert (training.num_images, training.num_regularisation) == (12, 12)
    weights = {caption: set() for caption in ("sks dog", "dog")}
    uses = dict.fromkeys(weights, 0)
    for batch in training.batches(0):
        for caption, weight in zip(batch.captions, batch.loss_weights.tolist(), strict=True):
            weights[caption].add(weight)
            uses[caption] += 1
    assert weights == {"sks dog": {1.0}, "dog": {0.25}}
    assert uses == {"sks dog": 12, "dog": 12}
    used = [training.images.entries.count(number) for number in range(4, 9)]
    assert used == [3, 3, 2, 2, 2]


def test_validation_is_apart_fixed_and_plain(tmp_path):
    options = {"validation_split": 0.3, "validation_seed": 5, "caption_prefix": "so"}
    training, other = lively(tmp_path, **options), data(tmp_path / "p", seed=99, **LIVELY | options)
    held_out = training.validation
    assert held_out is not None
    names = [{one.origin.source.name for one in part.images.images} for part in (training, held_out, other.validation)]
    assert names[0].isdisjoint(names[1])
    assert (len(names[0]), len(names[1])) == (5, 2)
    assert names[1] == names[2]
    assert equal(held_out.batches(0), held_out.batches(7, workers=1))
    assert all(c.startswith("so thing") and c.endswith(", a, b, c, d") for b in held_out.batches(0) for c in b.captions)
    assert training.num_images == 10
    assert lively(tmp_path).validation is None


def test_validation_is_cached_with_the_rest(tmp_path):
    training = data(folder(tmp_path / "p", [(64, 64)] * 4), validation_split=0.5)
    training.cache_latents(small_vae(), LATENT_FILES)
    training.cache_text(lambda captions: {"hidden_state": torch.zeros(len(captions), 2)})
    (batch, _) = training.validation.batches(0)
    assert batch.latents.shape == (1, 4, 8, 8)
    assert batch.text["hidden_state"].shape == (1, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_alpha_masks(tmp_path, cached):
    images = folder(tmp_path / "p", [(64, 64)])
    see_through = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    see_through.paste((200, 9, 9, 0), (0, 0, 20, 64))
    see_through.save(images / "1.png")
    subset = {"image_dir": str(images), "alpha_mask": True, "flip_aug": True}
    training = data(images, file={"datasets": [{"batch_size": 2, "subsets": [subset]}]})
    assert training.has_masks
    if cached:
        training.cache_latents(small_vae(), LATENT_FILES, to_disk=True)
    rows = set()
    for epoch in range(8):
        (batch,) = training.batches(epoch)
        assert batch.masks.shape == (2, 1, 8, 8)
        rows |= {tuple(row) for row in batch.masks[:, 0, 3].tolist()}
    half = (0.0, 0.0, 0.5, *[1.0] * 5)
    assert rows == {(1.0,) * 8, half, half[::-1]}


@pytest.mark.parametrize("cached", [False, True])
def test_masks_from_a_folder_and_ones_where_another_subset_has_none(tmp_path, cached):
    images, plain, masks = folder(tmp_path / "p", [(64, 64)]), folder(tmp_path / "q", [(64, 64)]), tmp_path / "m"
    masks.mkdir()
    Image.new("L", (32, 32), 51).save(masks / "0.png")
    subsets = [{"image_dir": str(images), "conditioning_data_dir": str(masks)}, {"image_dir": str(plain)}]
    training = data(images, file={"datasets": [{"batch_size": 2, "subsets": subsets}]})
    if cached:
        training.cache_latents(small_vae(), LATENT_FILES)
    (batch,) = training.batches(0)
    assert sorted(batch.masks.mean((1, 2, 3)).tolist()) == pytest.approx([0.2, 1.0])


def test_token_warmup_counts_optimizer_steps(tmp_path):
    images = folder(tmp_path / "p", [(64, 64)] * 4, ["a, b, c, d, e"] * 4)
    training = data(images, token_warmup_step=0.5)
    with pytest.raises(DataError, match="call set_schedule first"):
        training.batches(0)
    training.set_schedule(max_train_steps=8, gradient_accumulation_steps=2)
    counts = [len(batch.captions[0].split(", ")) for epoch in range(3) for batch in training.batches(epoch)]
    # step 0 0 1 1 | 2 2 3 3 | 4 ...: 1 + floor(step * 4 / 4) tags
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_named_in_one_line(tmp_path, workers):
    images = folder(tmp_path / "p", [(64, 64)])
    training = data(images)
    (images / "0.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"0\.png: cannot be read as an image") as error:
        list(training.batches(0, workers=workers))
    assert "\n" not in str(error.value)


def test_what_leaves_nothing_to_train_on(tmp_path, caplog):
    images = folder(tmp_path / "p", [(64, 64)])
    with pytest.raises(DataError, match="every subset has num_repeats 0"):
        data(images, num_repeats=0)
    only_reg = {"datasets": [{"subsets": [{"image_dir": str(images), "is_reg": True}]}]}
    with pytest.raises(DataError, match="only regularisation images"):
        data(images, file=only_reg)
    with pytest.raises(DataError, match="validation_split leaves no image"):
        data(images, validation_split=0.5)
    twice = {"datasets": [{"subsets": [{"image_dir": str(images)}] * 2}]}
    assert data(images, file=twice).num_images == 1
    assert "is given twice in a dataset; the first is used" in caplog.text


def test_summary_and_metadata_of_a_dataset_file(tmp_path):
    training = lively(tmp_path, validation_split=0.3)
    text = training.summary()
    for part in ("64x64, buckets with sides 32 to 1024 in steps of 8, batch size 2", "5 images, 2 repeats"):
        assert part in text
    assert "an epoch: 10 training images with repeats, 0 for regularisation" in text
    assert "validation: 2 images" in text
    metadata = training.metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    (entry,) = json.loads(metadata["ss_datasets"])
    assert (entry["is_dreambooth"], entry["batch_size_per_device"], entry["num_train_images"]) == (True, 2, 10)
    assert (entry["resolution"], entry["min_bucket_reso"]) == ([64, 64], 32)
    assert entry["subsets"][0]["img_count"] == 5
    assert entry["subsets"][0]["shuffle_caption"] is True
    buckets = entry["bucket_info"]["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == 10
    tags = json.loads(metadata["ss_tag_frequency"])["p"]
    assert tags["a"] == 5
    assert json.loads(metadata["ss_dataset_dirs"]) == {"p": {"n_repeats": 2, "img_count": 5}}


def test_metadata_of_command_line_folders(tmp_path):
    folder(tmp_path / "train" / "3_dog", [(64, 64)] * 2)
    line = {"train_data_dir": str(tmp_path / "train"), "resolution": "64", "train_batch_size": 4}
    metadata = TrainingData(load_data_config(line), seed=0).metadata(world_size=2)
    assert metadata["ss_total_batch_size"] == "8"
    assert metadata["ss_resolution"] == "(64, 64)"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"3_dog": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {}
    assert json.loads(metadata["ss_bucket_info"]) is None
    assert "ss_datasets" not in metadata
