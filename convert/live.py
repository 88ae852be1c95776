"""The methods of `Adapter` for live models: declared here, implemented by a registered module.

`convert` does not depend on diffusers or PEFT. `lora_adapters` registers the implementation, `lora_adapters.adapter`,
which is loaded when one of these methods is first called.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import Self

from .errors import AdapterError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class LiveMethods(Protocol):
    """The interface of the registered module: one function for each method of `LiveAdapter`, with its arguments."""

    def from_models(
        self, adapter_type: Any, models: Mapping[str, Any], adapter_name: str, metadata: Mapping[str, str] | None
    ) -> Any:
        """See `LiveAdapter.from_models`; the result is of `adapter_type`."""

    def from_pipeline(self, adapter_type: Any, pipe: Any, adapter_name: str, metadata: Mapping[str, str] | None) -> Any:
        """See `LiveAdapter.from_pipeline`; the result is of `adapter_type`."""

    def to_pipeline(self, adapter: Any, pipe: Any, adapter_name: str | None) -> None:
        """See `LiveAdapter.to_pipeline`."""

    def push_to_hub(self, adapter: Any, repo_id: str, **options: Any) -> "CommitInfo":
        """See `LiveAdapter.push_to_hub`."""


_load: Callable[[], Any] | None = None


def register(load: Callable[[], Any]) -> None:
    """Register a function that loads the module with the `LiveMethods`; the last registered function is used."""
    global _load
    _load = load


def _live() -> LiveMethods:
    if _load is None:
        raise AdapterError("adapters in pipelines need all of lora_adapters, not only lora_adapters.convert")
    return _load()


class LiveAdapter:
    """The methods of `Adapter` for live models and the Hub. Calling them requires diffusers and PEFT."""

    @classmethod
    def from_models(
        cls, models: Mapping[str, Any], adapter_name: str = "default", metadata: Mapping[str, str] | None = None
    ) -> Self:
        """Read an adapter out of live models.

        Args:
            models: The models by component ("unet", "text_encoder", "text_encoder_2"). They may be wrapped by
                `peft.get_peft_model` or compiled.
            adapter_name: The adapter's name in the models.
            metadata: Entries for the metadata of the result.

        Returns:
            The adapter. Its tensors are those of the models, not copies.

        Raises:
            AdapterError: No model has such an adapter, or it is not only low-rank pairs (DoRA, lora_bias).
        """
        return _live().from_models(cls, models, adapter_name, metadata)

    @classmethod
    def from_pipeline(cls, pipe: Any, adapter_name: str = "default", metadata: Mapping[str, str] | None = None) -> Self:
        """Read an adapter out of a pipeline.

        Args:
            pipe: The pipeline.
            adapter_name: The adapter's name in the pipeline.
            metadata: Entries for the metadata of the result.

        Returns:
            The adapter, as `from_models` returns it.

        Raises:
            AdapterError: As for `from_models`.
        """
        return _live().from_pipeline(cls, pipe, adapter_name, metadata)

    def to_pipeline(self, pipe: Any, adapter_name: str | None = None) -> None:
        """Load the adapter into a pipeline, as `pipe.load_lora_weights` does with a file.

        Args:
            pipe: The pipeline.
            adapter_name: The adapter's name in the pipeline; None uses the first free one of default_0, default_1, ...

        Raises:
            AdapterError: It is for another model, or the name is in use. The pipeline is then unchanged.
        """
        _live().to_pipeline(self, pipe, adapter_name)

    def push_to_hub(self, repo_id: str, **options: Any) -> "CommitInfo":
        """Push the adapter to the Hub in one commit: for diffusers, kohya's programs and PEFT, with a model card.

        Args:
            repo_id: The repository, owner/name.
            **options: private, revision, token, commit_message, create_pr, endpoint, and the content of the card:
                base_model, trigger_words, description, license, samples ({prompt: image}), grid (an image), tags; dtype
                of the weights. See `lora_adapters.hub.repository.push_to_hub`.

        Returns:
            The Hub's description of the commit.

        Raises:
            AdapterError: Something cannot be read, written or pushed.
        """
        return _live().push_to_hub(self, repo_id, **options)
