"""The direction of imports: a module imports its own package and lower layers; packages of one layer stay apart."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "evomerge"
LAYERS = (
    {"records", "errors", "strict", "chat", "clock"},
    {"kernels"},
    {"operators", "space", "splits", "front", "evidence"},
    {"materialize", "ledger", "surrogates", "descent_rules"},
    {"proposers", "evaluators", "fidelity", "workers", "families", "trackers"},
    {"campaign"},
    {"scorer", "driver", "interop", "submit"},
    {"check", "run"},
    {"publish"},
    {"report"},
    {"cli"},
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
CONFINED = {  # library -> where alone it may be imported
    "transformers": {"materialize", "evaluators", "families"},
    "cma": {"proposers"},
    "optuna": {"proposers", "run/mirror"},
    "cmaes": {"proposers"},
    "nevergrad": {"proposers"},
    "botorch": {"proposers"},
    "gpytorch": {"proposers"},
    "sqlalchemy": {"ledger"},
    "psycopg": {"ledger"},
    "moocore": {"front"},
    "pandas": {"run/frames", "run/run"},  # run.py names the type alone
    "PIL": {"publish/scatter"},
    "huggingface_hub": {"materialize", "publish/push"},
    "plotly": {"report"},
    "rich": {"report"},
    "starlette": {"report"},
    "uvicorn": {"report"},
    "typer": {"cli"},
    "ray": {"workers"},
    "lm_eval": {"evaluators"},
    "tensorboardX": {"trackers"},
    "mlflow": {"trackers"},
    "wandb": {"trackers"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if part_of(path) != "__init__"]


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in modules()} == set(LAYER_OF)


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        importer = part_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "evomerge" or len(parts) < 2 or parts[1] == importer or parts[1] not in LAYER_OF:
                continue
            ours, theirs = LAYER_OF[importer], LAYER_OF[parts[1]]
            siblings = ours == theirs == 0  # single modules, not packages
            if theirs >= ours and not siblings:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_libraries_are_confined() -> None:
    wrong = []
    for path in modules():
        for name in imports_of(path):
            homes = CONFINED.get(name.split(".")[0])
            module = path.relative_to(PACKAGE).with_suffix("").as_posix()
            if homes is not None and not homes & {part_of(path), module}:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_import_and_help_load_nothing_heavy() -> None:
    program = (
        "import sys, evomerge, evomerge.cli; "
        "heavy = {'torch', 'transformers', 'optuna', 'cma', 'ray', 'lm_eval', 'plotly', 'sqlalchemy', 'numpy', 'starlette'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
