import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_adapters.train.data.cache_files import (
    CachedLatents,
    LatentsRequest,
    latents_fit,
    read_latents,
    text_identity,
    vae_identity,
    write_npz,
)
from lora_adapters.train.data.cache_files import write_latents as write
from lora_adapters.train.data.transforms import centred, image_tensor
from lora_adapters.train.data_error import DataError
from tests.train.drawn import LATENT_FILES, data, drawn_image, folder, small_vae

WANTED = LatentsRequest(size=(100, 50), bucket=(64, 32), flip=False, alpha_mask=False, vae="abc")


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def collect(training, epochs=1, **options):
    """Latents (or images) by original size, flips and all, of some epochs."""
    return [batch for epoch in range(epochs) for batch in training.batches(epoch, **options)]


def test_file_layout_is_kohyas(tmp_path):
    path = str(tmp_path / "p_0100x0050_sd.npz")
    write(path, CachedLatents(torch.ones(4, 4, 8), torch.zeros(4, 4, 8), torch.ones(32, 64)), WANTED)
    file = np.load(path)
    names = {"latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb"}
    assert {f"{name}_4x8" for name in names} <= set(file)  # height x width of the latents
    assert file["latents_4x8"].dtype == file["alpha_mask_4x8"].dtype == np.float32
    assert file["original_size_4x8"].tolist() == [100, 50]
    assert file["crop_ltrb_4x8"].tolist() == [0, 0, 64, 32]  # 100x50 in 64x32: fits without a border
    assert os.listdir(tmp_path) == [Path(path).name]
    assert torch.equal(read_latents(path, (64, 32)).flipped, torch.zeros(4, 4, 8))


def kohyas(path, size=(4, 8), suffix=None, value=1.0):
    """What kohya's trainer writes: the keys with a suffix are those of its newer versions; other keys stay."""
    suffix = f"_{size[0]}x{size[1]}" if suffix is None else suffix
    arrays = dict(np.load(path)) if os.path.exists(path) else {}
    arrays[f"latents{suffix}"] = np.full((4, *size), value, np.float32)
    arrays[f"original_size{suffix}"], arrays[f"crop_ltrb{suffix}"] = np.array([100, 50]), np.zeros(4)
    np.savez(path, **arrays)


@pytest.mark.parametrize("suffix", ["", "_4x8"])
def test_a_file_of_kohyas_own_is_read(tmp_path, suffix):
    path = str(tmp_path / "p.npz")
    kohyas(path, suffix=suffix)
    assert latents_fit(path, WANTED)
    assert read_latents(path, (64, 32)).latents.eq(1).all()
    later = os.stat(path).st_mtime_ns + 1
    assert not latents_fit(path, LatentsRequest(**{**vars(WANTED), "modified": later}))


def test_an_entry_without_a_size_is_not_taken_for_another_buckets(tmp_path):
    path = str(tmp_path / "p.npz")
    kohyas(path, suffix="")
    taller = LatentsRequest(**{**vars(WANTED), "bucket": (64, 40)})
    assert not latents_fit(path, taller)
    with pytest.raises(DataError, match=r"p\.npz: no latents for a 64x40 bucket; delete the file"):
        read_latents(path, (64, 40))
    write(path, CachedLatents(torch.zeros(4, 5, 8)), taller)
    assert latents_fit(path, taller)
    assert latents_fit(path, WANTED)
    assert read_latents(path, (64, 32)).latents.eq(1).all()
    assert read_latents(path, (64, 40)).latents.eq(0).all()
    kohyas(path)  # a newer version beside the older one's entry wins
    assert read_latents(path, (64, 32)).latents.eq(1).all()


def test_an_entry_that_another_program_wrote_anew_is_not_ours_any_more(tmp_path):
    path = str(tmp_path / "p.npz")
    write(path, CachedLatents(torch.zeros(4, 4, 8)), WANTED)
    kohyas(path, (5, 8))
    assert latents_fit(path, WANTED)
    kohyas(path, value=2.0)  # by another VAE, perhaps, while our key still names ours
    assert not latents_fit(path, WANTED)


@pytest.mark.parametrize("keep_all", [False, True])
def test_writing_does_not_make_an_outdated_entry_look_new(tmp_path, keep_all):
    path = str(tmp_path / "p.npz")
    write(path, CachedLatents(torch.zeros(4, 6, 8)), LatentsRequest(**{**vars(WANTED), "bucket": (64, 48)}))
    kohyas(path, (5, 8))
    os.utime(path, ns=(1000, 1000))
    later = {**vars(WANTED), "modified": 2000}
    write(path, CachedLatents(torch.zeros(4, 4, 8)), LatentsRequest(**later), keep_all=keep_all)
    assert latents_fit(path, LatentsRequest(**later))
    assert latents_fit(path, LatentsRequest(**{**later, "bucket": (64, 40)})) == keep_all
    assert not latents_fit(path, LatentsRequest(**{**later, "bucket": (64, 48)}))  # it says when its image was written
    assert latents_fit(path, LatentsRequest(**{**vars(WANTED), "bucket": (64, 48)}))


def test_a_mask_that_is_not_wanted_is_stale(tmp_path):
    path = str(tmp_path / "p.npz")
    write(path, CachedLatents(torch.ones(4, 4, 8), mask=torch.ones(32, 64)), WANTED)
    assert not latents_fit(path, WANTED)
    assert latents_fit(path, LatentsRequest(**{**vars(WANTED), "alpha_mask": True}))


@pytest.mark.parametrize(
    "change",
    [
        {"size": (100, 51)},
        {"bucket": (64, 40)},
        {"flip": True},
        {"alpha_mask": True},
        {"vae": "other"},
        {"interpolation": "nearest"},
        {"modified": -1},
        {"length": 5},
    ],
)
def test_stale_files_are_told(tmp_path, change):
    path = str(tmp_path / "p.npz")
    write(path, CachedLatents(torch.ones(4, 4, 8)), WANTED)
    assert latents_fit(path, WANTED)
    assert not latents_fit(path, LatentsRequest(**{**vars(WANTED), **change}))


def test_the_keys_of_caches_that_exist_are_read(tmp_path):
    """As files have them since the first version: the image's date and size are called picture there."""
    path = str(tmp_path / "p.npz")
    wanted = LatentsRequest(**{**vars(WANTED), "modified": 2000, "length": 5})
    entry = {
        "latents": np.ones((4, 4, 8), np.float32),
        "original_size": np.array(WANTED.size),
        "crop_ltrb": np.zeros(4),
        "picture": np.array([2000, 5]),
    }
    np.savez(path, **{f"{name}_4x8": value for name, value in entry.items()})
    os.utime(path, ns=(1000, 1000))  # older than the image: of use only because it says which image it is of
    assert latents_fit(path, wanted)
    assert not latents_fit(path, LatentsRequest(**{**vars(wanted), "length": 6}))


def test_older_than_its_image_or_damaged_is_stale(tmp_path):
    path = str(tmp_path / "p.npz")
    write(path, CachedLatents(torch.ones(4, 4, 8)), WANTED)
    later = os.stat(path).st_mtime_ns + 1
    assert not latents_fit(path, LatentsRequest(**{**vars(WANTED), "modified": later}))
    Path(path).write_bytes(Path(path).read_bytes()[:-30])
    assert not latents_fit(path, WANTED)
    with pytest.raises(DataError, match=r"p\.npz: damaged latents cache .*; delete the file"):
        read_latents(path, (64, 32))
    write(path, CachedLatents(torch.full((4, 4, 8), torch.nan)), WANTED)
    with pytest.raises(DataError, match="contains NaN"):
        read_latents(path, (64, 32))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"p\.npz: cannot write the cache \(No space left on device\)"):
        write_npz(str(tmp_path / "p.npz"), {})
    assert os.listdir(tmp_path) == []


def test_vae_identity_is_of_the_encoder_in_any_precision(vae):
    assert vae_identity(vae) == vae_identity(small_vae().half())
    other = small_vae()
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1
    assert vae_identity(vae) != vae_identity(other)


def test_text_identity_is_of_every_weight():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = text_identity([one, other])
    assert before == text_identity([one, other]) != text_identity([other, one])
    with torch.no_grad():
        other.bias[0] += 1
    assert text_identity([one, other]) != before


def test_cached_latents_are_samples_of_the_posterior(tmp_path, vae):
    training = data(folder(tmp_path / "p", [(64, 64)]), flip_aug=True)
    training.cache_latents(vae, LATENT_FILES)
    placement = training.images.images[0].placement
    seen = {}
    for batch in collect(training, epochs=12):
        assert batch.images is None
        seen[batch.latents.flatten()[0].item()] = batch.latents
    assert len(seen) == 2  # as it is and mirrored
    for flip in (False, True):
        pixels = image_tensor(drawn_image((64, 64)), placement, centred(placement, flip=flip))
        posterior = vae.encode(pixels[None]).latent_dist
        noise = [((latents - posterior.mean) / posterior.std).detach() for latents in seen.values()]
        assert min(abs(part.std().item() - 1) + abs(part.mean().item()) for part in noise) < 0.2


def test_disk_memory_and_any_batch_size_give_the_same(tmp_path, vae):
    images = folder(tmp_path / "p", [(64, 64), (80, 64), (64, 64), (96, 96), (64, 100)])
    options = {"enable_bucket": True, "bucket_reso_steps": 8, "flip_aug": True, "batch_size": 2}
    in_memory, on_disk = data(images, **options), data(images, **options)
    in_memory.cache_latents(vae, LATENT_FILES)
    on_disk.cache_latents(vae, LATENT_FILES, to_disk=True, batch_size=3)
    assert (images / "1_0080x0064_sd.npz").exists()
    for one, other in zip(collect(in_memory, 2), collect(on_disk, 2, workers=1), strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)
        assert one.captions == other.captions
        assert torch.equal(one.crop_top_lefts, other.crop_top_lefts)


class Counting(torch.nn.Module):
    """A VAE that counts the images it encodes."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.config, self.dtype, self.count = vae, vae.config, vae.dtype, 0

    def state_dict(self):
        return self.vae.state_dict()

    def encode(self, pixels):
        self.count += len(pixels)
        return self.vae.encode(pixels)


def test_disk_caches_are_used_again_until_the_image_changes(tmp_path, vae):
    images = folder(tmp_path / "p", [(64, 64)] * 3)
    counting = Counting(vae)
    for change, expected in ((None, 3), (None, 0), ((72, 64), 1), ((72, 64), 1), (None, 0)):
        if change:  # to another size, then written again at the same size
            drawn_image(change, expected).save(images / "1.png")
        counting.count = 0
        data(images).cache_latents(counting, LATENT_FILES, to_disk=True)
        assert counting.count == expected
    counting.count = 0
    data(images).cache_latents(counting, LATENT_FILES, to_disk=True, check=False)
    assert counting.count == 0


def test_disk_caches_are_made_anew_for_an_older_image_and_another_interpolation(tmp_path, vae):
    images = folder(tmp_path / "p", [(96, 96)] * 2)
    counting = Counting(vae)
    data(images).cache_latents(counting, LATENT_FILES, to_disk=True)
    drawn_image((96, 96), 5).save(images / "1.png")
    os.utime(images / "1.png", (1e9, 1e9))
    for options, expected in (({}, 1), ({"resize_interpolation": "nearest"}, 2), ({}, 2), ({}, 0)):
        counting.count = 0
        data(images, **options).cache_latents(counting, LATENT_FILES, to_disk=True)
        assert counting.count == expected


def test_processes_share_the_encoding_to_disk(tmp_path, vae):
    images = folder(tmp_path / "p", [(64, 64)] * 5)
    counts = []
    for rank in (0, 1):
        counting = Counting(vae)
        data(images, seed=1).cache_latents(counting, LATENT_FILES, to_disk=True, rank=rank, world_size=2)
        counts.append(counting.count)
    assert counts == [3, 2]  # though the second finds what the first has written
    counting = Counting(vae)
    data(images).cache_latents(counting, LATENT_FILES, to_disk=True)
    assert counting.count == 0


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_latent_caches_exclude_what_varies_images(tmp_path, vae, name):
    with pytest.raises(DataError, match=f"latents cannot be cached with {name}"):
        data(folder(tmp_path / "p", [(64, 64)]), **{name: True}).cache_latents(vae, LATENT_FILES)


def test_one_entry_cannot_hold_two_caches(tmp_path, vae):
    images = folder(tmp_path / "p", [(64, 64)])
    subsets = [{"subsets": [{"image_dir": str(images), "flip_aug": flip}]} for flip in (False, True)]
    both = data(images, file={"datasets": [{"resolution": 64, **subset} for subset in subsets]})
    with pytest.raises(DataError, match="would hold two different caches"):
        both.cache_latents(vae, LATENT_FILES, to_disk=True)
    both.cache_latents(vae, LATENT_FILES)
    assert len(collect(both)) == 2


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("check", [True, False])
def test_one_folder_at_several_resolutions_shares_its_files(tmp_path, vae, world_size, check):
    images = folder(tmp_path / "p", [(64, 64), (64, 64), (72, 64)])
    subset = {"subsets": [{"image_dir": str(images)}]}
    file = {"datasets": [{"resolution": side, **subset} for side in (64, 32, 48, 32)]}
    kohyas(str(images / "2_0072x0064_sd.npz"), (8, 8))  # of another image: made anew, or taken where unchecked
    in_memory = data(images, file=file)
    in_memory.cache_latents(vae, LATENT_FILES)
    counts = []
    for again in (False, True):
        for rank in range(world_size):
            counting, on_disk = Counting(vae), data(images, file=file)
            on_disk.cache_latents(counting, LATENT_FILES, to_disk=True, rank=rank, world_size=world_size, check=check)
            counts.append((again, counting.count))
    assert sum(count for again, count in counts if not again) == (9 if check else 8)  # three sizes of three images
    assert sum(count for again, count in counts if again) == 0
    assert len(list(images.glob("*.npz"))) == 3
    sizes = []
    for one, other in zip(collect(in_memory), collect(on_disk, workers=1), strict=True):
        if check or one.target_sizes.tolist() != [[64, 64]] or one.original_sizes.tolist() != [[64, 72]]:
            torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)
        sizes.append(other.latents.shape[-1])
    assert sorted(sizes) == [4] * 6 + [6] * 3 + [8] * 3


def encode(captions):
    """Two outputs that tell captions apart."""
    codes = torch.tensor([[float(sum(map(ord, caption))), float(len(caption))] for caption in captions])
    return {"hidden_state": codes[:, None].expand(-1, 3, 2), "pool2": codes.half()}


@pytest.mark.parametrize("to_disk", [False, True])
def test_text_outputs_belong_to_the_whole_caption(tmp_path, to_disk):
    images = folder(tmp_path / "p", [(64, 64)] * 3, ["a", "b", "a"])
    training = data(images, caption_prefix="so", batch_size=2)
    training.cache_text(encode, to_disk=to_disk)
    for batch in collect(training, 2):
        assert set(batch.captions) <= {"so a", "so b"}
        expected = encode(batch.captions)
        assert torch.equal(batch.text["hidden_state"], expected["hidden_state"])
        assert torch.equal(batch.text["pool2"], expected["pool2"].float())
    assert (images / "2_te_outputs.npz").exists() == to_disk


def test_text_files_are_made_anew_for_another_caption_encoder_or_shape(tmp_path):
    images = folder(tmp_path / "p", [(64, 64)] * 2, ["a", "b"])
    made = []

    def counting(captions):
        made.extend(caption for caption in captions if caption)
        return encode(captions)

    for caption, encoder, expected in (
        ("a", "x", ["a", "b"]),
        ("a", "x", []),
        ("c", "x", ["c"]),
        ("c", "y", ["c", "b"]),
    ):
        (images / "0.caption").write_text(caption)
        made.clear()
        data(images).cache_text(counting, to_disk=True, encoder=encoder)
        assert made == expected
    made.clear()
    wider = lambda captions: {**counting(captions), "hidden_state1": torch.zeros(len(captions), 1)}  # noqa: E731
    data(images).cache_text(wider, to_disk=True, encoder="y")
    assert made == ["c", "b"]


@pytest.mark.parametrize(
    "option",
    [{"shuffle_caption": True}, {"caption_dropout_rate": 0.1}, {"enable_wildcard": True}, {"token_warmup_step": 3.0}],
)
def test_text_caches_exclude_what_varies_captions(tmp_path, option):
    with pytest.raises(DataError, match=f"text-encoder outputs cannot be cached with {next(iter(option))}"):
        data(folder(tmp_path / "p", [(64, 64)]), **option).cache_text(encode)


def test_hugging_face_rows_need_a_folder_for_disk_caches(tmp_path, vae):
    images = folder(tmp_path / "p", [(64, 64)])
    (images / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    subset = {"dataset_name": str(images)}
    with pytest.raises(DataError, match="give cache_dir in its subset"):
        data(images, file={"datasets": [{"subsets": [subset]}]}).cache_latents(vae, LATENT_FILES, to_disk=True)
    subset["cache_dir"] = str(tmp_path / "cache")
    training = data(images, file={"datasets": [{"subsets": [subset]}]})
    training.cache_latents(vae, LATENT_FILES, to_disk=True)
    assert len(list((tmp_path / "cache").glob("train-*-00000000_0064x0064_sd.npz"))) == 1
    assert collect(training)[0].latents.shape == (1, 4, 8, 8)
    subset["split"] = "train[:1]"  # a name that Windows does not take
    data(images, file={"datasets": [{"subsets": [subset]}]}).cache_latents(vae, LATENT_FILES, to_disk=True)
    assert len(list((tmp_path / "cache").glob("train[[]_1]-*-00000000_0064x0064_sd.npz"))) == 1
