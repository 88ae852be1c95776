"""Options of a run for the inputs of its base model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelChoices:
    """Options for inputs; a family without such an input ignores them.

    Args:
        t5_length: The number of T5 tokens of a caption; None uses the family's default.
        t5_mask: Whether T5's padding is masked in all attention.
        guidance: The guidance scale, for models with a guidance embedding.
    """

    t5_length: int | None = None
    t5_mask: bool = False
    guidance: float = 3.5

    @classmethod
    def of(cls, settings: Any) -> "ModelChoices":
        """The choices in the settings of a run."""
        return cls(settings.t5xxl_max_token_length, settings.apply_t5_attn_mask, settings.guidance_scale)
