"""The operators and what can be set or searched of them."""

from collections.abc import Mapping
from typing import Any

from evomerge.campaign.assemble import OPERATORS
from evomerge.report.tables import Column, Shown, make_table


def operators() -> Shown:
    """Return every operator with its parameters (default, searched range) and options."""
    rows = [_row(name, operator_type()) for name, operator_type in sorted(OPERATORS.items())]
    columns = [
        Column("operator", lambda row: row["operator"], is_number=False),
        Column("gradients", lambda row: "yes" if row["gradients"] else "", is_number=False),
        Column("parameters", lambda row: "\n".join(map(_parameter, row["parameters"])), is_number=False),
        Column(
            "options", lambda row: "\n".join(f"{k}: {_plain(v)}" for k, v in row["options"].items()), is_number=False
        ),
    ]
    title = "operators: parameter = default [searched from, to]; * one number for the whole merge"
    closing = "A campaign or recipe says: operator: {name: ties, density: 0.3}; coefficients stand elsewhere."
    table = make_table(title, columns, rows)
    table.show_lines = True
    return Shown(tables={"operators": rows}, people=[table, closing])


def _row(name: str, operator: Any) -> dict[str, Any]:
    parameters = [
        {"name": spec.name, "per_expert": spec.per_expert, "default": spec.default, "low": spec.low, "high": spec.high}
        for spec in operator.parameters
    ]
    return {
        "operator": name,
        "gradients": operator.differentiable,
        "parameters": parameters,
        "options": operator.options.model_dump(),
    }


def _parameter(spec: Mapping[str, Any]) -> str:
    return (
        f"{spec['name']}{'' if spec['per_expert'] else '*'} = {spec['default']:g} [{spec['low']:g}, {spec['high']:g}]"
    )


def _plain(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
