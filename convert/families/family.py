"""What a family of base models is, as data: the one place that defines names, blocks, coverage and metadata."""

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

    title, long_title: "SD1.x", "Stable Diffusion 1.x". value: kohya's ss_base_model_version. modelspec: the beginning
    of modelspec.architecture. resolution: of modelspec. repository: the Hub's of the model that others stem from.
    text_width: of the text encoders' output, which the denoiser reads. prediction: what the denoiser was trained to
    tell, epsilon or v; None: flow matching's velocity, for which modelspec has no word. projections: what the
    attention's proj_in and proj_out are. mark: the path of a layer that only this version's denoiser has.
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
    """The layers of a component: their paths, and where an original checkpoint has each.

    paths: of linear layers and convolutions. norms: of normalisation layers.
    """

    def paths(self) -> Iterable[str]: ...

    def norms(self) -> Iterable[str]: ...

    def slices(self, path: str) -> tuple[TensorSlice, ...]: ...


def _same(path: str) -> str:
    return path


def _is_fused(layout: Layout, path: str) -> bool:
    return any(isinstance(place.rows, Part) for place in layout.slices(path))


class Component(NamedTuple):
    """A part of the pipeline that adapters change.

    kohya: the prefix in kohya's files, without the underscore behind it. original: a path in diffusers -> the name in
    the original code, which files may have too. kohya_original: whether kohya's trainer writes that one. others: other
    beginnings of names in files than kohya's, whole ones.
    """

    name: str
    role: Role
    kohya: str
    layout: Layout
    original: Callable[[str], str] = _same
    kohya_original: bool = False
    others: tuple[str, ...] = ()


class Coverage(NamedTuple):
    """The layers of an adapter type.

    title: The type's name for people. parts: The parts of the model that it adapts, and containers, the live classes
    that these are. large_convolutions: Whether convolutions larger than 1x1 are adapted too.
    """

    title: str
    parts: tuple[str, ...]
    containers: frozenset[str]
    large_convolutions: bool


class Marks(NamedTuple):
    """What only this family's models and files have.

    tensors: beginnings of names in an original checkpoint. components: folders of a Diffusers folder. keys: beginnings
    of names in its denoiser's file. config: entries of its denoiser's config. kohya: beginnings of names in kohya's
    files. width: whether a layer that other families have too is as wide, (out, in), as only this family's. widths: of
    the blocks of released transformers. classes: of its live denoisers. mixins: diffusers' classes that load adapters
    into its pipelines.
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
    """One layer that an adapter can have.

    kohya: its name in kohya's files. originals: where an original checkpoint can have it, the first one that is there
    counts. block: the index of its block, None outside of the blocks. kind: of layer.
    """

    module: ModuleName
    kohya: str
    originals: tuple[TensorSlice, ...]
    block: int | None
    kind: Kind


@dataclass(frozen=True, eq=False, repr=False)
class ModelFamily:
    """A family of base models whose layers have the same names.

    name: a short one for code and caches. title: for people. versions: the first is the one that is assumed. metadata:
    beginnings of ss_base_model_version that mean it. part_of, kind_of: of a path in the denoiser. coverage: by adapter
    type. formats: those of files that can hold its adapters. implementation: of modelspec. options: kohya's flags that
    ask for it, with the beginning of the metadata value that they mean. tag: the Hub's. marks_v_prediction: whether a
    checkpoint file says by empty tensors that its model predicts v. network_module: kohya's, in the metadata of plain
    adapters. single_file: diffusers' pipeline that opens a model in one file; empty if it has none. vae_prefix: the
    beginning of the VAE's names in such a file.
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
        """The versions' titles, each once: ("SD1.x", "SD2.x")."""
        return tuple(dict.fromkeys(version.title for version in self.versions))

    @property
    def stated(self) -> str:
        """The ss_base_model_version of an adapter whose version is not known."""
        return self.versions[0].value if len(self.versions) == 1 or not self.marks.classes else self.metadata[0]

    @cached_property
    def denoiser(self) -> Component:
        """The component that predicts the image: the denoiser."""
        return next(part for part in self.components if part.role == "denoiser")

    def component(self, name: str) -> Component | None:
        """The component of that name; None if the family has none."""
        return next((part for part in self.components if part.name == name), None)

    def kohya_name(self, module: ModuleName) -> str:
        """The name of a module in kohya's files, as its trainer writes it."""
        part = self.component(module.component)
        assert part is not None, module
        spelled = part.original(module.path) if part.kohya_original else module.path
        return f"{part.kohya}_{spelled.replace('.', '_')}"

    # --- layers ----------------------------------------------------------------------------------------------------

    @cache  # noqa: B019 (families live as long as the program)
    def paths(self, component: str) -> frozenset[str]:
        """The paths of all layers of a component that an adapter can have; empty if there is no such component."""
        part = self.component(component)
        return frozenset() if part is None else frozenset(part.layout.paths())

    @cache  # noqa: B019
    def norms(self, component: str) -> frozenset[str]:
        """The paths of all normalisation layers of a component; empty if there is no such component."""
        part = self.component(component)
        return frozenset() if part is None else frozenset(part.layout.norms())

    def spellings(self, component: str, norms: bool = False) -> Iterator[tuple[str, str]]:
        """The layers of a component by their names in diffusers and in the original code.

        Args:
            component: The name of the component; one that the family does not have has no layers.
            norms: Include normalisation layers.

        Yields:
            (name, path in diffusers).
        """
        part = self.component(component)
        if part is not None:
            for path in self.paths(component) | (self.norms(component) if norms else frozenset()):
                yield path, path
                if not _is_fused(part.layout, path):  # else the name stands for several
                    yield part.original(path), path

    @cache  # noqa: B019
    def layers(self, component: str) -> tuple[Layer, ...]:
        """The layers of a component: the denoiser's in alphabetical order, text encoders' from first to last."""
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
        """Whether its models have all of these components, and their denoiser all of these layers."""
        known, denoiser = {part.name for part in self.components}, self.denoiser.name
        paths = self.paths(denoiser) | self.norms(denoiser)
        return all(
            module.component in known and (module.component != denoiser or module.path in paths) for module in modules
        )

    def covers(self, adapter_type: str, module: ModuleName) -> bool:
        """Whether an adapter of that type ("lierla", "c3lier") has the module."""
        return self.part(module) in self.coverage[adapter_type].parts

    def adapter_type(self, modules: Iterable[ModuleName]) -> Coverage:
        """The smallest coverage with all of the modules that are in blocks; the largest one if none has."""
        parts = {self.part(module) for module in modules} - {"outer"}
        coverages = tuple(self.coverage.values())
        return next((coverage for coverage in coverages if parts <= set(coverage.parts)), coverages[-1])

    def part(self, module: ModuleName) -> str:
        """The part of the model that a module is in: attention, resnet, sampler, text, or outer."""
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
        """As `block_label`, with BASE for the text encoders: what lists of block weights call it."""
        return self.block_label(module) if module.component == self.denoiser.name else BASE

    def text_label(self, module: ModuleName) -> str | None:
        """What lists of block weights call a text encoder that has a weight of its own in them (CLIP, T5)."""
        return self.blocks.texts.get(module.component) if isinstance(self.blocks, StackBlocks) else None

    # --- versions --------------------------------------------------------------------------------------------------

    def version(self, text_width: int | None, prediction: str = "epsilon") -> Version | None:
        """The version of the family with these properties.

        Args:
            text_width: The width of the text encoder's output, in numbers; None if it is unknown.
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
        """Whether a live pipeline is of this family for sure, by its components and its denoiser's config."""
        marks = self.marks
        return any(name in components for name in marks.components) or any(
            getattr(config, name, None) == value for name, value in marks.config
        )
