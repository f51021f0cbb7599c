"""LoRA adapters in PEFT's layout as experts: read without PEFT, held as their factors, never written out.

An adapter is accepted if what it does is exactly base + scaling * B A (and whole tensors that it saved beside the
factors); every other kind is refused by name. Factors follow the names of the model's modules; those of an adapter
trained with an older transformers are renamed as that library renames the tensors of checkpoints.
Reference: Hu et al. 2022, arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA), arxiv.org/abs/2312.03732; PEFT 0.21.2.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from evomerge.errors import CheckpointError
from evomerge.kernels.layout import Layout
from evomerge.kernels.sources import LowRank
from evomerge.materialize.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    Header,
    find_folder,
    open_checkpoint,
    read_json,
    read_safetensors_header,
    still_there,
)
from evomerge.materialize.resident import tensor_index

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""init_lora_weights that leave the base alone. The others subtract from it what the adapter starts with."""

READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})

WITHOUT_EFFECT = frozenset(
    {
        # What the tensors themselves show: which modules have factors, and whole tensors beside them.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
        "fan_in_fan_out",  # the module's class says it; PEFT corrects the configuration by it, too
        # What matters in training only, or not at all.
        *("lora_dropout", "task_type", "inference_mode", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
        *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    }
)

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<part>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<of_embedding>[AB])(?:\.[^.]+)?)$"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one matrix: their names in the file, the scaling, and whether the product is transposed."""

    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder in PEFT's layout that fits a base: tensors of the model -> factors, or a whole tensor in the file."""

    name: str
    folder: Path
    pairs: Mapping[str, Pair]
    whole: Mapping[str, str]
    num_elements: int

    @property
    def size_bytes(self) -> int:
        """Memory of the factors, float32."""
        return 4 * self.num_elements


def open_expert(name: str, location: str | Path, model: nn.Module) -> Checkpoint | Adapter:
    """Open a checkpoint or an adapter, by a local folder or a Hugging Face id; ``model`` is the base's (no weights).

    Raises: CheckpointError if there is none, it cannot be read, or it is an adapter that does not fit the model.
    """
    folder = find_folder(name, location)
    if not (folder / CONFIG).is_file():
        return open_checkpoint(name, folder)
    if (folder / "config.json").is_file() and list(folder.glob("model*.safetensors*")):
        raise CheckpointError(f"{name}: {folder} holds a checkpoint and an adapter; give each a folder of its own")
    if not (folder / WEIGHTS).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*"))) or "none"
        raise CheckpointError(
            f"{name}: expected {WEIGHTS} in {folder}, found {others}; pickled weights are not read: save the adapter "
            "again with PEFT"
        )
    config = _read_config(name, folder)
    header = read_safetensors_header(name, folder / WEIGHTS)
    if flawed := sorted(key for key, (_, dtype) in header.items() if dtype not in FLOAT_DTYPES):
        raise CheckpointError(
            f"{name}: {flawed[0]} is {header[flawed[0]][1]}; expected tensors of {', '.join(FLOAT_DTYPES)}"
        )
    return _Fit(name, config, header, model).adapter(folder)


def load_adapter(adapter: Adapter, layout: Layout, base_P: Tensor) -> LowRank:
    """Read the factors (float32) to the device of ``base_P``; a whole tensor becomes its difference from the base.

    Whole tensors are rounded to the base's dtype first, as a checkpoint's would be.
    Raises: CheckpointError if a tensor holds a NaN or an infinity.
    """
    numbers = {tensor.name: s for s, tensor in enumerate(layout.tensors)}
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    scalings: dict[int, float] = {}
    with still_there(adapter.name, adapter.folder), safe_open(adapter.folder / WEIGHTS, "pt") as file:

        def read(key: str, dtype: torch.dtype = torch.float32) -> Tensor:
            tensor: Tensor = file.get_tensor(key).to(base_P.device, dtype)
            if not bool(tensor.isfinite().all()):
                raise CheckpointError(f"{adapter.name}: {key} holds a NaN or an infinity; the adapter is damaged")
            return tensor

        for name, pair in adapter.pairs.items():
            b, a = read(pair.b).flatten(1) * pair.scaling, read(pair.a).flatten(1)
            s = numbers[name]
            factors[s] = (a.T.contiguous(), b.T.contiguous()) if pair.transposed else (b, a)
            scalings[s] = pair.scaling
        for name, key in adapter.whole.items():
            s = numbers[name]
            difference_E = read(key, base_P.dtype).float().flatten() - base_P[layout.segments[s]].float()
            if not bool(difference_E.any()):
                continue  # PEFT saves embeddings that have factors as they are, too
            if scalings.pop(s, None) is not None:
                b, a = factors[s]
                difference_E += (b @ a).flatten()
            factors[s] = difference_E[:, None], torch.ones(1, 1, device=base_P.device)
    transposed = frozenset(numbers[name] for name, pair in adapter.pairs.items() if pair.transposed)
    return LowRank(factors, scalings, transposed)


def factors_hash(expert: LowRank, layout: Layout) -> str:
    """SHA-256 of an adapter's factors and of the tensors' names that they belong to."""
    found = hashlib.sha256()
    for s, factors in sorted(expert.factors.items()):
        found.update(layout.tensors[s].name.encode())
        for factor in factors:
            found.update(str(tuple(factor.shape)).encode())
            found.update(factor.cpu().numpy().data)
    return found.hexdigest()


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the configuration. Raises: CheckpointError if it says more than ``base + scaling * B A``."""
    config = read_json(name, folder / CONFIG)
    where = f"{name}: {folder / CONFIG}"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type: expected LORA, found {config.get('peft_type')!r}")
    for key, value in config.items():
        if value and key not in READ | WITHOUT_EFFECT:
            raise CheckpointError(
                f"{where}: {key}: {str(value)[:60]}: such an adapter is more than base + B A; merge it into a "
                "checkpoint with PEFT (merge_and_unload) and name that as the expert"
            )
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise CheckpointError(
            f"{where}: init_lora_weights: {config['init_lora_weights']}: its factors belong to a base that the "
            "initialization changed; convert it to a plain adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {key}: expected a mapping, found {patterns!r}")
        numbers |= {f"{key}.{pattern}": number for pattern, number in patterns.items()}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < abs(number) < math.inf:
            raise CheckpointError(f"{where}: {key}: expected a number other than 0, found {number!r}")
    return config


@dataclass(frozen=True)
class _Fit:
    """What is needed to find an adapter's place in a model."""

    name: str
    config: Mapping[str, Any]
    header: Header
    model: nn.Module

    def adapter(self, folder: Path) -> Adapter:
        """Return the adapter, every tensor of its file in its place. Raises: CheckpointError."""
        found: dict[str, dict[str, str]] = {}
        pairs: dict[str, Pair] = {}
        whole: dict[str, str] = {}
        for key in self.header:
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if match := _FACTOR.match(name):
                place, part = found.setdefault(match["module"], {}), match["part"] or match["of_embedding"]
            else:
                place, part = whole, self._whole(key, name)
            if place.setdefault(part, key) != key:
                raise CheckpointError(f"{self.name}: {key} and {place[part]} are the same tensor of two adapters")
        for module, factors in found.items():
            tensor = self._tensor(next(iter(factors.values())), f"{module}.weight")
            pairs[tensor] = self._pair(module, tensor, factors)
        if not pairs:
            raise CheckpointError(f"{self.name}: {folder / WEIGHTS} holds no LoRA factors")
        num_elements = sum(math.prod(shape) for shape, _ in self.header.values())
        return Adapter(self.name, folder, pairs, whole, num_elements)

    def _whole(self, key: str, name: str) -> str:
        """Return the model's name of a tensor that was saved beside the factors."""
        tensor = self._tensor(key, name)
        if self.header[key][0] != self.shapes[tensor]:
            raise CheckpointError(
                f"{self.name}: {key}: expected shape {self.shapes[tensor]} as in the base, found {self.header[key][0]}"
            )
        return tensor

    def _pair(self, module: str, tensor: str, factors: Mapping[str, str]) -> Pair:
        from transformers.pytorch_utils import Conv1D

        if factors.keys() != {"A", "B"}:
            raise CheckpointError(f"{self.name}: {module}: expected lora_A and lora_B, found {', '.join(factors)} only")
        a, b = factors["A"], factors["B"]
        a_shape, b_shape = self.header[a][0], self.header[b][0]
        of_embedding = "lora_embedding_" in a
        transposed = of_embedding or isinstance(self.model.get_submodule(tensor.rpartition(".")[0]), Conv1D)
        rows, *columns = self.shapes[tensor]
        expected = (math.prod(columns), rows) if transposed else (rows, math.prod(columns))
        if len(a_shape) < 2 or len(b_shape) < 2 or (b_shape[0], math.prod(a_shape[1:])) != expected:
            raise CheckpointError(
                f"{self.name}: {module}: expected factors of a matrix {self.shapes[tensor]} as in the base, found B "
                f"{b_shape} and A {a_shape}; an adapter must be of the same base (same vocabulary)"
            )
        rank = self._number("r", "rank_pattern", module)
        if not rank == a_shape[0] == math.prod(b_shape[1:]):
            raise CheckpointError(
                f"{self.name}: {module}: expected rank {rank} as in {CONFIG}, found B {b_shape} and A {a_shape}"
            )
        alpha = self._number("lora_alpha", "alpha_pattern", module)
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Pair(a, b, scaling, transposed)

    def _number(self, key: str, patterns: str, module: str) -> Any:
        """Return what the configuration says of a module: the first pattern that its name ends in, or the default."""
        for pattern, number in (self.config.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return number
            except re.error as error:
                raise CheckpointError(f"{self.name}: {CONFIG}: {patterns}.{pattern}: {error}") from error
        return self.config[key]

    def _tensor(self, key: str, name: str) -> str:
        """Return the model's name of a tensor that the adapter changes."""
        if name not in self.shapes and name not in self.tied:
            name = self._renamed(name)
        if name in self.tied:
            raise CheckpointError(
                f"{self.name}: {key}: {name} is tied to another tensor of the base, and the adapter changes only "
                "one of them; untie them in the base and save it again (tie_word_embeddings: false)"
            )
        if name not in self.shapes:
            raise CheckpointError(
                f"{self.name}: {key}: the base has no {name}; an adapter must be of the same architecture"
            )
        return name

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are merged."""
        return {tensor.name: tensor.shape for tensor in tensor_index(self.model)}

    @cached_property
    def tied(self) -> set[str]:
        """Names of parameters that are one parameter."""
        named = list(self.model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in named)
        return {name for name, parameter in named if uses[id(parameter)] > 1}

    def _renamed(self, name: str) -> str:
        """Rename as transformers renames a checkpoint's tensor; the name itself if that takes more than a renaming."""
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [change for change in self.conversions if isinstance(change, WeightRenaming)]
        others = [change for change in self.conversions if not isinstance(change, WeightRenaming)]
        prefix: Any = getattr(self.model, "base_model_prefix", None)
        renamed, converted = rename_source_key(name, renamings, others, prefix, self.model.state_dict())
        return name if converted else renamed

    @cached_property
    def conversions(self) -> list[Any]:
        """What transformers does to the tensors of a checkpoint of this model."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        model: Any = self.model
        return list(get_model_conversion_mapping(model))
