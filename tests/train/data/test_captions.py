import random
from collections import Counter

import pytest

from lora_adapters.train.data.captions import Moment, draw_caption, varying_options
from lora_adapters.train.data.config import SubsetConfig


def draw(caption: str, seed: int = 0, moment: Moment | None = None, **options) -> str:
    return draw_caption(caption, SubsetConfig(**options), random.Random(seed), moment or Moment())


def test_a_caption_without_options_is_its_first_line_untouched():
    assert draw("a dog ,  on grass\nsecond") == "a dog ,  on grass"


def test_prefix_and_suffix_come_before_everything_else():
    assert draw("b, c", caption_prefix="a,", caption_suffix="d") == "a, b, c d"
    shuffled = {draw("b, c", seed, caption_prefix="a,", shuffle_caption=True, keep_tokens=1) for seed in range(20)}
    assert shuffled == {"a, b, c", "a, c, b"}
    assert draw("b", caption_prefix="a,", caption_dropout_rate=1.0) == ""


def test_shuffle_keeps_the_first_tags_and_visits_all_orders():
    drawn = Counter(draw("k, a, b, c", seed, shuffle_caption=True, keep_tokens=1) for seed in range(600))
    assert len(drawn) == 6
    assert all(caption.startswith("k, ") for caption in drawn)
    assert min(drawn.values()) > 60


def test_keep_tokens_separator_marks_head_and_tail():
    drawn = {draw("h|||a, b|||t", seed, shuffle_caption=True, keep_tokens_separator="|||") for seed in range(20)}
    assert drawn == {"h, a, b, t", "h, b, a, t"}
    assert draw("h ||| a, b", keep_tokens_separator="|||") == "h, a, b"


def test_dropout_rates():
    kept = sum(draw("a", seed, caption_dropout_rate=0.3) == "a" for seed in range(2000)) / 2000
    assert kept == pytest.approx(0.7, abs=0.04)
    tags = "k, " + ", ".join("abcdefghij")
    left = [draw(tags, seed, caption_tag_dropout_rate=0.4, keep_tokens=1).split(", ") for seed in range(300)]
    assert all(parts[0] == "k" for parts in left)
    assert sum(len(parts) - 1 for parts in left) / 3000 == pytest.approx(0.6, abs=0.04)


def test_every_third_epoch_has_no_captions():
    drawn = [draw("a", moment=Moment(epoch=epoch), caption_dropout_every_n_epochs=3) for epoch in range(6)]
    assert drawn == ["a", "a", "", "a", "a", ""]


def test_wildcards_choose_one_line_and_one_of_each_group():
    text = "a {red|blue} dog {{sic}}\nsecond"
    drawn = {draw(text, seed, enable_wildcard=True) for seed in range(60)}
    assert drawn == {"a red dog {sic}", "a blue dog {sic}", "second"}
    assert draw("a {red|blue} dog") == "a {red|blue} dog"


def test_secondary_separator_keeps_tags_together_through_shuffling():
    drawn = {draw("a;;;b, c", seed, shuffle_caption=True, secondary_separator=";;;") for seed in range(20)}
    assert drawn == {"a,b, c", "c, a,b"}


@pytest.mark.parametrize(("separator", "between"), [(";", "; "), ("|", "| "), (", ", ", "), (",", ", ")])
def test_tags_are_joined_by_the_separator_that_they_are_split_at(separator, between):
    drawn = {
        draw(separator.join("abc"), seed, shuffle_caption=True, keep_tokens=1, caption_separator=separator)
        for seed in range(20)
    }
    assert drawn == {between.join("abc"), between.join("acb")}
    dropped = draw(f"a{separator}b", caption_tag_dropout_rate=1.0, keep_tokens=1, caption_separator=separator)
    assert dropped == "a"
    kept = draw(f"a|||b{separator}c", keep_tokens_separator="|||", caption_separator=separator)
    assert kept == between.join("abc")


@pytest.mark.parametrize(("step", "tags"), [(0, 2), (5, 4), (9, 5), (10, 6), (50, 6)])
def test_token_warmup_reaches_all_tags_at_its_step(step, tags):
    # 2 tags at step 0, 6 at step 10: 2 + floor(step * 4 / 10)
    for warmup in (10, 0.1):
        moment = Moment(step=step, max_train_steps=100)
        drawn = draw("a, b, c, d, e, f", moment=moment, token_warmup_min=2, token_warmup_step=warmup)
        assert drawn.split(", ") == list("abcdef")[:tags]


def test_varying_options_are_those_that_text_caches_exclude():
    assert varying_options(SubsetConfig(caption_prefix="x", keep_tokens=2, secondary_separator=";")) == []
    assert varying_options(SubsetConfig(shuffle_caption=True, enable_wildcard=True)) == [
        "shuffle_caption",
        "enable_wildcard",
    ]
