"""What building a tiny model of either kind takes: a resumable stage of training, its data, its sheet of samples."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

CHECKPOINT_EVERY = 200
THINGS_TIMES = 6.0  # how many times as often as signs and gestures the U-Net sees a thing
SHEET = (
    "a red apple", "closed umbrella", "a dog face", "a cat face", "a rainbow", "a sunflower", "a rocket", "a snowman",
    "a pizza", "slice of pizza", "an octopus", "a penguin", "a guitar", "a candle", "a strawberry", "a soccer ball",
    "a bicycle", "a sailboat", "a mushroom", "a ghost", "a heart with arrow", "a crown", "a robot face", "a cactus",
)  # fmt: skip


def images_to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size as a float tensor (n, 3, height, width) in [-1, 1]."""
    flat = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in images])
    width, height = images[0].size
    return flat.view(len(images), height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to one hundredth of the peak."""
    cosine = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


class Training:
    """One resumable stage: a module, its average, its optimizer and the step that it has reached."""

    def __init__(self, name: str, module: torch.nn.Module, work: Path, steps: int, peak: float, decay: float = 0.999):
        self.file, self.steps, self.peak, self.decay = work / f"{name}.pt", steps, peak, decay
        self.module, self.average = module, copy.deepcopy(module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=0.01, fused=True)
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        parts = {"module": self.module, "average": self.average, "optimizer": self.optimizer}
        partial = self.file.with_suffix(".partial")
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        partial.replace(self.file)

    def run(self, loss_of_step) -> torch.nn.Module:
        """Train to the last step with `loss_of_step()`, a scalar tensor; gives back the averaged module."""
        bar = tqdm(initial=self.step, total=self.steps, desc=self.file.stem, mininterval=10)
        shown = None
        while self.step < self.steps:
            torch.manual_seed(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.peak)
            loss = loss_of_step()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            decay = min(self.decay, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.module.parameters()), 1 - decay)
            shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            bar.update()
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
                self.save()
        return self.average.eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (n, 4, height/8, width/8) of the latents, unscaled."""
    posteriors = [vae.encode(part).latent_dist for part in pixels.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def contact_sheet(pipe: DiffusionPipeline, prompts: tuple[str, ...], seed: int = 0, **settings) -> Image.Image:
    """One image per prompt, drawn with these settings of the pipeline, eight in a row, at twice their size."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(prompts), generator=generators, **settings).images
    sheet = Image.new("RGB", (8 * 132, -(-len(images) // 8) * 132), "white")
    for place, image in enumerate(images):
        sheet.paste(image.resize((128, 128), Image.Resampling.BICUBIC), (place % 8 * 132, place // 8 * 132))
    return sheet


def name_as_ever(file: Path) -> None:
    """Give a CLIPTextModel's tensors the names that every reader knows: version 5 of transformers writes them without
    `text_model.`, and version 4 would leave the model as it was initialised, with no more than a warning."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
