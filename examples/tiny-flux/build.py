#!/usr/bin/env python3
"""Train the tiny Flux of this folder on examples/tiny-sd's emoji, in its latents: a transformer with a small T5 and
tiny-sd's CLIP, then the same transformer's guidance, distilled as that of FLUX.1-dev.

usage: build.py [--work DIR] [--out DIR] [--font FILE] [--steps N] [--guidance-steps N]

Checkpoints go to --work every 200 steps; the same command goes on where an earlier one stopped. Every step draws its
batch and its noise from a seed of its own, so a run that was stopped sees the same data as one that was not.
"""

import argparse
import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

HERE = Path(__file__).parent
TINY_SD = HERE.parent / "tiny-sd"
sys.path.insert(0, str(TINY_SD))

from emoji import all_emoji, draw, load_font  # noqa: E402  (they lie in tiny-sd's folder)
from stage import SHEET, Training, contact_sheet, encoded, images_to_tensor, name_as_ever  # noqa: E402

TEXTS, NOISES = 24, 2  # a batch: so many texts, each with so many noises
LENGTHS = (24,) * 7 + (64,)  # T5's tokens in a batch, padding and all: a prompt means the same at any length
THINGS_TIMES = 30.0  # how many times as often as signs and gestures it sees a thing
SIDE = 4  # an image's latents are 8x8, and a token is a patch of 2x2
SHEET_SETTINGS = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 32}
# FLUX.1-dev's: timesteps are shifted by the number of tokens of an image.
SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A unigram model as T5's, learned from the captions; pieces of one letter make any Latin text writable."""
    special = ["<pad>", "</s>", "<unk>"]
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=2000, special_tokens=special, unk_token="<unk>", initial_alphabet=letters
    )
    learner.train_from_iterator(captions, trainer)
    pieces = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in pieces}
    worst = min(score for _, score in pieces)
    pieces += [(letter, worst - 1) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


class TextToLatents(torch.nn.Module):
    """Both text encoders and the transformer, trained together."""

    def __init__(self, clip: CLIPTextModel, words: int):
        super().__init__()
        self.clip = clip
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        self.transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=128,
            pooled_projection_dim=clip.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        for name, parameter in self.transformer.named_parameters():  # every block begins as the identity
            if (".norm" in name and ".linear." in name) or name.startswith(("proj_out.", "norm_out.linear.")):
                torch.nn.init.zeros_(parameter)


@dataclass
class Batch:
    """What one step predicts: latents between noise and image, the velocity there, and the texts' numbers."""

    noisy: torch.Tensor  # (n, 16, 16): images of 4x4 tokens
    velocity: torch.Tensor  # the same shape: noise - image
    sigma: torch.Tensor  # (n,), 1 for noise alone
    clip_ids: torch.Tensor  # (texts, tokens)
    t5_ids: torch.Tensor


class Captions:
    """The captions' tokens for both encoders; the last entry is the empty text."""

    def __init__(self, prompts: list[tuple[str, str]], clip: CLIPTokenizer, t5: T5TokenizerFast):
        texts = [text for pair in prompts for text in pair] + [""]
        self.clip = clip(texts, padding=True, return_tensors="pt").input_ids  # what is behind the end counts nothing
        self.t5 = t5(texts, padding="max_length", max_length=max(LENGTHS), return_tensors="pt").input_ids
        longest = (self.t5 != t5.pad_token_id).sum(1).max().item()
        if longest > min(LENGTHS):
            raise ValueError(f"a caption takes {longest} tokens of T5, more than {min(LENGTHS)}")

    def choose(self, index: torch.Tensor, empty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one of the two captions of each image, or of the empty text with probability `empty`."""
        texts = 2 * index + torch.randint(2, index.shape)
        texts = torch.where(torch.rand(index.shape) < empty, len(self.clip) - 1, texts)
        length = LENGTHS[torch.randint(len(LENGTHS), ()).item()]
        return self.clip[texts], self.t5[texts, :length]


class ImageLatents:
    """The latents of all images as the transformer's tokens, and how often each is drawn."""

    def __init__(self, vae: AutoencoderKL, pixels: torch.Tensor, shares: torch.Tensor, captions: Captions):
        self.mean, self.std = (packed(part * vae.config.scaling_factor) for part in encoded(vae, pixels))
        self.shares, self.captions = shares, captions

    def batch(self, empty: float = 0.1) -> Batch:
        index = torch.multinomial(self.shares, TEXTS)
        clip_ids, t5_ids = self.captions.choose(index, empty)
        index = index.repeat(NOISES)
        clean = self.mean[index] + self.std[index] * torch.randn_like(self.mean[index])
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(1.2 * torch.randn(len(clean)) + 0.3)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        return Batch(noisy, noise - clean, sigma, clip_ids, t5_ids)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, 8, 8) as tokens (n, 16, 16), in the order of FluxPipeline."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def encoded_text(model: TextToLatents, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """T5's states (n, tokens, 128) and CLIP's state at the end of the text (n, 128), each text for all its noises."""
    states, pooled = model.t5(t5_ids).last_hidden_state, model.clip(clip_ids).pooler_output
    return states.repeat(NOISES, 1, 1), pooled.repeat(NOISES, 1)


def velocity(transformer, batch: Batch, text: tuple[torch.Tensor, ...], guidance: torch.Tensor) -> torch.Tensor:
    """The velocity from image to noise that the transformer predicts for a batch."""
    image_ids = FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32)
    return transformer(
        hidden_states=batch.noisy,
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        timestep=batch.sigma,
        guidance=guidance,
        img_ids=image_ids,
        txt_ids=torch.zeros(text[0].shape[1], 3),
    ).sample


def train_transformer(model: TextToLatents, images: ImageLatents, work: Path, steps: int) -> TextToLatents:
    """Flow matching: the velocity from image to noise, without guidance (a guidance of 1)."""

    def loss_of_step() -> torch.Tensor:
        batch = images.batch()
        text = encoded_text(model, batch.clip_ids, batch.t5_ids)
        predicted = velocity(model.transformer, batch, text, torch.ones(len(batch.sigma)))
        return (predicted - batch.velocity).square().mean()

    return Training("transformer", model, work, steps, peak=1e-3).run(loss_of_step)


def distil_guidance(model: TextToLatents, images: ImageLatents, work: Path, steps: int) -> TextToLatents:
    """Teach the transformer what classifier-free guidance makes of it, for scales from 1 to 5, given as a number."""
    model.requires_grad_(False)
    student = copy.deepcopy(model.transformer).requires_grad_(True)
    empty = images.captions.clip[-1:], images.captions.t5[-1:]

    def loss_of_step() -> torch.Tensor:
        batch = images.batch(empty=0.0)
        ones = torch.ones(len(batch.sigma))
        guidance = torch.where(torch.rand(len(ones)) < 0.25, ones, 1 + 4 * torch.rand(len(ones)))
        with torch.no_grad():
            text = encoded_text(model, batch.clip_ids, batch.t5_ids)
            length = batch.t5_ids.shape[1]
            nothing = encoded_text(model, empty[0].expand(TEXTS, -1), empty[1][:, :length].expand(TEXTS, -1))
            told, untold = (velocity(model.transformer, batch, words, ones) for words in (text, nothing))
            target = torch.lerp(untold, told, guidance[:, None, None])
        return (velocity(student, batch, text, guidance) - target).square().mean()

    model.transformer = Training("guidance", student, work, steps, peak=5e-4).run(loss_of_step)
    return model


def pipeline(model: TextToLatents, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5TokenizerFast) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=vae,
        text_encoder=model.clip,
        tokenizer=clip,
        text_encoder_2=model.t5,
        tokenizer_2=t5,
        transformer=model.transformer,
    )


def name_for_all(index: Path) -> None:
    """Name T5's tokenizer as every version of transformers knows it: what version 5 writes is in version 4 the name of
    a class that needs sentencepiece and its file."""
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "checkpoints", help="checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="the pipeline")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--guidance-steps", type=int, default=150)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.set_flush_denormal(True)  # products of tiny gradients slow a CPU down several times over
    font = load_font(args.font) if args.font else load_font()
    emoji = all_emoji(font)
    prompts = [(one.name, one.caption) for one in emoji]
    vae = AutoencoderKL.from_pretrained(TINY_SD / "vae", torch_dtype=torch.float32).requires_grad_(False)
    # FluxPipeline adds the shift, so it may not be null. The name would be a path of the machine that this runs on.
    vae.register_to_config(shift_factor=0.0, _name_or_path="examples/tiny-sd/vae")
    clip_tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")
    tokenizer = t5_tokenizer([text for pair in prompts for text in pair])
    captions = Captions(prompts, clip_tokenizer, tokenizer)
    shares = torch.tensor([THINGS_TIMES if one.is_thing else 1.0 for one in emoji])
    images = ImageLatents(vae, images_to_tensor([draw(one, font) for one in emoji]), shares, captions)

    torch.manual_seed(1)
    clip = CLIPTextModel.from_pretrained(TINY_SD / "text_encoder", torch_dtype=torch.float32)
    model = train_transformer(TextToLatents(clip, len(tokenizer)), images, args.work, args.steps)
    model = distil_guidance(model, images, args.work, args.guidance_steps)
    pipe = pipeline(model, vae, clip_tokenizer, tokenizer)
    contact_sheet(pipe, SHEET, guidance_scale=3.0, **SHEET_SETTINGS).save(args.out / "samples.png")
    pipe.to(torch.float16).save_pretrained(args.out)
    name_as_ever(args.out / "text_encoder" / "model.safetensors")
    name_for_all(args.out / "model_index.json")


if __name__ == "__main__":
    main()
