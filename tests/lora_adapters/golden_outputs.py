"""Outputs of a tiny golden pipeline for the golden inputs, and their distance from the expected outputs."""

import torch


@torch.no_grad()
def outputs(pipe, golden):
    result, extra = {"text": pipe.text_encoder(golden["input_ids"])[0]}, {}
    if getattr(pipe, "text_encoder_2", None) is not None:
        result["text_2"] = pipe.text_encoder_2(golden["input_ids"]).text_embeds
        extra["added_cond_kwargs"] = {"text_embeds": golden["pooled"], "time_ids": golden["time_ids"]}
    result["unet"] = pipe.unet(golden["latents"], 7, golden["context"], **extra).sample
    return result


def error(found, wanted, base):
    """The largest distance of an output from the expected one, relative to the change that the adapter causes."""
    errors = []
    for part, value in found.items():
        change = (wanted[part] - base[part]).norm().item()
        errors.append((value - wanted[part]).norm().item() / (change if change > 1e-6 else 1.0))
    return max(errors)
