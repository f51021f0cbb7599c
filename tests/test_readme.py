"""What the README and the guides show is true: files are read, Python runs, commands and options exist."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from evomerge.campaign.assemble import OPERATORS, PROPOSERS
from evomerge.campaign.campaign import presets_folder, read_campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import make_plan
from evomerge.campaign.recipe_file import read_recipe
from evomerge.campaign.stages import make_stages
from evomerge.evaluators.language import LanguageEvaluator, LanguageOptions
from evomerge.families.family import FAMILIES, FamilySummary

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, digits4: FamilySummary, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's relative paths hold, with the demo's budget cut."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "digits4").symlink_to(digits4.path)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    demo = tmp_path / "benchmarks" / "demo.yaml"
    demo.write_text(re.sub(r"evaluations: \d+", "evaluations: 12", demo.read_text()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_campaign_and_its_stages_are_read(checkout: Path) -> None:
    campaign, objectives, choice, starts, stages, ladder, *_ = blocks("yaml", page("searching"))
    path = checkout / "campaign.yaml"
    path.write_text(campaign)
    plan = make_plan(read_campaign(path))
    assert len(plan.space) == 15  # 2 experts x 8 groups, one of them fixed
    path.write_text(yaml.safe_dump(yaml.safe_load(campaign) | yaml.safe_load(objectives), sort_keys=False))
    assert [objective.name for objective in make_plan(read_campaign(path)).objectives if objective.steers] == [
        "skills",
        "doubt",
    ]
    path.write_text(yaml.safe_dump(yaml.safe_load(campaign) | yaml.safe_load(choice), sort_keys=False))
    assert (
        len(make_plan(read_campaign(path)).space) == 13
    )  # the operator; 2 experts x (3 + 1 coefficients, 2 densities)
    path.write_text(yaml.safe_dump(yaml.safe_load(campaign) | yaml.safe_load(starts), sort_keys=False))
    rules = [dimension.shares for dimension in make_plan(read_campaign(path)).space.dimensions]
    assert {rule.power for rule in rules if rule is not None} == {1.0, -2.0}
    assert None not in rules
    path.write_text(
        campaign.replace(next(line for line in campaign.splitlines() if line.startswith("search:")), stages)
    )
    read = read_campaign(path)
    assert [stage.proposer for stage in make_stages(read, plan)] == ["adamerging", "cma_es"]
    path.write_text(yaml.safe_dump(yaml.safe_load(campaign) | yaml.safe_load(ladder), sort_keys=False))
    read = read_campaign(path)
    assert [stage.num_dimensions for stage in make_stages(read, make_plan(read))] == [2, 2 * 8, 104]


def test_evo_merging_is_read(checkout: Path) -> None:
    path = checkout / "campaign.yaml"
    chain = next(block for block in blocks("yaml", page("merging")) if "evo_merging" in block)
    path.write_text(yaml.safe_dump(yaml.safe_load(blocks("yaml", README)[0]) | yaml.safe_load(chain), sort_keys=False))
    read = read_campaign(path)
    assert [stage.num_dimensions for stage in make_stages(read, make_plan(read))] == [2, 2]
    course = Course(read, make_plan(read), [stage.changes for stage in make_stages(read, make_plan(read))])
    parameters = [{dimension.parameter for dimension in course.leg(n, []).plan.space.dimensions} for n in (0, 1)]
    assert parameters == [{"density"}, {"coefficient"}]


def test_the_recipes_are_read(checkout: Path) -> None:
    found = [block for block in blocks("yaml", page("merging")) if "name: ties}" in block and "base:" in block]
    recipes = []
    for number, block in enumerate(found):
        path = checkout / f"{number}.yaml"
        path.write_text(block)
        recipes.append(read_recipe(path).recipe)
    assert [recipe.values["coefficient"] for recipe in recipes] == [((1.0,), (0.7,)), ((0.8,), (0.3,))]
    assert [merge.values["density"][0] for recipe in recipes for merge in recipe.merges] == [(0.3,)]


@pytest.mark.parametrize("place", [0, 1], ids=["alone", "after merging"])
def test_the_data_flow_campaigns_are_read(tmp_path: Path, small_text: FamilySummary, place: int) -> None:
    sections = yaml.safe_load(small_text.campaign.read_text())
    del sections["operator"]
    sections |= yaml.safe_load(
        [block for block in blocks("yaml", page("merging")) if "kind: data_flow" in block][place]
    )
    sections["base"] = str(small_text.path / "base")
    sections["objectives"] = [{"name": name, "task": name, "metric": "loss"} for name in ("python", "sort")]
    assert list(sections["experts"]) == ["maths", "chat"]
    sections["experts"] = {"maths": str(small_text.path / "experts/sort"), "chat": str(small_text.path / "experts/c")}
    sections["evaluation"] |= {
        "data": str(small_text.path / "data"),
        "split": {"adapt": 0.0, "search": 0.5, "test": 0.5},
    }
    path = tmp_path / "campaign.yaml"
    path.write_text(yaml.safe_dump(sections))
    campaign = read_campaign(path)
    plan = make_plan(campaign)
    stages = make_stages(campaign, plan)
    assert stages[-1].proposer == "catcma"
    # On and scale; 2 experts (or the merge, and one expert) x 2 layers x 2 repeats.
    assert [stage.num_dimensions for stage in stages] == [[16], [8, 16]][place]


def test_the_language_items_are_read(tmp_path: Path, small_text: FamilySummary) -> None:
    for number, line in enumerate(blocks("json", page("evaluators"))[0].splitlines()):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(json.loads(line)) + "\n")
    tasks = ["0", "1", "2"]
    evaluator = LanguageEvaluator(LanguageOptions(data=str(tmp_path)), tasks, small_text.path / "base")
    assert [set(evaluator.metrics(task)) for task in tasks] == [{"loss"}, {"exact_match", "loss"}, {"accuracy", "loss"}]


def test_the_campaign_of_real_checkpoints_is_read(tmp_path: Path) -> None:
    (tmp_path / "campaign.yaml").write_text(blocks("yaml", page("real-checkpoints"))[0])
    assert read_campaign(tmp_path / "campaign.yaml").workers.kind == "ray"


def test_the_python_runs(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python", README)[0], "README.md", "exec"), {})
    assert re.search(r"^\d+ \{'rot90': 0\.\d+, 'parity': 0\.\d+\}$", capsys.readouterr().out, flags=re.MULTILINE)


def test_names_in_the_tables_are_those_that_exist() -> None:
    searching, merging = page("searching"), page("merging")
    assert set(re.findall(r"^\| `(\w+)` \|", searching, flags=re.MULTILINE)) == set(PROPOSERS)
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(FAMILIES)
    for name in OPERATORS:
        assert f"`{name}`" in merging
    for preset in presets_folder().glob("*.yaml"):
        assert f"`{preset.stem}`" in searching
    for proposer in PROPOSERS.values():
        row = next(line for line in searching.splitlines() if line.startswith(f"| `{proposer.name}`"))
        assert all(f"`{option}`" in row for option in proposer.options_type.model_fields)


def test_its_make_targets_exist_and_its_picture_lies_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)) <= set(targets)
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        file, _, heading = path.partition("#")
        assert (ROOT / (file or "README.md")).is_file()
        assert not heading or f"\n## {heading.replace('-', ' ').capitalize()}\n" in README


def test_the_demo_is_a_campaign_as_people_write_it() -> None:
    sections = yaml.safe_load((ROOT / "benchmarks" / "demo.yaml").read_text())
    assert sections["budget"]["evaluations"] >= 60
