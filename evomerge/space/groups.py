"""Groups: which tensors share a number.

A grouping is a word (model, layer, module, tensor) or a mapping of group names to glob patterns of tensor names.
``{layer}`` in a pattern matches the number of a transformer block and makes one group a block.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from evomerge.errors import CampaignError
from evomerge.records import TensorIndex

Grouping = Literal["model", "layer", "module", "tensor"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[str, ...]]

BLOCK_NUMBER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
KINDS = (  # first match wins: "post_attention_layernorm" is a norm, "attention.output.dense" is attention
    ("norm", re.compile(r"norm|(?:^|\.)ln_")),
    ("attn", re.compile(r"attn|attention|(?:^|\.)[qkvo]_proj")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|fc\d|experts|intermediate|output\.dense")),
    ("embed", re.compile(r"embed|wte|wpe|cls_token")),
    ("head", re.compile(r"lm_head|classifier|score|pooler")),
)


def make_groups(tensors: TensorIndex, grouping: Grouping) -> Groups:
    """Return group -> tensor names; every tensor is in exactly one group.

    layer: one group a transformer block, with ``before`` and ``after`` for what precedes and follows the blocks.
    module: attn, mlp, norm, embed, head or other within each of those. tensor: one group a tensor.
    Raises: CampaignError if a pattern matches nothing or tensors are left over.
    """
    names = [tensor.name for tensor in tensors]
    if grouping == "model":
        return {"model": tuple(names)}
    if grouping == "tensor":
        return {name: (name,) for name in names}
    if grouping in ("layer", "module"):
        groups: dict[str, list[str]] = {}
        for name, layer in zip(names, _layers(names), strict=True):
            groups.setdefault(layer if grouping == "layer" else f"{layer}.{module_kind(name)}", []).append(name)
        return {group: tuple(members) for group, members in groups.items()}
    assert isinstance(grouping, Mapping)
    return _by_patterns(names, grouping)


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that matches a name: ``*`` any text, ``?`` one character, ``[ab]`` one of them."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def blocks(names: Iterable[str]) -> list[tuple[str, int] | None]:
    """Return the tower (encoder, decoder: the prefix) and the number of each tensor's block; None outside blocks."""
    matches = [BLOCK_NUMBER.search(name) for name in names]
    return [(match.string[: match.start()], int(match.group(1))) if match else None for match in matches]


def block_modules(names: Iterable[str]) -> dict[int, list[str]]:
    """Return number of a transformer block -> its module, by the names of tensors; with several towers, one in each."""
    modules: dict[int, dict[str, None]] = {}
    for name in names:
        if match := BLOCK_NUMBER.search(name):
            modules.setdefault(int(match.group(1)), {})[name[: match.end() - 1]] = None
    return {number: list(of_block) for number, of_block in modules.items()}


def _layers(names: Sequence[str]) -> list[str]:
    """Name the block of each tensor; blocks of several towers are told apart by their prefix."""
    found = blocks(names)
    towers = {block[0] for block in found if block}
    seen_block, layers = False, []
    for block in found:
        if block is None:
            layers.append("after" if seen_block else "before")
        else:
            seen_block = True
            tower = f"{block[0]}." if len(towers) > 1 else ""
            layers.append(f"{tower}layer{block[1]}")
    return layers


def module_kind(name: str) -> str:
    """Return what a tensor belongs to: one of ``KINDS``, or ``other``."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def _by_patterns(names: Sequence[str], grouping: Mapping[str, str | Sequence[str]]) -> Groups:
    patterns = [
        (group, _compile(pattern))
        for group, given in grouping.items()
        for pattern in ([given] if isinstance(given, str) else given)
    ]
    groups: dict[str, list[str]] = {}
    left_over, unused = [], {group for group, _ in patterns}
    for name in names:
        for group, pattern in patterns:
            if match := pattern.match(name):
                block = match.groupdict().get("layer")
                groups.setdefault(group if block is None else f"{group}.{block}", []).append(name)
                unused.discard(group)
                break
        else:
            left_over.append(name)
    if left_over:
        shown = ", ".join(left_over[:3]) + (", ..." if len(left_over) > 3 else "")
        raise CampaignError(
            f"groups: {len(left_over)} tensors match no pattern ({shown}); end with a group that takes the rest: "
            'rest: "*"'
        )
    if unused:
        raise CampaignError(
            f"groups: no tensor is left for {', '.join(sorted(unused))}; first tensor here: {names[0]!r}"
        )
    return {group: tuple(members) for group, members in groups.items()}


def _compile(pattern: str) -> re.Pattern[str]:
    """Translate a glob in which ``{layer}`` stands for a block's number."""
    parts = [re.escape(part).replace(r"\*", ".*").replace(r"\?", ".") for part in pattern.split("{layer}")]
    if len(parts) > 2:
        raise CampaignError(f"groups: {pattern!r} has {len(parts) - 1} {{layer}}; expected one at most")
    return re.compile(r"(?P<layer>\d+)".join(parts) + r"\Z")
