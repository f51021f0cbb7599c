"""mergekit's merge methods: their parameters' names there and here, and what mergekit takes where none is given.

``weight`` there is our coefficient, ``lambda`` our scale. The operators bear mergekit's names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Flags = Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Number:
    """A number of mergekit's: its name here, and what it is where nobody gives it; None: it must be given."""

    ours: str
    default: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method.

    base: needed; optional (the merge is then of task vectors); or none: the first model lends configuration and
    tokenizer only. of_model are numbers of each model, of_merge of the merge; of_options are of each model there and
    an option of the whole merge here; flags hold for the whole file; fixed can be no other here.
    options: (flags, whether there is a base) -> our operator's options. num_models: how many beside the base.
    folds: our operator has neither scale nor normalize, which then go into the coefficients.
    is_random: mergekit draws from a generator, we hash places.
    """

    base: Literal["needed", "optional", "none"]
    of_model: Mapping[str, Number] = field(default_factory=dict)
    of_merge: Mapping[str, Number] = field(default_factory=dict)
    of_options: Mapping[str, Number] = field(default_factory=dict)
    flags: Flags = field(default_factory=dict)
    fixed: Mapping[str, float | bool] = field(default_factory=dict)
    options: Callable[[Flags, bool], dict[str, Any]] = lambda flags, has_base: {}  # noqa: ARG005
    num_models: int | None = None
    folds: bool = False
    is_random: bool = False


WEIGHT = {"weight": Number("coefficient", None)}
DENSITY = {"density": Number("density", 1.0)}
GAMMA = {"gamma": Number("gamma", 0.01)}
KEEP = {"epsilon": Number("epsilon", 0.15)}
LAMBDA = {"lambda": Number("scale", 1.0)}
EPSILON = {"epsilon": Number("epsilon", 1e-5)}


def _of_nuslerp(flags: Flags, has_base: bool) -> dict[str, Any]:
    lines = "columns" if flags["nuslerp_row_wise"] else "rows"
    return {"relative": has_base, "vectors": "tensor" if flags["nuslerp_flatten"] else lines}


def _drawn(*, normalize: bool, of_options: Mapping[str, Number] | None = None) -> Method:
    """DARE and DELLA: mergekit's rescale keeps the sum of magnitudes."""
    return Method(
        base="needed",
        of_model=WEIGHT | DENSITY,
        of_merge=LAMBDA,
        of_options=of_options or {},
        flags={"normalize": normalize, "rescale": True},
        options=lambda flags, _: {**flags, "rescale": "l1" if flags["rescale"] else "none"},
        is_random=True,
    )


METHODS: Mapping[str, Method] = {
    "arcee_fusion": Method(base="needed", num_models=1),
    "breadcrumbs": Method(
        base="needed",
        of_model=WEIGHT | DENSITY | GAMMA,
        of_merge=LAMBDA,
        flags={"normalize": False, "rescale": False},
        options=lambda flags, _: dict(flags),
    ),
    "breadcrumbs_ties": Method(
        base="needed",
        of_model=WEIGHT | DENSITY | GAMMA,
        of_merge=LAMBDA,
        flags={"normalize": False, "rescale": False},
        options=lambda flags, _: dict(flags),
    ),
    "dare_linear": _drawn(normalize=False),
    "dare_ties": _drawn(normalize=False),
    "della": _drawn(normalize=True, of_options=KEEP),
    "della_linear": _drawn(normalize=False, of_options=KEEP),
    "karcher": Method(base="none", fixed={"max_iter": 10, "tol": 1e-5}),
    "linear": Method(
        base="none",
        of_model=WEIGHT,
        flags={"normalize": True},
        options=lambda flags, _: {"normalize": flags["normalize"]},
    ),
    "model_stock": Method(
        base="needed",
        flags={"filter_wise": False},
        options=lambda flags, _: {"vectors": "rows" if flags["filter_wise"] else "tensor"},
    ),
    "multislerp": Method(
        base="optional",
        of_model=WEIGHT,
        fixed={"normalize_weights": True, "eps": 1e-8},
        options=lambda _, has_base: {"relative": has_base},
    ),
    "nearswap": Method(base="needed", num_models=1, of_merge={"t": Number("t", None)}),
    "nuslerp": Method(
        num_models=2,
        base="optional",
        of_model=WEIGHT,
        flags={"nuslerp_flatten": True, "nuslerp_row_wise": False},
        options=_of_nuslerp,
    ),
    "passthrough": Method(base="none", of_model={"scale": Number("scale", 1.0)}),
    "ram": Method(base="needed", of_merge=EPSILON),
    "ramplus_tl": Method(base="needed", of_merge=EPSILON | {"r": Number("r", 0.1), "alpha": Number("alpha", 0.2)}),
    "sce": Method(
        base="needed",
        of_merge={"select_topk": Number("select_topk", 1.0)},
        options=lambda *_: {"floor": 1e-6},
    ),
    "slerp": Method(base="needed", num_models=1, of_merge={"t": Number("coefficient", None)}),
    "task_arithmetic": Method(base="needed", of_model=WEIGHT, of_merge=LAMBDA, flags={"normalize": False}, folds=True),
    "ties": Method(
        base="needed",
        of_model=WEIGHT | DENSITY,
        of_merge=LAMBDA,
        flags={"normalize": True, "rescale": False},
        options=lambda flags, _: dict(flags),
    ),
}
