"""The two destinations of a conversion: a Hugging Face folder in either layout, and a torch_dist checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1v2.checkpoint.conversion import Conversion, FileRecord, OutputFile, RunOptions, convert
from megatron_r1v2.checkpoint.hf.companions import check_companions, make_companions
from megatron_r1v2.checkpoint.hf.folders import DEFAULT_SHARD_BYTES, INDEX_NAME, SINGLE_NAME
from megatron_r1v2.checkpoint.hf.mapping import Layout, MappedParameter
from megatron_r1v2.checkpoint.hf.safetensors_files import map_safetensors_file, write_safetensors_file
from megatron_r1v2.checkpoint.manifest import (
    ALL_PARTS,
    TensorEntry,
    entry_info,
    file_entries,
    tensor_entry,
    write_manifest,
)
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import HF_IN_CHECKPOINT, TENSORS, save_state
from megatron_r1v2.checkpoint.megatron.torch_dist import Record, read_records, write_index, write_records
from megatron_r1v2.checkpoint.model_card import CARD
from megatron_r1v2.checkpoint.sources import Source, exported_rows
from megatron_r1v2.checkpoint.stored_tensors import Block, rearranged
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, tensor_info
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.resilience.files import write_file, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_DIST_FILE_BYTES = 2 * 1000**3


@dataclass(frozen=True)
class HfFormat:
    """The form of a Hugging Face folder."""

    layout: Layout
    dtype: str = ""
    """A key of DTYPES; empty: the source's."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True)
class HfConversion(Conversion):
    """A Hugging Face folder made from a source."""

    form: HfFormat
    parts: tuple[str, ...] = ()
    """Only these parts; none: all."""

    def output_files(self) -> list[OutputFile]:
        """Return the safetensors files."""
        parameters: list[_Parameter] = []
        with self.source.open() as source:
            for row in exported_rows(source.architecture, self.form.layout):
                if not self.parts or row.ours.split(".")[0] in self.parts:
                    tensors = row.to_hf([_cast(row.ours, source.meta(row.ours), self.form.dtype)])
                    infos = tuple((name, tensor_info(tensor)) for name, tensor in tensors.items())
                    parameters.append((row.ours, infos))
        groups = _grouped(parameters, self.form.max_shard_bytes)
        # As transformers writes it: a single file has no index.
        if len(groups) == 1:
            return [_output_file(SINGLE_NAME, groups[0])]
        names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
        return [_output_file(name, group) for name, group in zip(names, groups, strict=True)]

    def write(self, file: OutputFile, folder: Path, wrote: Callable[[int], None]) -> FileRecord:
        """Write one safetensors file."""
        with self.source.open() as source:
            rows = {row.ours: row for row in exported_rows(source.architecture, self.form.layout)}
            made = (blocks for ours in file.parameters for blocks in self._hf_blocks(source, rows[ours]))
            digests = write_safetensors_file(folder / file.name, file.tensors, made, wrote=wrote)
        return {"tensors": {name: tensor_entry(info, digests[name]) for name, info in file.tensors}}

    def _hf_blocks(self, source: Source, row: MappedParameter) -> Sequence[Sequence[Block]]:
        """Return the tensors of a row, each as blocks of its rows, which stay in the file where that is possible."""
        stored = None if self.form.dtype else source.stored(row.ours)
        if stored is None:
            return row.hf_blocks(_cast(row.ours, source.parameter(row.ours), self.form.dtype))
        return rearranged([stored], source.reader, lambda parts: row.hf_blocks(parts[0]))

    def read_back(self, file: OutputFile, folder: Path, record: FileRecord) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ARG002
        """Read a written file again."""
        yield from map_safetensors_file(folder / file.name).items()


@dataclass(frozen=True)
class TorchDistConversion(Conversion):
    """A torch_dist checkpoint of the weights made from a source; any layout loads it."""

    dtype: str = ""
    """A key of DTYPES; empty: the source's."""
    max_file_bytes: int = _MAX_DIST_FILE_BYTES

    def output_files(self) -> list[OutputFile]:
        """Return the files of records."""
        parameters: list[_Parameter] = []
        with self.source.open() as source:
            # The chat layout holds every model; that of transformers refuses the first pixel shuffle.
            for row in exported_rows(source.architecture, "chat"):
                info = tensor_info(_cast(row.ours, source.meta(row.ours), self.dtype))
                parameters.append((row.ours, ((row.ours, info),)))
            _check_stacks({ours: info for ours, ((_, info),) in parameters}, source.architecture)
        groups = _grouped(parameters, self.max_file_bytes)
        return [_output_file(f"{TENSORS}/__{number}_0.distcp", group) for number, group in enumerate(groups)]

    def write(self, file: OutputFile, folder: Path, wrote: Callable[[int], None]) -> FileRecord:
        """Write one file of records."""
        path = folder / file.name
        path.parent.mkdir(exist_ok=True)
        with self.source.open() as source:
            entries = [(dist_entry(ours, source.architecture), info) for ours, info in file.tensors]
            made = (self._blocks(source, ours) for ours in file.parameters)
            written = write_records(path, entries, made, wrote=wrote)
        found = list(zip(file.tensors, written, strict=True))
        return {
            "tensors": {ours: tensor_entry(info, digest) for (ours, info), (_, digest) in found},
            "places": {ours: [place.file, place.offset, place.length] for (ours, _), (place, _) in found},
        }

    def _blocks(self, source: Source, ours: str) -> Sequence[Block]:
        if not self.dtype:
            return source.stored_blocks(ours)
        return [_cast(ours, block, self.dtype) for block in source.blocks(ours)]

    def read_back(self, file: OutputFile, folder: Path, record: FileRecord) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a written file again."""
        places = _places(record)
        yield from zip(places, read_records(folder / file.name, places.values()), strict=True)


@dataclass(frozen=True)
class HfCompanions:
    """The index, config.json, tokenizer, processor and manifest of a Hugging Face folder."""

    write: Callable[[Path, set[torch.dtype]], None]
    """Writes config.json, tokenizer and processor, given the folder and the weights' dtypes."""

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        """Write config.json, tokenizer and processor."""
        self.write(folder, dtypes)

    def finish(self, folder: Path, records: Mapping[str, FileRecord], random_parts: Collection[str]) -> None:
        """Write the index and the manifest."""
        tensors = _tensors(records)
        if len(records) > 1:
            where = {name: file for file, record in records.items() for name in record["tensors"]}
            total = sum(entry_info(entry).num_bytes for entry in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_json(folder / INDEX_NAME, content)
        write_manifest(folder, file_entries(folder), tensors, random_parts=random_parts)


@dataclass(frozen=True)
class TorchDistCompanions:
    """The index and the state of a checkpoint, and the companions of the model in a folder of it."""

    conversion: TorchDistConversion
    source: Path
    """Folder with config.json, tokenizer and processor."""

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        """Write config.json, tokenizer, processor and state."""
        (folder / HF_IN_CHECKPOINT).mkdir()
        make_companions(self.source, folder / HF_IN_CHECKPOINT, None, dtypes)
        save_state(folder, {"step": 0, "version": 0, "parts": list(ALL_PARTS), "trained": []})

    def finish(self, folder: Path, records: Mapping[str, FileRecord], random_parts: Collection[str]) -> None:
        """Write the index and the manifest."""
        tensors = _tensors(records)
        with self.conversion.source.open() as source:
            architecture = source.architecture
        places = {name: place for record in records.values() for name, place in _places(record).items()}
        indexed = [(dist_entry(ours, architecture), entry_info(entry), places[ours]) for ours, entry in tensors.items()]
        write_index(folder / TENSORS, indexed)
        write_manifest(folder, file_entries(folder), tensors, random_parts=random_parts)


def write_hf(
    conversion: HfConversion, output: Path, *, companions: Path, options: RunOptions, card: str | None = None
) -> None:
    """Write a Hugging Face folder that is complete: weights, config.json, tokenizer, processor, checksums.

    Args:
        card: text of README.md; None: no such file.

    Raises:
        ValueError: see `check_companions` and `convert`.
    """
    check_companions(companions)

    def write(folder: Path, dtypes: set[torch.dtype]) -> None:
        make_companions(companions, folder, conversion.form.layout, dtypes)
        if card is not None:
            write_file(folder / CARD, card)

    convert(conversion, output, options, HfCompanions(write))


def write_checkpoint(conversion: TorchDistConversion, output: Path, *, companions: Path, options: RunOptions) -> None:
    """Write a torch_dist checkpoint of all parts, with config.json, tokenizer and processor beside it.

    Raises:
        ValueError: see `check_companions` and `convert`.
    """
    check_companions(companions)
    convert(conversion, output, options, TorchDistCompanions(conversion, companions))


_Parameter = tuple[str, tuple[tuple[str, TensorInfo], ...]]
"""Our name, and name, shape and dtype of the tensors that are written of it."""


def _tensors(records: Mapping[str, FileRecord]) -> dict[str, TensorEntry]:
    return {name: entry for record in records.values() for name, entry in record["tensors"].items()}


def _places(record: FileRecord) -> dict[str, Record]:
    places = record["places"]
    return {ours: Record(str(file), int(offset), int(length)) for ours, (file, offset, length) in places.items()}


def _grouped(parameters: list[_Parameter], limit: int) -> list[list[_Parameter]]:
    """Cut a list into files of at most so many bytes, where no parameter is larger."""
    groups: list[list[_Parameter]] = [[]]
    total = 0
    for parameter in parameters:
        size = sum(info.num_bytes for _, info in parameter[1])
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(parameter)
        total += size
    return groups


def _output_file(name: str, parameters: list[_Parameter]) -> OutputFile:
    # Wide ones first: readers map a tensor where it lies, which must be a multiple of its item size.
    ordered = sorted(parameters, key=lambda parameter: -parameter[1][0][1].dtype.itemsize)
    return OutputFile(name, tuple(ours for ours, _ in ordered), tuple(tensor for _, made in ordered for tensor in made))


def _cast(ours: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    if not dtype:
        return tensor
    cast = tensor.to(DTYPES[dtype])
    # One pass, without a mask as large as the tensor: a bound is not finite where any number is not.
    if cast.is_meta or not cast.numel() or all(bound.isfinite() for bound in cast.aminmax()):
        return cast
    # What was infinite in the source may stay so.
    finite = tensor[tensor.isfinite()].double()
    if cast.isfinite().sum() < len(finite):
        largest = finite.abs().max().item()
        fitting = [name for name, other in DTYPES.items() if largest <= torch.finfo(other).max]
        raise ValueError(
            f"{ours} reaches {largest:.4g}, beyond the {torch.finfo(cast.dtype).max:.4g} of --dtype={dtype}: it would "
            f"become infinite; accepted: {', '.join(fitting) or 'its own dtype, without --dtype'}"
        )
    return cast


def _check_stacks(parameters: Mapping[str, TensorInfo], architecture: R1V2Architecture) -> None:
    """Refuse layers that differ: torch_dist stacks them in one array, of one dtype and shape."""
    first: dict[str, str] = {}
    for ours, info in parameters.items():
        other = first.setdefault(dist_entry(ours, architecture).key, ours)
        if parameters[other] != info:
            found = [f"{name} is {parameters[name].dtype} {list(parameters[name].shape)}" for name in (other, ours)]
            raise ValueError(
                f"{' and '.join(found)}: torch_dist keeps all layers in one array of one dtype and shape; give --dtype"
            )
