"""What a run chose of the inputs of its base model, beyond what the family fixes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelChoices:
    """Choices of inputs; families that have no such input take no notice.

    Args:
        t5_length: tokens of a caption for T5; None for the family's own.
        t5_mask: whether T5's padding is left out of all attention.
        guidance: the guidance scale, for models with a guidance embedding.
    """

    t5_length: int | None = None
    t5_mask: bool = False
    guidance: float = 3.5

    @classmethod
    def of(cls, settings: Any) -> "ModelChoices":
        """The choices in the settings of a run."""
        return cls(settings.t5xxl_max_token_length, settings.apply_t5_attn_mask, settings.guidance_scale)
