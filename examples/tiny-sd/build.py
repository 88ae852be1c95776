#!/usr/bin/env python3
"""Train the tiny Stable Diffusion of this folder: a VAE, then a U-Net with its text encoder, then the VAE's decoder.

usage: build.py [--start DIR] [--work DIR] [--out DIR] [--font FILE]
                [--vae-steps N] [--unet-steps N] [--decoder-steps N]

From nothing, or from the weights of a pipeline that it made before (--start). Checkpoints go to --work every 200
steps; the same command goes on where an earlier one stopped. Every step draws its batch and its noise from a seed of
its own, so a run that was stopped sees the same data as one that was not.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji import all_emoji, draw, load_font
from stage import SHEET, THINGS_TIMES, Training, contact_sheet, encoded, images_to_tensor, name_as_ever
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD1_SCALING = 0.18215  # SD1.x's latents have a standard deviation of 1/0.18215; these are made to have the same
SD1_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# --- the VAE -------------------------------------------------------------------------------------------------------


def restyled(pixels: torch.Tensor) -> torch.Tensor:
    """Images in other colours, tones, places and sizes, so that the VAE can also show what the U-Net never saw."""
    n = len(pixels)
    zoom, turn = torch.empty(n).uniform_(0.7, 1.5), torch.empty(n).uniform_(-0.4, 0.4)
    flip = torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0], place[:, 0, 1] = zoom * turn.cos() * flip, -zoom * turn.sin()
    place[:, 1, 0], place[:, 1, 1] = zoom * turn.sin() * flip, zoom * turn.cos()
    place[:, :, 2] = torch.empty(n, 2).uniform_(-0.3, 0.3)
    grid = F.affine_grid(place, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # outside the image it is white
    tones = pixels.mean(1, keepdim=True)
    colour = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.8)
    pixels = colour * pixels + (1 - colour) * tones
    ink, paper = torch.rand(2, n, 3, 1, 1) * 2 - 1
    light = (pixels + 1) / 2
    two_tone = ink + (paper - ink) * light
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, pixels, two_tone)


def edges(pixels: torch.Tensor) -> torch.Tensor:
    """Differences to the right and lower neighbours, flattened: what the eye reads as sharpness."""
    return torch.cat([pixels.diff(dim=2).flatten(), pixels.diff(dim=3).flatten()])


def train_vae(pixels: torch.Tensor, work: Path, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SD1_SCALING,
    )

    def loss_of_step() -> torch.Tensor:
        batch = pixels[torch.randint(len(pixels), (12,))]
        batch = torch.cat([batch[:6], restyled(batch[6:])])
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        sharpness = F.l1_loss(edges(decoded), edges(batch))
        return F.l1_loss(decoded, batch) + sharpness + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    vae = Training("vae", vae, work, steps, peak=1e-3).run(loss_of_step)
    return standardised(vae, pixels)


def train_decoder(vae: AutoencoderKL, pixels: torch.Tensor, work: Path, steps: int) -> AutoencoderKL:
    """The same VAE with its decoder trained further; the latents, which the U-Net knows, stay what they are."""
    decoder = torch.nn.Sequential(vae.post_quant_conv, vae.decoder).requires_grad_(True).train()

    def loss_of_step() -> torch.Tensor:
        batch = pixels[torch.randint(len(pixels), (12,))]
        batch = torch.cat([batch[:8], restyled(batch[8:])])
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.sample()
        decoded = decoder(latents)
        return F.l1_loss(decoded, batch) + F.l1_loss(edges(decoded), edges(batch))

    vae.post_quant_conv, vae.decoder = Training("decoder", decoder, work, steps, peak=1e-3).run(loss_of_step)
    return vae


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean absolute difference between images and their reconstructions, as a share of the range."""
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(64)])
    return (decoded - pixels).abs().mean().item() / 2


@torch.no_grad()
def standardised(vae: AutoencoderKL, pixels: torch.Tensor) -> AutoencoderKL:
    """The same VAE with mean 0 and standard deviation 1/0.18215 in every latent channel.

    The two 1x1 convolutions at the latents take up the shift and the stretch exactly, so that every SD1.x program's
    fixed factor is right for it.
    """
    mean, _ = encoded(vae, pixels)
    shift, stretch = mean.mean((0, 2, 3)), 1 / (SD1_SCALING * mean.std((0, 2, 3)))
    quant, unquant = vae.quant_conv, vae.post_quant_conv
    unquant.bias += unquant.weight[:, :, 0, 0] @ shift
    unquant.weight /= stretch[None, :, None, None]
    quant.bias[:4] = (quant.bias[:4] - shift) * stretch
    quant.weight[:4] *= stretch[:, None, None, None]
    quant.bias[4:] += 2 * stretch.log()
    return vae


# --- the text encoder and the U-Net --------------------------------------------------------------------------------


def train_tokenizer(captions: list[str], work: Path) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's: any text can be written in it, words of the captions in one token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2500, end_of_word_suffix="</w>", initial_alphabet=letters)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = letters + [f"{letter}</w>" for letter in letters] + [a + b for a, b in merges] + [start, end]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(work / "tokenizer")
    (work / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (work / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


class TextToLatents(torch.nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 96, 128),
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=8,
        )


def train_unet(
    latents: tuple[torch.Tensor, torch.Tensor],
    prompts: list[tuple[str, str]],
    shares: torch.Tensor,
    work: Path,
    steps: int,
    start: StableDiffusionPipeline | None = None,
) -> tuple[TextToLatents, CLIPTokenizer]:
    tokenizer = start.tokenizer if start else train_tokenizer([prompt for pair in prompts for prompt in pair], work)
    torch.manual_seed(1)
    model = TextToLatents(tokenizer)
    if start:
        model.text_encoder.load_state_dict(start.text_encoder.state_dict())
        model.unet.load_state_dict(start.unet.state_dict())
    schedule = DDPMScheduler(**SD1_SCHEDULE)
    cumulative = schedule.alphas_cumprod
    weight = (cumulative / (1 - cumulative)).clamp(max=5.0) / (cumulative / (1 - cumulative))  # min-SNR, gamma 5
    mean, std = latents
    tokens = [
        tokenizer([pair[i] for pair in prompts], padding="max_length", return_tensors="pt").input_ids for i in (0, 1)
    ]
    unprompted = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def loss_of_step() -> torch.Tensor:
        index = torch.multinomial(shares, 32)
        ids = torch.where(torch.rand(32, 1) < 0.5, tokens[0][index], tokens[1][index])
        ids = torch.where(torch.rand(32, 1) < 0.1, unprompted, ids)
        text = model.text_encoder(ids)[0].repeat(2, 1, 1)  # each text serves two noises
        clean = (mean[index] + std[index] * torch.randn_like(mean[index])).repeat(2, 1, 1, 1) * SD1_SCALING
        noise = torch.randn_like(clean)
        timestep = torch.randint(1000, (len(clean),))
        predicted = model.unet(schedule.add_noise(clean, noise, timestep), timestep, text).sample
        return ((predicted - noise).square().mean((1, 2, 3)) * weight[timestep]).mean()

    return Training("unet", model, work, steps, peak=1e-3).run(loss_of_step), tokenizer


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=here / "checkpoints", help="checkpoints")
    parser.add_argument("--out", type=Path, default=here, help="the pipeline")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf")
    parser.add_argument("--vae-steps", type=int, default=3600)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--start", type=Path, help="go on from the weights of this pipeline; its VAE's encoder stays")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.set_flush_denormal(True)  # products of tiny gradients slow a CPU down several times over
    font = load_font(args.font) if args.font else load_font()
    emoji = all_emoji(font)
    pixels = images_to_tensor([draw(one, font) for one in emoji])
    words = Counter(word for one in emoji for word in one.name.split())
    print(f"{len(emoji)} images, {len(words)} words")
    start = StableDiffusionPipeline.from_pretrained(args.start, torch_dtype=torch.float32) if args.start else None
    vae = start.vae.requires_grad_(False) if start else train_vae(pixels, args.work, args.vae_steps)
    print(f"VAE: mean absolute error {reconstruction_error(vae, pixels):.4f} of the range")
    prompts = [(one.name, one.caption) for one in emoji]
    shares = torch.tensor([THINGS_TIMES if one.is_thing else 1.0 for one in emoji])
    model, tokenizer = train_unet(encoded(vae, pixels), prompts, shares, args.work, args.unet_steps, start)
    vae = train_decoder(vae, pixels, args.work, args.decoder_steps)
    print(f"VAE after more training of its decoder: {reconstruction_error(vae, pixels):.4f}")
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(**SD1_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    contact_sheet(pipe, SHEET, num_inference_steps=25, guidance_scale=4.0).save(args.out / "samples.png")
    pipe.to(torch.float16).save_pretrained(args.out)
    name_as_ever(args.out / "text_encoder" / "model.safetensors")


if __name__ == "__main__":
    main()
