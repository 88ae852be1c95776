import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_adapters.train.models.sd import SD
from lora_adapters.train.models.sdxl import SDXL
from lora_adapters.train.models.text_encoding import (
    encode_tokens,
    join_chunks,
    tokenize,
    weighted_parts,
    windows,
)
from tests.train.conftest import text_config, tiny_tokenizer


def encode(tokens, encoders, clip_skip=None, **options):
    family = {1: SD, 2: SDXL}[len(encoders)]
    return encode_tokens(tokens, encoders, family.readings(clip_skip), **options)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    return CLIPTextModel(text_config(tokenizer, layers=3)).eval()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red disc", [("a red disc", 1.0)]),
        ("a (red:1.3) disc", [("a ", 1.0), ("red", 1.3), (" disc", 1.0)]),
        ("a (red) [disc]", [("a ", 1.0), ("red", 1.1), (" ", 1.0), ("disc", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) disc:0.5)", [("a ", 0.5), ("red", 1.0), (" disc", 0.5)]),
        (r"a \(red\) disc: one", [("a (red) disc: one", 1.0)]),
        ("(red", [("red", 1.1)]),
        ("red) disc]", [("red) disc]", 1.0)]),
        ("", []),
    ],
)
def test_weighted_parts(text, parts) -> None:
    found = weighted_parts(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def test_one_chunk_is_the_tokenizers_own_padding(tokenizer) -> None:
    captions = ["a red disc", "", "a red disc on white " * 30]
    own = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, captions).ids[:, 0], own)


def test_long_captions_go_on_in_the_next_chunk(tokenizer) -> None:
    words = ["red", "green", "blue", "disc"] * 22
    ids = tokenize(tokenizer, [" ".join(words)], chunks=3).ids[0]
    expected = tokenizer(" ".join(words), add_special_tokens=False, verbose=False).input_ids
    assert ids.shape == (3, 77)
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    inner = ids[:, 1:-1].flatten().tolist()
    assert 75 < len(expected) < 225
    assert inner[: len(expected) + 1] == [*expected, tokenizer.eos_token_id]
    assert ids[0, -1] == tokenizer.eos_token_id


def test_joined_chunks_keep_first_start_and_last_end() -> None:
    states = torch.arange(2 * 3 * 5).float().view(2, 3, 5, 1)
    joined = join_chunks(states)
    assert joined.shape == (2, 3 * 3 + 2, 1)
    assert joined[0, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]


@torch.no_grad()
def test_clip_skip_takes_an_earlier_layer_under_the_final_norm(tokenizer, encoder) -> None:
    tokens = tokenize(tokenizer, ["a red disc"])
    states = encoder(tokens.ids[0], output_hidden_states=True)
    assert torch.equal(encode([tokens], [encoder]).hidden, states.last_hidden_state)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    assert torch.equal(encode([tokens], [encoder], clip_skip=2).hidden, norm(states.hidden_states[-2]))
    torch.testing.assert_close(encode([tokens], [encoder], clip_skip=1).hidden, states.last_hidden_state)


@torch.no_grad()
def test_weights_multiply_the_states_of_their_words(tokenizer, encoder) -> None:
    plain = encode([tokenize(tokenizer, ["a red disc"])], [encoder]).hidden
    weighted = encode([tokenize(tokenizer, ["a (red:1.5) disc"], weighted=True)], [encoder]).hidden
    ratio = (weighted / plain)[0, :, 0]
    assert ratio[2].item() == pytest.approx(1.5)  # start, a, red
    torch.testing.assert_close(ratio[[0, 1, 3, 4, 50]], torch.ones(5))


@torch.no_grad()
def test_two_encoders_stand_side_by_side(tokenizer, encoder) -> None:
    torch.manual_seed(1)
    second = CLIPTextModelWithProjection(text_config(tokenizer, layers=3, projection_dim=32)).eval()
    tokens = tokenize(tokenizer, ["a red disc", "a blue square"])
    found = encode([tokens, tokens], [encoder, second])
    states = [one(tokens.ids[:, 0], output_hidden_states=True) for one in (encoder, second)]
    assert torch.equal(found.hidden, torch.cat([one.hidden_states[-2] for one in states], -1))
    assert torch.equal(found.pooled, states[1].text_embeds)
    again = SDXL.from_cache(SDXL.to_cache(found, [32, 32]))
    assert torch.equal(again.hidden, found.hidden)
    assert torch.equal(again.pooled, found.pooled)


@torch.no_grad()
def test_weights_leave_the_mean_as_it_was(tokenizer) -> None:
    torch.manual_seed(0)
    encoder = CLIPTextModel(text_config(tokenizer)).eval()
    getattr(encoder, "text_model", encoder).final_layer_norm.bias.fill_(0.1)  # an untrained one has a mean of 0
    tokens = tokenize(tokenizer, ["a (red:1.5) disc", "a red disc"], chunks=2, weighted=True)
    raw = encode([tokens], [encoder]).hidden
    plain = encode([tokenize(tokenizer, ["a red disc"] * 2, chunks=2)], [encoder]).hidden
    mean, size = (encode([tokens], [encoder], keep_mean=mode).hidden for mode in ("original", "abs"))
    torch.testing.assert_close(mean.mean((1, 2)), plain.mean((1, 2)))
    torch.testing.assert_close(size.abs().mean((1, 2)), plain.abs().mean((1, 2)))
    torch.testing.assert_close(mean, raw * (plain.mean((1, 2)) / raw.mean((1, 2)))[:, None, None])
    assert torch.equal(mean[1], plain[1])  # without weights nothing is scaled


def test_windows_that_a_text_fills(tokenizer) -> None:
    counts = {n: windows(tokenizer, "red " * n) for n in (0, 1, 75, 76, 150, 151)}
    assert counts == {0: 1, 1: 1, 75: 1, 76: 2, 150: 2, 151: 3}
    assert windows(tokenizer, "(red:1.5) " * 75) == 1
