"""A device that is not the CPU, on machines without a GPU: numbers on the CPU behind tensors that say they are elsewhere.

Within ``PretendGpu`` a tensor made on ``GPU`` or brought there holds real numbers and calculates with them, but an
operation that mixes it with a tensor of the CPU raises, as CUDA does. torch's meta device lends its name.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # as on CUDA


class _Elsewhere(Tensor):
    """``numbers`` on the CPU under the name of ``GPU``."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "_Elsewhere":
        made: _Elsewhere = Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=GPU
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __getitem__(self, key: Any) -> Any:
        """Of a list of numbers torch would make a tensor that passes the mode by."""
        parts = key if isinstance(key, tuple) else (key,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))


class PretendGpu(TorchDispatchMode):
    def __enter__(self) -> "PretendGpu":
        self._tensor = torch.tensor
        # torch.tensor(list, device=...) is the one way of making a tensor that passes the mode by.
        torch.tensor = lambda data, device=None, **kwargs: (  # type: ignore[assignment]
            self._tensor(data, **kwargs) if device is None else self._tensor(data, **kwargs).to(device)
        )
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.tensor = self._tensor
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, _Elsewhere)]
    name = function._schema.name
    if elsewhere and name not in MAY_MIX:
        assert all(isinstance(tensor, _Elsewhere) or tensor.dim() == 0 for tensor in tensors), f"{name} mixes devices"
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if function._schema.is_mutable:
        return kwargs.get("out", args[0])
    if torch.device(device).type != GPU.type if device is not None else not elsewhere:
        return result
    return tree_map(lambda leaf: _Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _bare(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, _Elsewhere) else leaf


def numbers_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor of the pretended GPU."""
    assert isinstance(tensor, _Elsewhere)
    return tensor.numbers
