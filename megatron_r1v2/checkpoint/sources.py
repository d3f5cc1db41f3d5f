"""Sources of the parameters of a whole model: a Hugging Face folder, a checkpoint, or parts of one over another.

Every source gives the parameters by our names, whole (as one tensor-parallel rank would hold them) and one at a time,
so each converter is: for every row of the table, read from a source, write to a destination.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch

from megatron_r1v2.checkpoint.direct_io import DirectReader
from megatron_r1v2.checkpoint.hf.config import folder_architecture, read_hf_config
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.hf.mapping import (
    Layout,
    MappedParameter,
    hf_leftovers,
    parameter_map,
    stored_names,
)
from megatron_r1v2.checkpoint.hf.refusals import Unsupported, check_folder, check_tensors
from megatron_r1v2.checkpoint.hf.shapes import parameter_shapes
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import HF_IN_CHECKPOINT, STATE_FILE, TENSORS, load_state
from megatron_r1v2.checkpoint.megatron.torch_dist import TorchDist
from megatron_r1v2.checkpoint.stored_tensors import Block, StoredTensor, rearranged
from megatron_r1v2.models.architecture import R1V2Architecture


class Source(ABC):
    """An open source, to be used as a context manager, which closes what it has opened."""

    architecture: R1V2Architecture
    random_parts: frozenset[str] = frozenset()
    """Parts whose weights were drawn and never trained."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.reader = self._stack.enter_context(DirectReader())
        """For one thread at a time, unlike the rest."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def names(self) -> list[str]:
        """Return our names of the parameters that it has, sorted."""

    @abstractmethod
    def meta(self, ours: str) -> torch.Tensor:
        """Return a parameter without data: its shape and dtype."""

    @abstractmethod
    def parameter(self, ours: str) -> torch.Tensor:
        """Read one parameter.

        Raises:
            ValueError: it is damaged.
        """

    def blocks(self, ours: str) -> list[torch.Tensor]:
        """Read one parameter as blocks of its rows, which saves the copy that puts them together.

        Raises:
            ValueError: it is damaged.
        """
        return [self.parameter(ours)]

    def stored(self, ours: str) -> StoredTensor | None:  # noqa: ARG002
        """Return the place of a parameter that lies in a file as it is; None: it must be put together.

        Raises:
            ValueError: it is damaged.
        """
        return None

    def stored_blocks(self, ours: str) -> list[Block]:
        """Return one parameter as blocks of its rows, which are read as they are used wherever that is possible.

        Raises:
            ValueError: it is damaged.
        """
        stored = self.stored(ours)
        if stored is None:
            return list(self.blocks(ours))
        return rearranged([stored], self.reader, lambda parts: [parts])[0]


class SourceSpec(Protocol):
    """The description of a source, by which any thread can open it."""

    def open(self) -> Source:
        """Open it, and check names, shapes and headers."""
        ...

    def files(self) -> list[Path]:
        """Return the files that it reads, which must not change during a conversion."""
        ...


def exported_rows(architecture: R1V2Architecture, layout: Layout) -> list[MappedParameter]:
    """Return the rows of the table that are written, in order."""
    return [row for row in parameter_map(architecture, layout) if row.exported]


class TableSource(Source):
    """An open source whose parameters are put together from Hugging Face tensors, as the rows of the table say.

    A subclass sets `architecture` and `_rows`, opens folders through `_stack`, and reads the tensors by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, MappedParameter] = {}

    def names(self) -> list[str]:
        """Return our names of the parameters."""
        return sorted(self._rows)

    def meta(self, ours: str) -> torch.Tensor:
        """Return a parameter without data."""
        row = self._rows[ours]
        tensors = {name: self._meta(name) for name in row.hf}
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
            raise Unsupported(
                "mixed dtypes",
                f"{self._folder_of(ours)}: {found}; accepted: floating point, the same for all of a weight",
            )
        return row.to_shard(tensors, tensor_rank=0, tensor_size=1)

    def parameter(self, ours: str) -> torch.Tensor:
        """Read one parameter."""
        row = self._rows[ours]
        return row.to_shard({name: self._tensor(name) for name in row.hf}, tensor_rank=0, tensor_size=1)

    def blocks(self, ours: str) -> list[torch.Tensor]:
        """Read one parameter as blocks of its rows."""
        row = self._rows[ours]
        return row.blocks({name: self._tensor(name) for name in row.hf})

    def stored(self, ours: str) -> StoredTensor | None:
        """Return the place of a parameter that is one Hugging Face tensor."""
        row = self._rows[ours]
        return self._place(row.hf[0]) if len(row.blocks({name: self._meta(name) for name in row.hf})) == 1 else None

    def stored_blocks(self, ours: str) -> list[Block]:
        """Return one parameter as blocks of its rows, in the files."""
        row = self._rows[ours]
        places = [place for name in row.hf if (place := self._place(name)) is not None]
        if len(places) < len(row.hf):
            return list(self.blocks(ours))
        return rearranged(places, self.reader, lambda parts: [row.blocks(dict(zip(row.hf, parts, strict=True)))])[0]

    def _check_shapes(self) -> None:
        """Refuse tensors of other shapes than transformers has for the configuration, split over ranks or not."""
        shapes = parameter_shapes(self.architecture)
        for ours, row in self._rows.items():
            if self.meta(ours).shape != shapes[ours]:
                found = ", ".join(f"{name} {list(self._meta(name).shape)}" for name in row.hf)
                raise ValueError(
                    f"{self._folder_of(ours)}: {found} makes {ours} {list(self.meta(ours).shape)}, config.json implies "
                    f"{list(shapes[ours])}; the weights do not belong to this config.json"
                )

    @abstractmethod
    def _meta(self, name: str) -> torch.Tensor:
        """Return a tensor without data."""

    @abstractmethod
    def _tensor(self, name: str) -> torch.Tensor:
        """Read a tensor."""

    def _place(self, name: str) -> StoredTensor | None:  # noqa: ARG002
        """Return the place of a tensor; None: it is read by `_tensor` alone."""
        return None

    @abstractmethod
    def _folder_of(self, ours: str) -> Path:
        """Return the folder of a parameter, for errors."""


@dataclass(frozen=True)
class HfSpec:
    """A Hugging Face folder in either layout, or a part of it."""

    folder: Path
    config: Path | None = None
    """Folder whose config.json describes the model; None: `folder`."""
    parts: tuple[str, ...] = ()
    """Only these parts are in it; none: all."""
    layout: Layout | None = None
    """Of the tensors; None: that of config.json."""

    def open(self) -> HfSource:
        """Open it."""
        return HfSource(self)

    def files(self) -> list[Path]:
        """Return the weights and config.json."""
        with SafetensorsFolder(self.folder) as folder:
            return [*folder.paths(), (self.config or self.folder) / "config.json"]


class HfSource(TableSource):
    """An open Hugging Face folder."""

    def __init__(self, spec: HfSpec) -> None:
        """Open a folder and compare its tensors with the table.

        Raises:
            ValueError: tensors are missing, left over, or not of the shape that config.json implies.
        """
        super().__init__()
        config, layout = read_hf_config(spec.config or spec.folder)
        self.architecture = folder_architecture(config, spec.config or spec.folder)
        self.layout = spec.layout or layout
        self._manifest = Manifest.of(spec.folder)
        if self._manifest is not None:
            self.random_parts = self._manifest.random_parts
        self._folder = self._stack.enter_context(SafetensorsFolder(spec.folder))
        try:
            self._index(spec)
        except ValueError:
            self._stack.close()
            raise

    def _index(self, spec: HfSpec) -> None:
        check_tensors(self._folder.dtypes(), spec.folder)
        tied = self.architecture.language.tied_embeddings
        self._stored = stored_names(self._folder.names(), self.layout, tied=tied)
        if len(self._stored) != len(self._folder.names()):
            raise ValueError(f"{spec.folder} has a tensor under two names: that of files and that inside the model")
        rows = parameter_map(self.architecture, self.layout)
        if spec.parts:
            rows = tuple(row for row in rows if row.ours.split(".")[0] in spec.parts)
            wanted = {name for row in rows for name in row.hf}
            unused, missing = sorted(set(self._stored) - wanted), sorted(wanted - set(self._stored))
        else:
            unused, missing = hf_leftovers(self.architecture, self._stored, self.layout)
        if unused or missing:
            sentence = (
                f"{spec.folder} does not hold the model of its config.json: {len(missing)} tensors are missing "
                f"{missing[:5]}, {len(unused)} have no place in it {unused[:5]}"
            )
            raise ValueError(sentence) if missing else Unsupported("superfluous tensors", sentence)
        self._rows = {row.ours: row for row in rows if row.exported}
        self._check_shapes()
        if self._manifest is not None:
            self._manifest.check_files()
            if set(self._manifest.tensors) != set(self._folder.names()):
                raise ValueError(f"{self._manifest.path} lists other tensors than the folder has; copy it again")

    def _folder_of(self, ours: str) -> Path:  # noqa: ARG002
        return self._folder.folder

    def _meta(self, name: str) -> torch.Tensor:
        return self._folder.info(self._stored[name]).meta()

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = self._folder.tensor(stored)
        if self._manifest is not None:
            self._manifest.check_tensor(stored, tensor)
        return tensor

    def _place(self, name: str) -> StoredTensor:
        place = self._folder.stored(self._stored[name])
        if self._manifest is None:
            return place
        return replace(place, checksum=self._manifest.checksum(self._stored[name], place.info))


@dataclass(frozen=True)
class CheckpointSpec:
    """A checkpoint of a run or of the converter; parts that it has not come from a base."""

    folder: Path
    base: Path | None = None
    """Hugging Face folder that the run started from; None: the checkpoint has all parts and its own config.json."""
    only_stored: bool = False
    """Leave the base's parameters out."""

    def open(self) -> CheckpointSource:
        """Open it."""
        return CheckpointSource(self)

    def files(self) -> list[Path]:
        """Return the checkpoint's files, and the base's."""
        own = [path for path in sorted((self.folder / TENSORS).iterdir()) if path.is_file()]
        return [*own, self.folder / STATE_FILE, *(HfSpec(self.base).files() if self.base else [])]


class CheckpointSource(Source):
    """An open checkpoint."""

    def __init__(self, spec: CheckpointSpec) -> None:
        """Open a checkpoint, and its base when it has not all parts.

        Raises:
            ValueError: parts are missing and there is no base; or arrays do not fit the model.
        """
        super().__init__()
        self._manifest = Manifest.of(spec.folder)
        if self._manifest is not None:
            self._manifest.check_files()
            self.random_parts = self._manifest.random_parts
        self.state = load_state(spec.folder)
        self.parts = [str(part) for part in self.state["parts"]]
        if spec.base is not None:
            check_folder(spec.base)
        config = spec.base or spec.folder / HF_IN_CHECKPOINT
        if spec.base is None and not (config / "config.json").is_file():
            raise ValueError(
                f"{spec.folder} does not say which model it is of; give --base: the Hugging Face folder that the run "
                "started from (model.hf_path in its recipe.yaml)"
            )
        described, _ = read_hf_config(config)
        self.architecture = folder_architecture(described, config)
        self._dist = TorchDist(spec.folder / TENSORS)
        # The chat layout holds every model; that of transformers refuses the first pixel shuffle.
        rows = exported_rows(self.architecture, "chat")
        self._rows = {row.ours: row for row in rows}
        self._own = {row.ours for row in rows if row.ours.split(".")[0] in self.parts}
        others = set(self._rows) - self._own
        self._base: HfSource | None = None
        if others and not spec.only_stored:
            if spec.base is None:
                raise ValueError(f"{spec.folder} holds {', '.join(self.parts)} only; give --base for the other parts")
            self._base = self._stack.enter_context(HfSpec(spec.base).open())
            self.random_parts |= self._base.random_parts - set(self.parts)
        elif others:
            self._rows = {ours: row for ours, row in self._rows.items() if ours in self._own}
        self._check_arrays(spec.folder)
        self._check_shapes(parameter_shapes(self.architecture), spec.folder)

    def _check_arrays(self, folder: Path) -> None:
        used = {dist_entry(ours, self.architecture).key for ours in self._own}
        stored = {
            key for key in self._dist.array_names() if key.split(".")[0] in self.parts and "_extra_state" not in key
        }
        unused, missing = sorted(stored - used), sorted(used - stored)
        if unused or missing:
            raise ValueError(
                f"{folder} does not fit the model: {len(missing)} arrays are missing {missing[:5]}, {len(unused)} have "
                f"no place in it {unused[:5]}; is --base the model that it was made from?"
            )

    def _check_shapes(self, shapes: Mapping[str, torch.Size], folder: Path) -> None:
        for ours in sorted(self._own):
            shape = self.meta(ours).shape
            if shape != shapes[ours]:
                raise ValueError(
                    f"{folder}: {ours} is {list(shape)} in the checkpoint, which is not the model of config.json: that "
                    f"has {list(shapes[ours])}"
                )

    def names(self) -> list[str]:
        """Return our names of the parameters."""
        return sorted(self._rows)

    def meta(self, ours: str) -> torch.Tensor:
        """Return a parameter without data, without what pads it for the layout it was saved in."""
        if ours not in self._own:
            assert self._base is not None
            return self._base.meta(ours)
        return self._unpadded(ours, self._dist.info(dist_entry(ours, self.architecture)).meta())

    def parameter(self, ours: str) -> torch.Tensor:
        """Read one parameter, without padding."""
        if ours not in self._own:
            assert self._base is not None
            return self._base.parameter(ours)
        digests = self._manifest if self._manifest is not None and self._manifest.tensors else None
        # One checksum is enough: the digest covers the bytes that the CRC-32 does.
        tensor = self._dist.read(dist_entry(ours, self.architecture), check_crc=digests is None)
        if digests is not None:
            digests.check_tensor(ours, tensor)
        return self._unpadded(ours, tensor)

    def stored(self, ours: str) -> StoredTensor | None:
        """Return the place of a parameter that lies in one record, without padding."""
        if ours not in self._own:
            assert self._base is not None
            return self._base.stored(ours)
        place = self._dist.stored(dist_entry(ours, self.architecture))
        if place is None or place.info.shape != self.meta(ours).shape:
            return None
        if self._manifest is None or not self._manifest.tensors:
            return place
        return replace(place, checksum=self._manifest.checksum(ours, place.info))

    def stored_blocks(self, ours: str) -> list[Block]:
        """Return one parameter as blocks of its rows."""
        if ours not in self._own:
            assert self._base is not None
            return self._base.stored_blocks(ours)
        return super().stored_blocks(ours)

    def _unpadded(self, ours: str, tensor: torch.Tensor) -> torch.Tensor:
        """Take zero heads and vocabulary padding off: through the Hugging Face tensors, which have neither."""
        row = self._rows[ours]
        try:
            # Without data first: most parameters have no padding, and need no copy.
            plain = row.to_shard(row.to_hf([tensor.to("meta")]), tensor_rank=0, tensor_size=1)
            if tensor.shape == plain.shape:
                return tensor
            return row.to_shard(row.to_hf([tensor]), tensor_rank=0, tensor_size=1)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{ours} is {list(tensor.shape)} in the checkpoint, which is not the model of config.json: {error}"
            ) from error


@dataclass(frozen=True)
class OverlaySpec:
    """Some parts over a whole model."""

    base: Path
    top: HfSpec
    """Holds some parts only, and takes config.json from the base."""

    def open(self) -> OverlaySource:
        """Open both."""
        return OverlaySource(self)

    def files(self) -> list[Path]:
        """Return the files of both."""
        return [*HfSpec(self.base).files(), *self.top.files()]


class OverlaySource(Source):
    """Two open folders."""

    def __init__(self, spec: OverlaySpec) -> None:
        """Open both; the base describes the model."""
        super().__init__()
        self._base = self._stack.enter_context(HfSpec(spec.base).open())
        self.architecture = self._base.architecture
        self._top = self._stack.enter_context(spec.top.open())
        self._parts = spec.top.parts
        self.random_parts = self._base.random_parts - set(self._parts) | self._top.random_parts & set(self._parts)

    def names(self) -> list[str]:
        """Return our names of the parameters."""
        return self._base.names()

    def _of(self, ours: str) -> HfSource:
        return self._top if ours.split(".")[0] in self._parts else self._base

    def meta(self, ours: str) -> torch.Tensor:
        """Return a parameter without data."""
        return self._of(ours).meta(ours)

    def parameter(self, ours: str) -> torch.Tensor:
        """Read one parameter."""
        return self._of(ours).parameter(ours)

    def blocks(self, ours: str) -> list[torch.Tensor]:
        """Read one parameter as blocks of its rows."""
        return self._of(ours).blocks(ours)

    def stored(self, ours: str) -> StoredTensor | None:
        """Return the place of a parameter."""
        return self._of(ours).stored(ours)

    def stored_blocks(self, ours: str) -> list[Block]:
        """Return one parameter as blocks of its rows."""
        return self._of(ours).stored_blocks(ours)
