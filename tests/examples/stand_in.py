"""A training script like diffusers' examples: plain LoraConfig, and their calls for saving and resuming."""

import argparse

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file


def with_adapter(args: argparse.Namespace) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet")
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    return unet


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 24, generator=generator)


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    latents, context = inputs()
    return unet.eval()(latents, 7, context).sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--output_dir")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet = with_adapter(args)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    latents, context = inputs()
    unet.train()
    for _ in range(3):
        unet(latents, 7, context).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(save_directory=args.output_dir, unet_lora_layers=layers)

    resumed = with_adapter(args)
    state, _ = StableDiffusionPipeline.lora_state_dict(args.output_dir, weight_name="pytorch_lora_weights.safetensors")
    state = {key.replace("unet.", ""): value for key, value in state.items() if key.startswith("unet.")}
    found = set_peft_model_state_dict(resumed, convert_unet_state_dict_to_peft(state), adapter_name="default")
    if found.unexpected_keys:
        raise SystemExit(f"unexpected: {found.unexpected_keys}")
    results = {"trained": output(unet), "resumed": output(resumed)}
    save_file(results, f"{args.output_dir}/outputs")


if __name__ == "__main__":
    main()
