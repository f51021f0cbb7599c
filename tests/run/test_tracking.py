"""Runs that trackers show, each by its real client, without a network; what was written is read back."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from silent_watcher import Interrupt, Interrupting, Silent

from evomerge import trackers
from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.errors import CampaignError
from evomerge.front.front import front_hypervolume
from evomerge.run.run import Run
from evomerge.run.search import search
from evomerge.trackers import Tensorboard

Make = Callable[..., Campaign]
NUM = 5


def tracked(make_campaign: Make, *given: dict[str, Any]) -> Campaign:
    return make_campaign(search=[{"proposer": "sobol"}], budget={"evaluations": NUM}, trackers=list(given))


def require_told(run: Run, told: dict[int, dict[str, float]]) -> None:
    """Every result has its numbers at its step, and what they add up to."""
    assert sorted(told) == list(range(NUM))
    for trial in run.trials:
        assert trial.order is not None
        assert trial.measurement is not None
        numbers = told[trial.order]
        for name, score in trial.measurement.scores.items():
            assert numbers[f"value/{name}"] == pytest.approx(score.value)
            assert numbers[f"stderr/{name}"] == pytest.approx(score.stderr)
        assert numbers["cost"] == pytest.approx(1.0)
        assert numbers["total_cost"] == pytest.approx(trial.order + 1.0)
    volume = front_hypervolume(run.trials, run.objectives, run.searched["base"])
    assert told[NUM - 1]["hypervolume"] == pytest.approx(volume, rel=1e-6)
    for objective in run.steering:
        values = [trial.measurement.scores[objective.name].value for trial in run.trials if trial.measurement]
        assert told[NUM - 1][f"best/{objective.name}"] == pytest.approx(max(values))


def event_files(folder: Path) -> tuple[dict[int, dict[str, float]], dict[str, str]]:
    """Read TensorBoard's event files: scalars by step, and texts. A record is its length, a CRC, itself, a CRC."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[int, dict[str, float]] = {}
    texts = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(event.step, {})[value.tag] = value.simple_value
                else:
                    texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
    return scalars, texts


def test_tensorboard_over_two_sessions(make_campaign: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pip install 'evomerge[tensorboard]'")
    campaign = tracked(make_campaign, {"kind": "tensorboard"})
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=Interrupting(2))
    run = search(campaign, tmp_path / "run")
    scalars, texts = event_files(tmp_path / "run" / "trackers" / "tensorboard")
    require_told(run, scalars)
    assert f"| seed | {campaign.seed} |" in texts["campaign"]
    best = run.front[0]
    assert f"| trial:{best.number} |" in texts["front"]
    assert str(run.tested[f"trial:{best.number}"].scores[run.objectives[0].name].value) in texts["front"]


def test_mlflow_over_two_sessions(make_campaign: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'evomerge[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes it ten seconds to make
    uri = f"file:{tmp_path}/mlflow"
    campaign = tracked(make_campaign, {"kind": "mlflow", "uri": uri, "experiment": "merges"})
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=Interrupting(2))
    run = search(campaign, tmp_path / "run")
    client = MlflowClient(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "merges"]
    (held,) = client.search_runs([experiment.experiment_id])
    assert (held.info.status, held.data.params["seed"]) == ("FINISHED", str(campaign.seed))
    told: dict[int, dict[str, float]] = {}
    for name in held.data.metrics:
        for metric in client.get_metric_history(held.info.run_id, name):
            told.setdefault(metric.step, {})[name] = metric.value
    require_told(run, told)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of an offline file: blocks of 32 KB, of chunks with CRC, length, and whether more follows."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield parts
            parts = b""


def test_wandb_offline(make_campaign: Make, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'evomerge[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    campaign = tracked(make_campaign, {"kind": "wandb", "mode": "offline", "folder": str(tmp_path / "w")})
    run = search(campaign, tmp_path / "run")
    (path,) = (tmp_path / "w").rglob("*.wandb")
    told: dict[int, dict[str, float]] = {}
    config: dict[str, str] = {}
    for data in wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        numbers = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "hypervolume" in numbers:
            told[int(numbers["_step"])] = numbers
    require_told(run, told)
    assert config["seed"] == str(campaign.seed)


class Broken:
    """A client that breaks at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, list[int]()

    def log(self, step: int, numbers: Any) -> None:
        self.steps.append(step)
        if step == self.at:
            raise ConnectionError("no route\nto host")

    def table(self, name: str, columns: Any, rows: Any) -> None:
        raise AssertionError("it was switched off")

    close = table


def test_a_tracker_that_fails_is_noted_once_and_the_run_goes_on(
    make_campaign: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(at=2)
    monkeypatch.setitem(trackers.TRACKERS, trackers.TensorboardOptions, lambda _options, _run: broken)
    monkeypatch.setitem(trackers.CLIENTS, "tensorboard", "json")
    watcher = Silent()
    run = search(tracked(make_campaign, {"kind": "tensorboard"}), tmp_path / "run", watcher=watcher)
    assert run.is_finished
    assert broken.steps == [0, 1, 2]
    assert [note for note in watcher.notes if "trackers" in note] == [
        "trackers[0] (tensorboard) failed and is switched off; the run goes on: no route to host"
    ]


def test_one_that_cannot_be_opened_is_noted_too(make_campaign: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    watcher = Silent()
    campaign = tracked(make_campaign, {"kind": "tensorboard", "folder": str(tmp_path / "file" / "in")})
    assert search(campaign, tmp_path / "run", watcher=watcher).is_finished
    assert sum("trackers[0] (tensorboard) failed" in note for note in watcher.notes) == 1


def test_a_missing_client_is_one_line(make_campaign: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.CLIENTS, "wandb", "no_such_client")
    with pytest.raises(CampaignError, match=r"trackers\[0\]: no_such_client .* pip install 'evomerge\[wandb\]'"):
        search(tracked(make_campaign, {"kind": "wandb"}), tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "tensorbord"}, "trackers: unknown kind 'tensorbord'; did you mean 'tensorboard'?"),
        ({"kind": "mlflow", "url": "x"}, "trackers[0].url: unknown key; did you mean 'uri'?"),
        ({"kind": "wandb", "mode": "off"}, "trackers[0].mode: expected 'online' or 'offline', found 'off'"),
    ],
)
def test_mistakes_in_the_file_are_named(campaign_file: Callable[..., Path], given: Any, message: str) -> None:
    with pytest.raises(CampaignError) as caught:
        read_campaign(campaign_file(trackers=[given]))
    assert message in str(caught.value)


def test_a_password_is_neither_taken_nor_shown(campaign_file: Callable[..., Path]) -> None:
    with pytest.raises(CampaignError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        read_campaign(campaign_file(trackers=[{"kind": "mlflow", "uri": "https://me:secret@host"}]))
    assert "secret" not in str(caught.value)


def test_trackers_change_nothing_of_what_a_run_means(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file()
    plain = read_campaign(path)
    sections = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**sections, "trackers": [{"kind": "tensorboard", "folder": "here"}]}))
    tracking = read_campaign(path)
    assert tracking.meaning() == plain.meaning()
    assert tracking.trackers[0].folder == str(path.parent / "here")
    assert Tensorboard in trackers.TRACKERS.values()
