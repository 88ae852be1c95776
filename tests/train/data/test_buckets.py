import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_adapters.train.data.buckets import Buckets, bucket_sizes
from lora_adapters.train.data.config import DatasetConfig

sides = st.integers(1, 4000)


def test_sizes_are_the_largest_within_the_area():
    assert bucket_sizes((64, 64), 32, 128, 32) == [(32, 96), (32, 128), (64, 64), (96, 32), (128, 32)]
    assert (512, 512) in bucket_sizes((512, 512), 256, 1024, 64)
    assert (448, 576) in bucket_sizes((512, 512), 256, 1024, 64)


@given(sides, sides)
def test_placement_covers_the_bucket_within_area_and_steps(width, height):
    buckets = Buckets(DatasetConfig(resolution=(512, 512), enable_bucket=True))
    placed = buckets.place((width, height))
    assert placed.bucket in buckets.sizes
    assert placed.bucket[0] * placed.bucket[1] <= 512 * 512
    assert all(side % 64 == 0 for side in placed.bucket)
    spare = [scaled - kept for scaled, kept in zip(placed.resized, placed.bucket, strict=True)]
    assert min(spare) == 0
    nearest = min(abs(w / h - width / height) for w, h in buckets.sizes)
    assert abs(placed.bucket[0] / placed.bucket[1] - width / height) == nearest


@given(st.integers(64, 4000), st.integers(64, 4000))
def test_no_upscale_never_enlarges(width, height):
    buckets = Buckets(DatasetConfig(resolution=(512, 512), enable_bucket=True, bucket_no_upscale=True))
    placed = buckets.place((width, height))
    assert placed.resized[0] <= width
    assert placed.resized[1] <= height
    assert placed.bucket[0] * placed.bucket[1] <= 512 * 512
    for kept, scaled in zip(placed.bucket, placed.resized, strict=True):
        assert kept % 64 == 0
        assert kept <= scaled
    if width * height <= 512 * 512:
        assert placed.resized == (width, height)
    else:
        # One side is rounded to the steps, so nothing is cropped there; the other loses less than one step.
        spare = [scaled - kept for scaled, kept in zip(placed.resized, placed.bucket, strict=True)]
        assert 0 in spare
        assert max(spare) < 64 or max(width, height) > 4 * min(width, height)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1920, 1080), (640, 384)),
        ((832, 1216), (384, 576)),
        ((1024, 1024), (512, 512)),
        ((1023, 1025), (512, 512)),  # half a pixel is no reason to lose a whole step
    ],
)
def test_no_upscale_takes_kohyas_sizes(size, bucket):
    config = DatasetConfig(resolution=(512, 512), enable_bucket=True, bucket_no_upscale=True)
    assert Buckets(config).place(size).bucket == bucket


@given(sides, sides, st.sampled_from([8, 64]))
def test_no_upscale_never_exceeds_the_area(width, height, steps):
    config = DatasetConfig(resolution=(512, 512), enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=steps)
    placed = Buckets(config).place((width, height))
    assert placed.bucket[0] * placed.bucket[1] <= 512 * 512
    assert all(kept <= scaled for kept, scaled in zip(placed.bucket, placed.resized, strict=True))


def test_an_image_of_a_bucket_size_is_left_alone():
    buckets = Buckets(DatasetConfig(resolution=(512, 512), enable_bucket=True))
    assert buckets.place((448, 576)).resized == buckets.place((448, 576)).bucket == (448, 576)


def test_without_buckets_there_is_one_size_and_the_image_covers_it():
    buckets = Buckets(DatasetConfig(resolution=(64, 32)))
    placed = buckets.place((100, 100))
    assert (placed.bucket, placed.resized) == ((64, 32), (64, 64))


@pytest.mark.parametrize(("resolution", "smallest"), [(64, 32), (512, 256), (1024, 256)])
def test_default_limits_follow_the_resolution(resolution, smallest):
    config = DatasetConfig(resolution=(resolution, resolution), enable_bucket=True, bucket_reso_steps=8)
    buckets = Buckets(config)
    assert (buckets.smallest, buckets.largest) == (smallest, 1024)
    assert (resolution, resolution) in buckets.sizes
