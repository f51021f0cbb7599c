"""NearSwap: the base moves towards one expert, no entry farther than a limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.kernels.launch import launch
from evomerge.kernels.sources import Dense, Sources
from evomerge.operators.operator import Values
from evomerge.records import Options, ParameterSpec


@dataclass(frozen=True)
class NearSwapTile:
    """The expert, kept to base - t .. base + t. Columns: t, and the expert's int8 scale."""

    is_sum: ClassVar[bool] = False

    is_vector: bool

    def __call__(self, base: Tensor, rows: Sequence[Tensor], floats_CB: Tensor) -> Tensor:
        """Return the merged blocks."""
        base, (t, scale) = base.float(), floats_CB[:, :, None].unbind(0)
        held = rows[0].float() * scale
        expert = base + held if self.is_vector else held
        return torch.minimum(torch.maximum(expert, base - t), base + t)


class NearSwap:
    """NearSwap: the base moves towards one expert, no entry farther than a limit.

        theta = base + clip(expert - base, -t, t)

    What lies within t of the base is the expert's, the rest moves by t. mergekit weighs the expert by clip(t / |expert
    - base|, 0, 1): the same.
    When to use: a touch of one expert's manner on a base that should stay what it is. One number for the whole merge,
    of the size of the task vector's entries; no gradients, and no second expert.
    Reference: alchemonaut, the merge script of huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001 (t in its name);
    mergekit's ``nearswap``.
    """

    name: ClassVar[str] = "nearswap"
    reads_factors: ClassVar[bool] = False
    differentiable: bool = False  # in t the merge has a kink at every |expert - base|
    local: bool = True

    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="t",
                meaning="how far an entry may move from the base",
                default=1e-4,
                low=0.0,
                high=1e-3,
                minimum=0.0,
                per_expert=False,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: None) -> None:  # noqa: ARG002
        """Nothing to prepare. Raises: InputError unless there is one expert."""
        if sources.num_experts != 1:
            raise InputError(
                f"nearswap: expected one expert (which the base moves towards), found {sources.num_experts}; "
                "name one, or choose another operator"
            )

    def weights(self, values: Values, state: None) -> Tensor:  # noqa: ARG002
        """The base counts once; the expert's row is t."""
        return torch.cat([torch.ones_like(values["t"]), values["t"]])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: None,  # noqa: ARG002
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``NearSwapTile``."""
        [expert] = sources.experts
        assert isinstance(expert, Dense)
        [t_B] = sources.spread(weights_KS[1:2].float())
        scales_B = torch.ones_like(t_B) if expert.scales_B is None else expert.scales_B
        tile = NearSwapTile(expert.is_task_vector)
        columns = [torch.stack([t_B, scales_B])]
        launch(tile, out_P, sources.layout.runs(changed), sources.base_P, [expert.buffer_P], columns)
