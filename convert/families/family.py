"""`ModelFamily`, the description of a family of base models: names, blocks, coverage and metadata."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple, Protocol

from .blocks import BASE, Blocks, StackBlocks
from .names import TEXT_PROJECTION, ModuleName
from .tensor_slice import Part, TensorSlice

Kind = Literal["linear", "conv1x1", "conv3x3"]
Role = Literal["denoiser", "text_encoder"]


class Version(NamedTuple):
    """One version of a family's models.

    Attributes:
        title: The title, such as "SD1.x".
        long_title: The long title, such as "Stable Diffusion 1.x".
        value: kohya's ss_base_model_version.
        modelspec: The prefix of modelspec.architecture.
        resolution: The value of modelspec.resolution.
        repository: The Hub repository of the original model.
        text_width: The width of the text encoders' output, which the denoiser reads.
        prediction: The denoiser's prediction type, epsilon or v; None for flow matching, which modelspec cannot name.
        projections: The type of the attention's proj_in and proj_out.
        mark: The path of a layer that only this version's denoiser has.
    """

    title: str
    long_title: str
    value: str
    modelspec: str
    resolution: str
    repository: str
    text_width: int
    prediction: Literal["epsilon", "v"] | None = "epsilon"
    projections: Kind = "linear"
    mark: str | None = None


class Layout(Protocol):
    """The layers of a component, and their tensors in an original checkpoint.

    `paths` gives the paths of linear layers and convolutions, `norms` those of normalisation layers.
    """

    def paths(self) -> Iterable[str]: ...

    def norms(self) -> Iterable[str]: ...

    def slices(self, path: str) -> tuple[TensorSlice, ...]: ...


def _same(path: str) -> str:
    return path


def _is_fused(layout: Layout, path: str) -> bool:
    return any(isinstance(place.rows, Part) for place in layout.slices(path))


class Component(NamedTuple):
    """A component of the pipeline that adapters can change.

    Attributes:
        name: The name in diffusers' pipelines.
        role: Denoiser or text encoder.
        kohya: The prefix in kohya's files, without its last underscore.
        layout: The layers.
        original: Maps a path in diffusers to the name in the original code, which files may use too.
        kohya_original: Whether kohya's trainer writes the original code's names.
        others: Other prefixes of names in files, complete ones.
    """

    name: str
    role: Role
    kohya: str
    layout: Layout
    original: Callable[[str], str] = _same
    kohya_original: bool = False
    others: tuple[str, ...] = ()


class Coverage(NamedTuple):
    """The layers that an adapter type adapts.

    Attributes:
        title: The name of the type for users.
        parts: The adapted parts of the model.
        containers: The module classes of these parts.
        large_convolutions: Whether convolutions larger than 1x1 are adapted too.
    """

    title: str
    parts: tuple[str, ...]
    containers: frozenset[str]
    large_convolutions: bool


class Marks(NamedTuple):
    """Properties by which models and files of this family are recognised.

    Attributes:
        tensors: Prefixes of tensor names in an original checkpoint.
        components: Subfolders of a Diffusers folder.
        keys: Prefixes of tensor names in the denoiser's file of a Diffusers folder.
        config: Entries of the denoiser's config.
        kohya: Prefixes of names in kohya's files.
        width: Whether the size (out, in) of a layer occurs only in this family, although others have the layer too.
        widths: The widths of the blocks of released transformers.
        classes: The classes of the denoiser.
        mixins: diffusers' classes that load adapters into the family's pipelines.
    """

    tensors: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    config: tuple[tuple[str, str], ...] = ()
    kohya: tuple[str, ...] = ()
    width: Callable[[str, tuple[int, int]], bool] | None = None
    widths: frozenset[int] = frozenset()
    classes: tuple[str, ...] = ()
    mixins: tuple[str, ...] = ()


class Layer(NamedTuple):
    """One layer that an adapter can change.

    Attributes:
        module: The module.
        kohya: The name in kohya's files.
        originals: Possible places of its weight in an original checkpoint; the first that exists is used.
        block: The index of its block; None outside of the blocks.
        kind: The kind of layer.
    """

    module: ModuleName
    kohya: str
    originals: tuple[TensorSlice, ...]
    block: int | None
    kind: Kind


@dataclass(frozen=True, eq=False, repr=False)
class ModelFamily:
    """A family of base models whose layers have the same names.

    Attributes:
        name: A short name for code and caches.
        title: The name for users.
        versions: The versions; the first is the default.
        metadata: Prefixes of ss_base_model_version for this family.
        components: The components that adapters can change.
        blocks: The blocks of the denoiser.
        coverage: The adapted layers of each adapter type.
        part_of: Maps a path in the denoiser to the part of the model that contains it.
        kind_of: Maps a path in the denoiser to the kind of layer.
        marks: Properties by which models and files are recognised.
        formats: The file formats that can store adapters for the family.
        implementation: The value of modelspec.implementation.
        options: kohya's flags for the family, with the prefix of ss_base_model_version that each stands for.
        tag: The tag on the Hub.
        marks_v_prediction: Whether a checkpoint file marks a model that predicts v by empty tensors.
        network_module: kohya's ss_network_module of plain adapters.
        single_file: diffusers' pipeline class for a single-file model; empty if it has none.
        vae_prefix: The prefix of the VAE's names in a single file.
    """

    name: str
    title: str
    versions: tuple[Version, ...]
    metadata: tuple[str, ...]
    components: tuple[Component, ...]
    blocks: Blocks | StackBlocks
    coverage: Mapping[str, Coverage]
    part_of: Callable[[str], str]
    kind_of: Callable[[str], Kind]
    marks: Marks
    formats: frozenset[str]
    implementation: str
    options: Mapping[str, str]
    tag: str
    marks_v_prediction: bool = False
    network_module: str = "networks.lora"
    single_file: str = ""
    vae_prefix: str = "first_stage_model."

    # --- names -----------------------------------------------------------------------------------------------------

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """The titles of the versions without duplicates: ("SD1.x", "SD2.x")."""
        return tuple(dict.fromkeys(version.title for version in self.versions))

    @property
    def stated(self) -> str:
        """The ss_base_model_version to write for an adapter whose version is not known."""
        return self.versions[0].value if len(self.versions) == 1 or not self.marks.classes else self.metadata[0]

    @cached_property
    def denoiser(self) -> Component:
        """The component that is the denoiser."""
        return next(part for part in self.components if part.role == "denoiser")

    def component(self, name: str) -> Component | None:
        """The component with this name; None if the family does not have it."""
        return next((part for part in self.components if part.name == name), None)

    def kohya_name(self, module: ModuleName) -> str:
        """The name of a module in the files that kohya's trainer writes."""
        part = self.component(module.component)
        assert part is not None, module
        spelled = part.original(module.path) if part.kohya_original else module.path
        return f"{part.kohya}_{spelled.replace('.', '_')}"

    # --- layers ----------------------------------------------------------------------------------------------------

    @cache  # noqa: B019 (families live as long as the program)
    def paths(self, component: str) -> frozenset[str]:
        """The paths of all layers of a component that an adapter can change; empty for an unknown component."""
        part = self.component(component)
        return frozenset() if part is None else frozenset(part.layout.paths())

    @cache  # noqa: B019
    def norms(self, component: str) -> frozenset[str]:
        """The paths of all normalisation layers of a component; empty for an unknown component."""
        part = self.component(component)
        return frozenset() if part is None else frozenset(part.layout.norms())

    def spellings(self, component: str, norms: bool = False) -> Iterator[tuple[str, str]]:
        """The layers of a component by their names in diffusers and in the original code.

        Args:
            component: The name of the component; nothing is yielded for an unknown one.
            norms: Include normalisation layers.

        Yields:
            (name, path in diffusers).
        """
        part = self.component(component)
        if part is not None:
            for path in self.paths(component) | (self.norms(component) if norms else frozenset()):
                yield path, path
                if not _is_fused(part.layout, path):  # the name of a fused layer stands for several paths
                    yield part.original(path), path

    @cache  # noqa: B019
    def layers(self, component: str) -> tuple[Layer, ...]:
        """The layers of a component: alphabetically for the denoiser, from first to last for text encoders."""
        part = self.component(component)
        if part is None:
            return ()
        denoiser = part.role == "denoiser"
        paths = sorted(self.paths(component)) if denoiser else part.layout.paths()
        modules = (ModuleName(component, path) for path in paths)
        return tuple(
            Layer(
                module,
                self.kohya_name(module),
                part.layout.slices(module.path),
                self.blocks.index(module.path) if denoiser else None,
                self.kind_of(module.path) if denoiser else "linear",
            )
            for module in modules
        )

    def has(self, modules: Iterable[ModuleName]) -> bool:
        """Whether the family has all of these components, and its denoiser all of these layers."""
        known, denoiser = {part.name for part in self.components}, self.denoiser.name
        paths = self.paths(denoiser) | self.norms(denoiser)
        return all(
            module.component in known and (module.component != denoiser or module.path in paths) for module in modules
        )

    def covers(self, adapter_type: str, module: ModuleName) -> bool:
        """Whether an adapter type ("lierla", "c3lier") adapts the module."""
        return self.part(module) in self.coverage[adapter_type].parts

    def adapter_type(self, modules: Iterable[ModuleName]) -> Coverage:
        """The smallest coverage that includes all modules in blocks; the largest coverage if none includes them all."""
        parts = {self.part(module) for module in modules} - {"outer"}
        coverages = tuple(self.coverage.values())
        return next((coverage for coverage in coverages if parts <= set(coverage.parts)), coverages[-1])

    def part(self, module: ModuleName) -> str:
        """The part of the model that contains a module: attention, resnet, sampler, text, or outer."""
        if module.component == self.denoiser.name:
            return self.part_of(module.path)
        return "outer" if module.path == TEXT_PROJECTION else "text"

    # --- blocks ----------------------------------------------------------------------------------------------------

    def block_label(self, module: ModuleName) -> str:
        """IN, MID or OUT with the number of a module's block; the component's name outside of the blocks."""
        if module.component != self.denoiser.name:
            return module.component
        return self.blocks.label(module.path) or module.component

    def weight_label(self, module: ModuleName) -> str:
        """The label in lists of block weights: the `block_label`, or BASE for the text encoders."""
        return self.block_label(module) if module.component == self.denoiser.name else BASE

    def text_label(self, module: ModuleName) -> str | None:
        """The label of a text encoder that has its own block weight (CLIP, T5); None otherwise."""
        return self.blocks.texts.get(module.component) if isinstance(self.blocks, StackBlocks) else None

    # --- versions --------------------------------------------------------------------------------------------------

    def version(self, text_width: int | None, prediction: str = "epsilon") -> Version | None:
        """The version of the family with these properties.

        Args:
            text_width: The width of the text encoder's output; None if it is unknown.
            prediction: "epsilon" or "v_prediction"; decides between versions of the same width.

        Returns:
            The version; None if no version has the width. A family with one version returns it in any case.
        """
        if len(self.versions) == 1:
            return self.versions[0]
        versions = [version for version in self.versions if version.text_width == text_width]
        return next(
            (version for version in versions if version.prediction == prediction), versions[0] if versions else None
        )

    # --- detection -------------------------------------------------------------------------------------------------

    def is_told_by(self, components: Collection[str], config: object) -> bool:
        """Whether the components or the denoiser's config of a live pipeline identify this family."""
        marks = self.marks
        return any(name in components for name in marks.components) or any(
            getattr(config, name, None) == value for name, value in marks.config
        )
