"""A whole model spliced from a vision tower, an adapter and a language model, as a source of parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_r1v2.checkpoint.conversion import RunOptions, convert
from megatron_r1v2.checkpoint.destinations import DTYPES, HfCompanions, HfConversion, HfFormat
from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.companions import (
    Components,
    check_companions,
    components_config,
    make_components_companions,
    tokenizer_files,
)
from megatron_r1v2.checkpoint.hf.config import CHAT_TYPES, VISION_TYPES_OF_CHAT
from megatron_r1v2.checkpoint.hf.folders import DEFAULT_SHARD_BYTES, JsonObject, SafetensorsFolder, read_json
from megatron_r1v2.checkpoint.hf.mapping import (
    HF_EMBEDDING,
    HF_OUTPUT,
    Layout,
    MappedParameter,
    canonical_hf_name,
    parameter_map,
)
from megatron_r1v2.checkpoint.hf.refusals import check_tensors
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.sources import TableSource
from megatron_r1v2.models.architecture import R1V2Architecture

_LANGUAGE = "language_model."
_PREFIXES: dict[Layout, dict[str, str]] = {
    "transformers": {"vision": "vision_tower.", "adapter": "multi_modal_projector."},
    "chat": {"vision": "vision_model.", "adapter": "mlp1."},
}


def reassemble(
    components: Components,
    output: Path | str,
    *,
    layout: Layout = "transformers",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    options: RunOptions | None = None,
) -> R1V2Architecture:
    """Write one folder, in transformers' layout one that it loads as InternVLForConditionalGeneration.

    The embedding grows only when the image tokens do not fit into it; new rows are the mean of the others.

    Args:
        options: the way that the conversion is run; None: quietly.

    Raises:
        ValueError: a component is missing something, has something else, or does not fit the others.
    """
    spec = ComponentsSpec(components, components_config(components))
    check_companions(components.language)
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names[components.dtype] if components.dtype else ""
    conversion = HfConversion(spec, tuple(spec.folders()), HfFormat(layout, dtype, max_shard_bytes))

    def write(folder: Path, dtypes: set[torch.dtype]) -> None:
        make_components_companions(components, spec.config, folder, layout, dtypes)

    convert(conversion, Path(output), options or RunOptions(quiet=True), HfCompanions(write))
    return r1v2_architecture(spec.config)


@dataclass(frozen=True)
class ComponentsSpec:
    """Components, and the configuration of the whole."""

    components: Components
    config: JsonObject

    def open(self) -> ComponentsSource:
        """Open all components."""
        return ComponentsSource(self)

    def folders(self) -> list[Path]:
        """Return the components' folders."""
        adapter = [self.components.adapter] if self.components.adapter else []
        return [self.components.vision, self.components.language, *adapter]

    def files(self) -> list[Path]:
        """Return the files that are read, tokenizer included."""
        found = tokenizer_files(self.components.language)
        for folder in self.folders():
            with SafetensorsFolder(folder) as opened:
                found += opened.paths()
            found += [folder / "config.json"] if (folder / "config.json").is_file() else []
        return found


def _random_parts(adapter: Path | None) -> frozenset[str]:
    """Return whether the adapter is random: drawn here, or in the folder that it comes from."""
    if adapter is None:
        return frozenset({"adapter"})
    manifest = Manifest.of(adapter)
    return manifest.random_parts & {"adapter"} if manifest is not None else frozenset()


class ComponentsSource(TableSource):
    """Open components."""

    def __init__(self, spec: ComponentsSpec) -> None:
        """Open the components and compare their tensors with the table.

        Raises:
            ValueError: tensors are left over or missing, or dtypes differ.
        """
        super().__init__()
        self.architecture = r1v2_architecture(spec.config)
        self._components = spec.components
        self.random_parts = _random_parts(spec.components.adapter)
        self._found: dict[str, tuple[SafetensorsFolder, str]] = {}
        try:
            layouts: dict[str, Layout] = {
                "vision": self._open_vision(),
                "adapter": self._open_adapter(),
                "language": self._open_language(),
            }
            self._rows = self._rows_of(layouts)
            self._check_dtypes()
            self._check_shapes()
        except ValueError:
            self._stack.close()
            raise

    def _folder_of(self, ours: str) -> Path:
        folders = {part: getattr(self._components, part) for part in ("vision", "language", "adapter")}
        return folders[ours.split(".")[0]] or Path("the random adapter")

    def _open(self, path: Path) -> SafetensorsFolder:
        folder = self._stack.enter_context(SafetensorsFolder(path))
        check_tensors(folder.dtypes(), path)
        return folder

    def _open_vision(self) -> Layout:
        folder = self._open(self._components.vision)
        model_type = read_json(self._components.vision / "config.json").get("model_type")
        layout: Layout = "chat" if model_type in VISION_TYPES_OF_CHAT else "transformers"
        prefix = _PREFIXES[layout]["vision"]
        # The folder of a whole model serves as well: its tower alone is taken.
        whole = model_type in ("internvl", *CHAT_TYPES)
        for stored in folder.names():
            name = prefix + stored
            if whole:
                name = canonical_hf_name(stored) if layout == "transformers" else stored
            if name.startswith(prefix):
                self._found[name] = (folder, stored)
        return layout

    def _open_adapter(self) -> Layout:
        if self._components.adapter is None:
            return "transformers"
        folder = self._open(self._components.adapter)
        layout: Layout = "transformers"
        for stored in folder.names():
            name = canonical_hf_name(stored)
            for candidate, prefixes in _PREFIXES.items():
                if name.startswith(prefixes["adapter"]):
                    self._found[name] = (folder, stored)
                    layout = candidate
        return layout

    def _open_language(self) -> Layout:
        folder = self._open(self._components.language)
        for stored in folder.names():
            # Old Llama files hold the rotations too, which nobody reads: they follow from the configuration.
            if not stored.endswith(".rotary_emb.inv_freq"):
                self._found[_LANGUAGE + stored] = (folder, stored)
        if self.architecture.language.tied_embeddings and HF_EMBEDDING not in self._found and HF_OUTPUT in self._found:
            self._found[HF_EMBEDDING] = self._found.pop(HF_OUTPUT)
        if self._components.untie_embeddings and HF_EMBEDDING in self._found:
            self._found.setdefault(HF_OUTPUT, self._found[HF_EMBEDDING])
        return "transformers"

    def _rows_of(self, layouts: dict[str, Layout]) -> dict[str, MappedParameter]:
        # The second pixel shuffle is a matter of the result's layout, not of the components'.
        tables = {layout: parameter_map(_with_v2(self.architecture), layout) for layout in set(layouts.values())}
        rows = {
            row.ours: row
            for part, layout in layouts.items()
            for row in tables[layout]
            if row.exported and row.ours.startswith(f"{part}.")
        }
        read = {name for row in rows.values() for name in row.hf}
        drawn = self._components.adapter is None
        missing = sorted(
            name for name in read - set(self._found) if not (drawn and name.startswith("multi_modal_projector."))
        )
        repeated = {HF_OUTPUT} if self.architecture.language.tied_embeddings else set()
        unused = sorted(set(self._found) - read - repeated)
        if unused or missing:
            raise ValueError(
                f"the components do not make an InternVL model: {len(unused)} tensors have no place in it "
                f"{unused[:5]}, {len(missing)} are missing {missing[:5]}; check --vision, --adapter and --language"
            )
        return rows

    def _check_dtypes(self) -> None:
        if self._components.dtype is not None:
            return
        found = {folder.folder.name: folder.info(stored).dtype for folder, stored in self._found.values()}
        if len({folder.info(stored).dtype for folder, stored in self._found.values()}) > 1:
            raise ValueError(f"the components differ in dtype: {found}; choose one with --dtype")

    def _num_rows(self, name: str) -> int:
        return self.architecture.language.vocab_size if name in (HF_EMBEDDING, HF_OUTPUT) else 0

    def _meta(self, name: str) -> torch.Tensor:
        if name not in self._found:
            return torch.empty(self._drawn_shape(name), dtype=self._drawn_dtype(), device="meta")
        folder, stored = self._found[name]
        return _grown(folder.info(stored).meta(), self._num_rows(name))

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._found:
            return self._drawn(name)
        folder, stored = self._found[name]
        return _grown(folder.tensor(stored), self._num_rows(name))

    def _drawn(self, name: str) -> torch.Tensor:
        """Draw a parameter of the adapter as transformers initialises it; each has a seed of its own."""
        shape, dtype = self._drawn_shape(name), self._drawn_dtype()
        if len(shape) == 1:
            return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
        offset = 1 if "linear_2" in name else 0
        generator = torch.Generator().manual_seed(2 * self._components.seed + offset)
        return (0.02 * torch.randn(shape, generator=generator)).to(dtype)

    def _drawn_shape(self, name: str) -> tuple[int, ...]:
        inputs, hidden = self.architecture.adapter_input_size, self.architecture.language.hidden_size
        layer, kind = name.removeprefix("multi_modal_projector.").split(".")
        if layer == "layer_norm":
            return (inputs,)
        return (hidden,) if kind == "bias" else (hidden, hidden if layer == "linear_2" else inputs)

    def _drawn_dtype(self) -> torch.dtype:
        folder, stored = self._found[HF_EMBEDDING]
        return folder.info(stored).dtype


def _with_v2(architecture: R1V2Architecture) -> R1V2Architecture:
    return replace(architecture, pixel_shuffle="v2")


def _grown(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - matrix.shape[0]
    if missing <= 0:
        return matrix
    # In fp32: a sum of 150,000 rows in bf16 would stop growing.
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(missing, -1)])
