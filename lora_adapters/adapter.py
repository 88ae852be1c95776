"""The adapter of `lora_adapters.convert`, with the ways into and out of live pipelines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_adapters.convert.adapter import Adapter as AdapterData
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import may_be_sdxl

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def _of_sdxl(models: Mapping[str, Any]) -> bool:
    """Whether the models are SDXL's: two text encoders, or a U-Net that is told the picture's size."""
    config = getattr(models.get("unet"), "config", None)
    return "text_encoder_2" in models or getattr(config, "addition_embed_type", None) == "text_time"


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(AdapterData):
    """`lora_adapters.convert.Adapter` that can also be put into a pipeline and taken out of one."""

    @classmethod
    def from_models(
        cls, models: Mapping[str, Any], adapter_name: str = "default", metadata: Mapping[str, str] | None = None
    ) -> "Adapter":
        """The adapter of that name in the models, by component ("unet", "text_encoder", "text_encoder_2").

        The models may be wrapped by `peft.get_peft_model` or compiled. The tensors are those of the models, not copies.
        AdapterError where no model has such an adapter, or where it is more than low-rank pairs (DoRA, lora_bias).
        """
        from .injection import dylora_in, taken, unwrapped

        models = {component: unwrapped(model) for component, model in models.items()}
        modules, dylora = {}, None
        for component, model in models.items():
            if adapter_name in getattr(model, "peft_config", {}):
                modules.update(taken(model, component, adapter_name))
                dylora = dylora or dylora_in(model, adapter_name)
        if not modules:
            names = sorted({name for model in models.values() for name in getattr(model, "peft_config", {})})
            raise AdapterError(f"there is no adapter {adapter_name} here; there are: {', '.join(names) or 'none'}")
        facts = dict(metadata or {})
        if _of_sdxl(models) and may_be_sdxl(modules):  # which a few of its modules do not tell
            facts.setdefault("ss_base_model_version", "sdxl_base_v1-0")
        adapter = cls(modules, facts)
        return adapter if dylora is None else adapter.as_dylora(dylora)

    @classmethod
    def from_pipeline(
        cls, pipe: Any, adapter_name: str = "default", metadata: Mapping[str, str] | None = None
    ) -> "Adapter":
        """The adapter of that name in a pipeline, as `from_models` gives it."""
        from .pipeline import _models

        return cls.from_models(_models(pipe), adapter_name, metadata)

    def to_pipeline(self, pipe: Any, adapter_name: str | None = None) -> None:
        """Load it into a pipeline, as `pipe.load_lora_weights` does with a file.

        The name is default_0 and so on where none is given. AdapterError where it is for another model or
        the name is taken; the pipeline is then as it was.
        """
        from .pipeline import load_adapter

        load_adapter(pipe, self, adapter_name)

    def push_to_hub(self, repo_id: str, **options: Any) -> "CommitInfo":
        """Push it to the Hub in one commit: for diffusers, kohya's programs and PEFT, with a model card.

        options: private, revision, token, commit_message, create_pr, endpoint, and what the card shows: base_model,
        trigger_words, description, license, samples ({prompt: picture}), grid (a picture), tags; dtype of the weights.
        See `lora_adapters.hub.repository.push_to_hub`.
        """
        from lora_adapters.hub.repository import push_to_hub

        return push_to_hub(self, repo_id, **options)
