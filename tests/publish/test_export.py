"""What an export leaves: files that others read, and a card that says what the ledger holds."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_server import TOKEN, Hub, hub
from PIL import Image
from silent_watcher import Silent
from tiny_adapters import random_factors, write_adapter
from typed_command import Typed

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.errors import InputError
from evomerge.families.family import FamilySummary
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import empty_model
from evomerge.publish.card_metadata import Input, public_names
from evomerge.publish.export import Form, export_trial, merge_recipe, verify_export
from evomerge.run.run import Run
from evomerge.run.search import search

ROOT = Path(__file__).parents[2]
SOBOL = [{"proposer": "sobol"}]


def quiet(_: str) -> None:
    """Nothing to show."""


def written_campaign(family: FamilySummary, folder: Path, **changes: Any) -> Campaign:
    sections = yaml.safe_load(family.campaign.read_text())
    sections["base"] = str(family.path / "base")
    sections["experts"] = {name: str(family.path / "experts" / name) for name in family.experts}
    sections["evaluation"]["data"] = str(family.path / "data")
    (folder / "campaign.yaml").write_text(yaml.safe_dump(sections | changes))
    return read_campaign(folder / "campaign.yaml")


@pytest.fixture(scope="module")
def run(small_digits: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    campaign = written_campaign(small_digits, folder, search=SOBOL, budget={"evaluations": 6})
    return search(campaign, folder / "run", watcher=Silent())


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best balance, in shards."""
    out = tmp_path_factory.mktemp("exported") / "merged"
    export_trial(run, run.pick(at_knee=True), out, quiet, Form(shard_size="3KB"))
    return out


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


class TestCard:
    @pytest.fixture
    def card(self, exported: Path) -> Any:
        from huggingface_hub import ModelCard

        return ModelCard.load(exported / "README.md")

    def test_the_hub_takes_it(self, card: Any, server: Hub) -> None:
        card.validate()
        assert server.validated == [card.content]

    def test_a_card_of_which_the_hub_does_not_know_the_base_is_refused(self, card: Any, server: Hub) -> None:
        """What the check above would find."""
        card.data.base_model = ["/home/me/base"]
        with pytest.raises(ValueError, match="base_model"):
            card.validate()

    def test_its_results_are_the_ledgers(self, run: Run, card: Any) -> None:
        from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

        trial = run.pick(at_knee=True)
        scores = run.tested[f"trial:{trial.number}"].scores
        results = {result.dataset_name: result for result in card.data.eval_results}
        assert results.keys() == {objective.task for objective in run.objectives}
        for objective in run.objectives:
            found, score = results[objective.task], scores[objective.name]
            assert (found.metric_value, found.metric_type) == (score.value, objective.metric)
            assert (found.dataset_split, found.metric_args["num_items"]) == ("test", len(score.items))
            assert found.metric_args["stderr"] == score.stderr
            low, high = found.metric_args["interval_95"]
            assert low < score.value < high
        index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
        assert model_index_to_eval_results(index) == (card.data.model_name, card.data.eval_results)

    def test_it_says_what_was_done(self, run: Run, exported: Path, card: Any) -> None:
        trial = run.pick(at_knee=True)
        text = card.text
        assert "found by evomerge among 6 candidates" in text
        assert f"`{run.tested[f'trial:{trial.number}'].weights}`" in text
        assert all(digest in text for digest in run.facts["hashes"].values())
        assert "evomerge merge recipe.yaml --out merged" in text
        assert "better than" in text
        assert "Test items were used" not in text  # once, as they should be
        assert card.data.tags[:2] == ["merge", "evomerge"]
        assert card.data.base_model is None  # a folder is no model of the hub's
        with Image.open(exported / "front.png") as picture:
            assert min(picture.size) > 800

    def test_its_head_survives_the_hubs_own_reading_and_writing(
        self, exported: Path, card: Any, tmp_path: Path
    ) -> None:
        from huggingface_hub import ModelCard, ModelCardData, metadata_load, metadata_save

        head = metadata_load(exported / "README.md")
        assert head is not None
        assert ModelCardData(**head).to_dict() == card.data.to_dict() == head
        metadata_save(tmp_path / "README.md", head)
        assert metadata_load(tmp_path / "README.md") == head
        card.save(tmp_path / "again.md")
        assert ModelCard.load(tmp_path / "again.md").data.to_dict() == head

    def test_of_a_trial_without_test_scores_it_says_that_the_scores_are_optimistic(
        self, run: Run, tmp_path: Path
    ) -> None:
        from huggingface_hub import ModelCard

        untested = next(trial for trial in run.trials if f"trial:{trial.number}" not in run.tested)
        export_trial(run, untested, tmp_path / "out", quiet)
        card: Any = ModelCard.load(tmp_path / "out" / "README.md")
        assert {result.dataset_split for result in card.data.eval_results} == {"search"}
        assert all("optimistic" in result.metric_name for result in card.data.eval_results)
        assert "| not scored |" in card.text


@pytest.fixture(scope="module")
def mine(small_text: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The base lies in the hub's cache, the experts in folders, and its tokenizer tells where it was made."""
    root = tmp_path_factory.mktemp("mine")
    base = root / "hub" / "models--tiny--text" / "snapshots" / "0123"
    shutil.copytree(small_text.path / "base", base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"name_or_path": str(root / "work" / "é"), "inner": [{"_name_or_path": "tiny/text"}]}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    experts = {name: str(root / "ex perts" / name) for name in small_text.experts[:2]}
    for name, folder in experts.items():
        shutil.copytree(small_text.path / "experts" / name, folder)
    split = {"adapt": 0.0, "search": 0.5, "test": 0.5}
    changes = {
        "base": str(base),
        "experts": experts,
        "objectives": [{"name": name, "task": name, "metric": "loss"} for name in experts],
        "evaluation": {"kind": "language", "data": str(small_text.path / "data"), "split": split},
        "search": SOBOL,
        "budget": {"evaluations": 4},
    }
    return search(written_campaign(small_text, root, **changes), root / "run", watcher=Silent())


class TestWhatIsHandedOn:
    """Of a public export no file holds a path of this machine; what came from the hub keeps its id."""

    def test_a_push_sends_names_alone(
        self, mine: Run, server: Hub, tmp_path: Path, typed: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import ModelCard, constants

        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        done = typed("export", mine.location, "--knee", "--out", tmp_path / "out", "--push", "someone/merged")
        assert done.returncode == 0, done.stderr
        root = Path(str(mine.location)).parent
        files = server.repositories["someone/merged"].files
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        for place in (root, tmp_path, ROOT, Path.home(), "ex perts"):
            assert not [name for name, content in files.items() if str(place).encode() in content]
        first, second = mine.campaign.experts
        recipe, mergekit = (yaml.safe_load(files[name]) for name in ("recipe.yaml", "mergekit.yaml"))
        assert (recipe["base"], recipe["experts"]) == ("tiny/text", {first: first, second: second})
        assert mergekit["base_model"] == "tiny/text"
        assert [model["model"] for model in mergekit["models"]] == [first, second]
        config = json.loads(files["tokenizer_config.json"])
        assert (config["name_or_path"], config["inner"]) == ("é", [{"_name_or_path": "tiny/text"}])
        card: Any = ModelCard(files["README.md"].decode())
        assert card.data.base_model == ["tiny/text"]
        assert f"In it `{first}`, `{second}` stand for the publisher's folders" in card.text
        assert f"| {first} | `{first}` |" in card.text
        card.validate()
        assert server.validated

    def test_put_under_these_names_the_checkpoints_give_the_same_model(self, mine: Run, tmp_path: Path) -> None:
        """What the card tells a reader to do. The base would come from the hub, which is not asked here."""
        trial = mine.pick(at_knee=True)
        export_trial(mine, trial, tmp_path / "out", quiet, Form(is_public=True))
        recipe = tmp_path / "out" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("base: tiny/text", f"base: {mine.campaign.base}"))
        for name, folder in mine.campaign.experts.items():
            (tmp_path / "out" / name).symlink_to(folder)
        assert (
            merge_recipe(recipe, tmp_path / "again", "cpu", quiet).weights
            == mine.tested[f"trial:{trial.number}"].weights
        )

    def test_a_local_export_can_be_repeated_as_it_is(self, mine: Run, tmp_path: Path) -> None:
        trial = mine.pick(at_knee=True)
        exported = export_trial(mine, trial, tmp_path / "out", quiet)
        assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["experts"] == mine.campaign.experts
        assert (
            merge_recipe(tmp_path / "out" / "recipe.yaml", tmp_path / "again", "cpu", quiet).weights == exported.weights
        )
        assert str(mine.location) not in (tmp_path / "out" / "README.md").read_text()

    def test_folders_of_one_name_are_called_as_the_campaign_calls_them(self, tmp_path: Path) -> None:
        inputs = {
            name: Input(str(folder), folder)
            for name, folder in {
                "base": tmp_path / "base",
                "math": tmp_path / "math" / "checkpoint-500",
                "hub": tmp_path / "models--meta--Tiny" / "snapshots" / "0123",
            }.items()
        }
        assert public_names(inputs) == {"base": "base", "math": "checkpoint-500", "hub": "meta/Tiny"}
        code = tmp_path / "code" / "checkpoint-500"
        assert public_names({**inputs, "code": Input(str(code), code)}) == {
            "base": "base", "math": "math", "hub": "meta/Tiny", "code": "code",
        }  # fmt: skip


class TestInput:
    def test_an_id_of_the_hub_is_told_from_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "some" / "folder").mkdir(parents=True)
        cached = tmp_path / "models--meta--Tiny-1" / "snapshots" / "0123"
        assert Input("meta/Tiny-1", cached).hub_id == "meta/Tiny-1"
        assert Input(str(cached), cached).hub_id == "meta/Tiny-1"
        assert Input("some/folder", tmp_path / "some" / "folder").hub_id is None
        assert Input(str(tmp_path), tmp_path).hub_id is None

    @pytest.mark.parametrize(
        ("card", "expected"),
        [
            ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
            ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
             {"license": "other", "license_name": "mine", "license_link": "LICENSE"}),
            ("---\ntags: [x]\n---\n", {}),
            ("---\n: [\n---\n", {}),
            ("# no head", {}),
            ("---", {}),
            (None, {}),
        ],
    )  # fmt: skip
    def test_a_licence_is_what_the_models_own_card_says(
        self, tmp_path: Path, card: str | None, expected: dict[str, str]
    ) -> None:
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        assert Input("owner/name", tmp_path).license == expected


def test_shards_score_what_was_recorded(run: Run, exported: Path) -> None:
    assert len(list(exported.glob("*.safetensors"))) > 2
    rows = verify_export(run, run.pick(at_knee=True), exported, quiet)
    assert {row.split for row in rows} == {"search", "test"}
    assert all(row.rescored == row.recorded and not row.num_changed_items for row in rows)


def test_a_recipe_is_merged_in_shards_too(exported: Path, run: Run, tmp_path: Path) -> None:
    built = merge_recipe(exported / "recipe.yaml", tmp_path / "again", "cpu", quiet, Form(shard_size="4KB"))
    assert built.weights == run.tested[f"trial:{run.pick(at_knee=True).number}"].weights
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form(shard_size="big"), "--shard-size: expected a size such as 5GB"),
        (Form(tokenizer_from="rot9"), "--tokenizer-from: no expert 'rot9'; did you mean 'rot90'"),
        (Form(as_adapter=True), "--as-adapter: expert .* is a full checkpoint; expected adapters only"),
    ],
)
def test_a_form_that_does_not_suit_is_a_users_mistake(run: Run, tmp_path: Path, form: Form, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_trial(run, run.trials[0], tmp_path / "out", quiet, form)
    assert not list(tmp_path.iterdir())


def test_a_merge_of_adapters_is_exported_as_an_adapter(small_digits: FamilySummary, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = empty_model(open_checkpoint("base", small_digits.path / "base"))
    modules = ["layers.0.attention.q_proj", "layers.1.mlp.fc1"]
    experts = {
        name: str(write_adapter(tmp_path / name, random_factors(model, modules, seed=seed)))
        for seed, name in enumerate(("first", "second"))
    }
    campaign = written_campaign(small_digits, tmp_path, experts=experts, search=SOBOL, budget={"evaluations": 4})
    run = search(campaign, tmp_path / "run", watcher=Silent())
    trial = run.front[0]
    whole = export_trial(run, trial, tmp_path / "whole", quiet)
    assert whole.fits_adapter
    exported = export_trial(run, trial, tmp_path / "adapter", quiet, Form(as_adapter=True))
    assert not exported.fits_adapter
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "front.png",
    }  # fmt: skip
    rows = verify_export(run, trial, tmp_path / "adapter", quiet)
    assert rows
    assert all(row.rescored == row.recorded for row in rows)
    card: Any = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in card.text
    export_trial(run, trial, tmp_path / "public", quiet, Form(as_adapter=True, is_public=True))
    assert json.loads((tmp_path / "public" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert not [path for path in (tmp_path / "public").iterdir() if str(tmp_path.parent).encode() in path.read_bytes()]
    assert verify_export(run, trial, tmp_path / "public", quiet) == rows


@pytest.mark.slow
def test_the_command_exports_verifies_and_pushes(run: Run, tmp_path: Path) -> None:
    with hub() as server:
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        command = [sys.executable, "-W", "error", "-m", "evomerge.cli", "export", str(run.location), "--knee"]
        command += ["--out", str(tmp_path / "out"), "--shard-size", "3KB", "--verify", "--push", "someone/merged"]
        done = subprocess.run(
            [*command, "--private"], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed   {server.url}/someone/merged" in done.stdout
        assert "equal to the last digit" in done.stdout
        repository = server.repositories["someone/merged"]
        assert repository.private
        assert repository.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Campaign]:
    """A campaign of a tiny language model on lm-eval's own kinds of tasks."""
    sys.path.insert(0, str(ROOT / "tests" / "evaluators"))
    sys.path.insert(0, str(ROOT / "tests" / "materialize"))
    import tiny_checkpoints
    import tiny_harness

    root = tmp_path_factory.mktemp("language")
    base = tiny_harness.save(root / "base")
    for seed, name in enumerate(("one", "two")):
        tiny_checkpoints.write(tiny_checkpoints.tuned(tiny_harness.make_model(), seed), root / name)
        tiny_harness.make_tokenizer().save_pretrained(root / name)
    (root / "tasks").mkdir()
    tiny_harness.write_tasks(root / "tasks")

    def written(**changes: Any) -> Campaign:
        sections = {
            "name": "language",
            "base": str(base),
            "experts": {name: str(root / name) for name in ("one", "two")},
            "objectives": [
                {"name": "choice", "task": "choice", "metric": "acc_norm"},
                {"name": "writing", "task": "write", "metric": "exact_match,word"},
                {"name": "length", "task": "said", "metric": "code", "direction": "min"},
            ],
            "evaluation": {
                "kind": "lm_eval", "include_path": str(root / "tasks"), "batch_size": 5,
                "split": {"adapt": 0.0, "search": 0.5, "test": 0.5},
            },
            "search": [{"proposer": "random"}],
            "budget": {"evaluations": 3},
            **changes,
        }  # fmt: skip
        path = root / "campaign.yaml"
        path.write_text(yaml.safe_dump(sections))
        return read_campaign(path)

    return written


@pytest.mark.slow
@pytest.mark.parametrize("space", [{"groups": "layer"}, {"kind": "data_flow", "max_layers": 3}], ids=["merge", "path"])
def test_lm_evals_command_line_gives_the_cards_numbers(
    language: Callable[..., Campaign], space: dict[str, Any], tmp_path: Path
) -> None:
    """It scores every document; the mean over the test items is what the card says, to the last digit."""
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evomerge.campaign.plan import make_plan

    campaign = language(space=space)
    run = search(campaign, tmp_path / "run", watcher=Silent())
    trial = run.front[0]
    out = tmp_path / "out"
    export_trial(run, trial, out, quiet, Form(shard_size="100KB"))
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(out).chat_template
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={out},dtype=float32", "--tasks", "choice,write,said", "--log_samples"]
    command += ["--include_path", campaign.evaluation["include_path"], "--output_path", str(tmp_path / "scores")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ran = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    plan = make_plan(campaign)
    card: Any = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    for result in card.data.eval_results:
        metric, _, chosen = result.metric_type.partition(",")
        path = next((tmp_path / "scores").rglob(f"samples_{result.dataset_name}_*.jsonl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        of_doc = {line["doc_id"]: line[metric] for line in lines if line["filter"] == (chosen or line["filter"])}
        items = plan.splits[result.dataset_name][result.dataset_split]
        assert result.metric_value == np.float32([of_doc[item] for item in items]).astype(float).mean()
