"""The two destinations of a conversion: a Hugging Face folder in either layout, and a torch_dist checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.conversion import Piece, Rest, RunOptions, run_job
from megatron_r1v2.checkpoint.hf.companions import check_companions, make_companions
from megatron_r1v2.checkpoint.hf.folders import DEFAULT_SHARD_BYTES, INDEX_NAME, SINGLE_NAME, write_json
from megatron_r1v2.checkpoint.hf.mapping import Layout
from megatron_r1v2.checkpoint.hf.safetensors_files import (
    TensorInfo,
    map_safetensors_file,
    tensor_info,
    write_safetensors_file,
)
from megatron_r1v2.checkpoint.manifest import tensor_entry, write_manifest
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import STATE_FILE, TENSORS
from megatron_r1v2.checkpoint.megatron.torch_dist import Record, read_records, write_index, write_records
from megatron_r1v2.checkpoint.sources import HF_IN_CHECKPOINT, SourceSpec, exported_rows
from megatron_r1v2.checkpoint.tensor_files import DIGEST
from megatron_r1v2.models.architecture import R1V2Architecture

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_DIST_FILE_BYTES = 2 * 1000**3
_PARTS = ("adapter", "language", "vision")


@dataclass(frozen=True)
class HfJob:
    """A Hugging Face folder made from a source."""

    source: SourceSpec
    layout: Layout
    folders: tuple[Path, ...]
    """Folders that the source reads."""
    dtype: str = ""
    """A key of DTYPES; empty: the source's."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    parts: tuple[str, ...] = ()
    """Only these parts; none: all."""

    def pieces(self) -> list[Piece]:
        """Return the safetensors files."""
        made: list[_Parameter] = []
        with self.source.open() as source:
            for row in exported_rows(source.architecture, self.layout):
                if not self.parts or row.ours.split(".")[0] in self.parts:
                    tensors = row.to_hf([_cast(row.ours, source.meta(row.ours), self.dtype)])
                    made.append((row.ours, tuple((name, tensor_info(tensor)) for name, tensor in tensors.items())))
        groups = _grouped(made, self.max_shard_bytes)
        if len(groups) == 1:
            return [_piece(SINGLE_NAME, groups[0])]
        names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
        return [_piece(name, group) for name, group in zip(names, groups, strict=True)]

    def write(self, piece: Piece, folder: Path, wrote: Callable[[int], None]) -> dict[str, Any]:
        """Write one safetensors file."""
        with self.source.open() as source:
            rows = {row.ours: row for row in exported_rows(source.architecture, self.layout)}
            tensors = (
                tensor
                for ours in piece.parameters
                for tensor in rows[ours].to_hf([_cast(ours, source.parameter(ours), self.dtype)]).values()
            )
            digests = write_safetensors_file(folder / piece.name, piece.tensors, tensors, wrote=wrote)
        return {"tensors": {name: tensor_entry(info, digests[name], DIGEST) for name, info in piece.tensors}}

    def tensors(self, piece: Piece, folder: Path, record: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a written file again."""
        yield from map_safetensors_file(folder / piece.name).items()

    def describe(self) -> dict[str, Any]:
        """Return the options."""
        return _described(self)

    def sources(self) -> list[Path]:
        """Return the files that are read."""
        return self.source.files()

    def source_folders(self) -> list[Path]:
        """Return the folders that are read."""
        return list(self.folders)


@dataclass(frozen=True)
class DistJob:
    """A torch_dist checkpoint of the weights made from a source; any layout loads it."""

    source: SourceSpec
    folders: tuple[Path, ...]
    dtype: str = ""
    max_file_bytes: int = _MAX_DIST_FILE_BYTES

    def pieces(self) -> list[Piece]:
        """Return the files of records."""
        made: list[_Parameter] = []
        with self.source.open() as source:
            for row in exported_rows(source.architecture, "chat"):
                info = tensor_info(_cast(row.ours, source.meta(row.ours), self.dtype))
                made.append((row.ours, ((row.ours, info),)))
            _check_stacks({ours: info for ours, ((_, info),) in made}, source.architecture)
        groups = _grouped(made, self.max_file_bytes)
        return [_piece(f"{TENSORS}/__{number}_0.distcp", group) for number, group in enumerate(groups)]

    def write(self, piece: Piece, folder: Path, wrote: Callable[[int], None]) -> dict[str, Any]:
        """Write one file of records."""
        path = folder / piece.name
        path.parent.mkdir(exist_ok=True)
        with self.source.open() as source:
            entries = [(dist_entry(ours, source.architecture), info) for ours, info in piece.tensors]
            tensors = ([_cast(ours, block, self.dtype) for block in source.blocks(ours)] for ours in piece.parameters)
            records = write_records(path, entries, tensors, wrote=wrote)
        return {
            "tensors": {
                ours: {**tensor_entry(info, digest, DIGEST), "record": dataclasses.astuple(record)}
                for (ours, info), (record, digest) in zip(piece.tensors, records, strict=True)
            }
        }

    def tensors(self, piece: Piece, folder: Path, record: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a written file again."""
        places = [(ours, Record(*entry["record"])) for ours, entry in record["tensors"].items()]
        yield from zip(
            (ours for ours, _ in places), read_records(folder / piece.name, [at for _, at in places]), strict=True
        )

    def describe(self) -> dict[str, Any]:
        """Return the options."""
        return _described(self)

    def sources(self) -> list[Path]:
        """Return the files that are read."""
        return self.source.files()

    def source_folders(self) -> list[Path]:
        """Return the folders that are read."""
        return list(self.folders)


def finish_hf(layout: Layout, companions: Callable[[Path, set[torch.dtype]], None]) -> Rest:
    """Return what completes a Hugging Face folder: index, companions and checksums.

    Args:
        layout: of the folder.
        companions: writes config.json, tokenizer and processor, given the folder and the weights' dtypes.
    """
    return _HfRest(layout, companions)


@dataclass(frozen=True)
class _HfRest:
    layout: Layout
    companions: Callable[[Path, set[torch.dtype]], None]

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        self.companions(folder, dtypes)

    def finish(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        tensors = {name: entry for record in records.values() for name, entry in record["tensors"].items()}
        if len(records) > 1:
            where = {name: file for file, record in records.items() for name in record["tensors"]}
            total = sum(_info(entry).num_bytes for entry in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_json(folder / INDEX_NAME, content)
        write_manifest(folder, self.layout, tensors)


def write_hf(job: HfJob, output: Path, *, companions: Path, options: RunOptions) -> None:
    """Write a Hugging Face folder that is complete: weights, config.json, tokenizer, processor, checksums.

    Args:
        job: the weights.
        output: the folder to make.
        companions: folder with config.json, tokenizer and processor, in either layout.
        options: how.

    Raises:
        ValueError: see `check_companions` and `run_job`.
    """
    check_companions(companions)
    run_job(
        job,
        output,
        options,
        finish_hf(job.layout, lambda folder, dtypes: make_companions(companions, folder, job.layout, dtypes)),
    )


def write_checkpoint(job: DistJob, output: Path, *, companions: Path, options: RunOptions) -> None:
    """Write a torch_dist checkpoint of all parts, with config.json, tokenizer and processor beside it.

    Args:
        job: the weights.
        output: the folder to make.
        companions: folder with config.json, tokenizer and processor.
        options: how.

    Raises:
        ValueError: see `check_companions` and `run_job`.
    """
    check_companions(companions)

    run_job(job, output, options, _DistRest(job, companions))


@dataclass(frozen=True)
class _DistRest:
    job: DistJob
    companions: Path

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        (folder / HF_IN_CHECKPOINT).mkdir()
        make_companions(self.companions, folder / HF_IN_CHECKPOINT, None, dtypes)
        torch.save({"step": 0, "version": 0, "parts": list(_PARTS), "trained": []}, folder / STATE_FILE)

    def finish(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        tensors = {name: entry for record in records.values() for name, entry in record["tensors"].items()}
        with self.job.source.open() as source:
            architecture = source.architecture
        indexed = []
        for ours, entry in tensors.items():
            indexed.append((dist_entry(ours, architecture), _info(entry), Record(*entry.pop("record"))))
        write_index(folder / TENSORS, indexed)
        write_manifest(folder, "torch_dist", tensors)


def _info(entry: dict[str, Any]) -> TensorInfo:
    return TensorInfo(getattr(torch, entry["dtype"]), tuple(entry["shape"]))


_Parameter = tuple[str, tuple[tuple[str, TensorInfo], ...]]
"""Our name, and what is written of it."""


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


def _piece(name: str, parameters: list[_Parameter]) -> Piece:
    # Wide ones first: readers map a tensor where it lies, which must be a multiple of its item size.
    ordered = sorted(parameters, key=lambda parameter: -parameter[1][0][1].dtype.itemsize)
    return Piece(name, tuple(ours for ours, _ in ordered), tuple(tensor for _, made in ordered for tensor in made))


def _cast(ours: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    if not dtype:
        return tensor
    cast = tensor.to(DTYPES[dtype])
    if cast.is_meta or not cast.numel() or all(bound.isfinite() for bound in cast.aminmax()):
        return cast
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
            told = [f"{name} is {parameters[name].dtype} {list(parameters[name].shape)}" for name in (other, ours)]
            raise ValueError(
                f"{' and '.join(told)}: torch_dist keeps all layers in one array of one dtype and shape; give --dtype"
            )


def _described(job: Any) -> dict[str, Any]:
    described = {key: str(value) for key, value in dataclasses.asdict(job).items()}
    return {"kind": type(job).__name__, **described}
