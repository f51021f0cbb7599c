"""What is merged, opened and compared: the base, experts, and merges that take part in a merge."""

from collections.abc import Iterable, Mapping

from evomerge.materialize.adapter import Adapter, open_expert
from evomerge.materialize.arrangement import arrange
from evomerge.materialize.checkpoint import Checkpoint, fit_to_base, open_checkpoint
from evomerge.materialize.merge import Merge, Source
from evomerge.materialize.resident import empty_model, tensor_index, tied_names
from evomerge.materialize.vocabulary import vocabulary_tensors
from evomerge.records import Layers, TensorIndex


def open_checkpoints(
    base: str, experts: Mapping[str, str]
) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter], TensorIndex]:
    """Open base and experts and compare their tensors; return them with the list of what is merged."""
    opened = open_checkpoint("base", base)
    model = empty_model(opened)
    others = {name: open_expert(f"expert {name}", location, model) for name, location in experts.items()}
    tied, vocabulary = tied_names(model), vocabulary_tensors(model)
    fitted = {
        name: expert if isinstance(expert, Adapter) else fit_to_base(opened, expert, tied, vocabulary)
        for name, expert in others.items()
    }
    return opened, fitted, tensor_index(model)


def open_sources(
    base: str, experts: Mapping[str, str | Merge], layers: Layers | None
) -> tuple[Checkpoint, dict[str, Source], TensorIndex]:
    """Open what a recipe merges, as ``open_checkpoints`` does: merges too, and layers of other numbers."""
    locations = {name: held for name, held in experts.items() if isinstance(held, str)}
    if layers is None:
        opened, found, tensors = open_checkpoints(base, locations)
    else:
        opened = open_checkpoint("base", base)
        model = empty_model(opened)
        found = {name: open_expert(f"expert {name}", location, model) for name, location in locations.items()}
    sources = {name: held if isinstance(held, Merge) else found[name] for name, held in experts.items()}
    return opened, sources, arrange((opened, *sources.values()), layers).tensors if layers else tensors


def decisions(experts: Iterable[Source], dtype: str) -> list[str]:
    """Say what was decided about experts that are not in every respect like the base; a person should know."""
    found = []
    exact = {dtype, *(("bfloat16", "float16") if dtype == "float32" else ())}
    for expert in experts:
        if isinstance(expert, Merge):
            found += decisions(expert.experts, dtype)
            continue
        if isinstance(expert, Adapter):
            continue
        if expert.alignment is not None:
            found.append(f"{expert.name}: another vocabulary, aligned by token: {expert.alignment.decision}")
        if rounded := sorted(expert.dtypes - exact):
            found.append(f"{expert.name}: its {' and '.join(rounded)} tensors are rounded to {dtype}")
    return found
