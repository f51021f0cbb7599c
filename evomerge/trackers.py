"""Trackers: where a run is shown beside others, each through its own client.

One class a tracker; a step is a trial's place among the results. A session that resumes a run goes on with the
tracker's run of before: ``identity`` is the same for all sessions of a run, and differs between runs.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import Discriminator, Tag, model_validator

from evomerge.errors import CampaignError
from evomerge.records import Options

LONGEST_PARAMETER = 6000  # that MLflow takes


class TensorboardOptions(Options):
    """Event files for TensorBoard, in a folder (default: beside the run)."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str | None = None

    def located(self, folder: Path) -> "TensorboardOptions":
        """Return the options with an absolute path, given relative to a folder."""
        return self.model_copy(update={"folder": _located(self.folder, folder)})


class MlflowOptions(Options):
    """MLflow; uri: of its server or database, as MLflow reads it (default: what MLFLOW_TRACKING_URI says)."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    experiment: str = "evomerge"

    @model_validator(mode="after")
    def _hold_no_password(self) -> "MlflowOptions":
        if self.uri is not None and urlsplit(self.uri).password is not None:
            raise ValueError(
                "expected a uri without a password, which the record would keep; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD instead"
            )
        return self

    def located(self, folder: Path) -> "MlflowOptions":  # noqa: ARG002
        """Return the options: they hold no path of ours."""
        return self


class WandbOptions(Options):
    """Weights & Biases; mode ``offline`` writes files for ``wandb sync`` into a folder (default: beside the run)."""

    kind: Literal["wandb"] = "wandb"
    project: str = "evomerge"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    folder: str | None = None

    def located(self, folder: Path) -> "WandbOptions":
        """Return the options with an absolute path, given relative to a folder."""
        return self.model_copy(update={"folder": _located(self.folder, folder)})


KINDS: dict[Any, type[Options]] = {"tensorboard": TensorboardOptions, "mlflow": MlflowOptions, "wandb": WandbOptions}


def kind_of(given: Any) -> Any:
    """Return the kind that a section of the file, or options, name."""
    return given.get("kind") if isinstance(given, Mapping) else getattr(given, "kind", None)


TrackerOptions = Annotated[
    Annotated[TensorboardOptions, Tag(TensorboardOptions.__name__)]
    | Annotated[MlflowOptions, Tag(MlflowOptions.__name__)]
    | Annotated[WandbOptions, Tag(WandbOptions.__name__)],
    Discriminator(lambda given: KINDS[kind_of(given)].__name__),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """What a tracker is told of a run: its name and identity, the campaign (JSON by key), and the folder beside it."""

    name: str
    identity: str
    campaign: Mapping[str, str]
    folder: Path


class Tracker(Protocol):
    """One tracker's run. Its client raises whatever it likes."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table; a later one of the same name replaces it."""

    def close(self, *, finished: bool) -> None:
        """Write what is left; say whether the run has come to its end."""


class Tensorboard:
    """Event files, by tensorboardX."""

    def __init__(self, options: TensorboardOptions, run: Tracked) -> None:
        from tensorboardX import SummaryWriter

        folder = options.folder or str(run.folder / "tensorboard")
        # Files are named after the second: a session that follows at once would write over the one before.
        self._writer = SummaryWriter(folder, flush_secs=10, filename_suffix=f".{time.time_ns()}")
        self._writer.add_text("campaign", _markdown(("key", "value"), list(run.campaign.items())))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a scalar a number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a text with the table in it."""
        self._writer.add_text(name, _markdown(columns, rows))

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        """Close the file."""
        self._writer.close()


class Mlflow:
    """A run of an MLflow experiment."""

    TAG = "evomerge.run"

    def __init__(self, options: MlflowOptions, run: Tracked) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the terminal is the search's
        self._client = MlflowClient(options.uri)
        experiment = self._client.get_experiment_by_name(options.experiment)
        place = experiment.experiment_id if experiment else self._client.create_experiment(options.experiment)
        earlier = self._client.search_runs([place], f"tags.`{self.TAG}` = '{run.identity}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
            return
        made = self._client.create_run(place, run_name=run.name, tags={self.TAG: run.identity})
        self._id = made.info.run_id
        parameters = [Param(key, value[:LONGEST_PARAMETER]) for key, value in run.campaign.items()]
        self._client.log_batch(self._id, params=parameters)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log all numbers in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, number, now, step) for name, number in numbers.items()])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a JSON file in the form that MLflow shows as a table."""
        self._client.log_dict(self._id, {"columns": list(columns), "data": [list(row) for row in rows]}, f"{name}.json")

    def close(self, *, finished: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Wandb:
    """A run of a Weights & Biases project."""

    def __init__(self, options: WandbOptions, run: Tracked) -> None:
        import wandb

        folder = Path(options.folder) if options.folder else run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            dir=str(folder),
            id=run.identity,
            name=run.name,
            resume="allow" if options.mode == "online" else None,
            config=dict(run.campaign),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log all numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, *, finished: bool) -> None:
        """End the client's run."""
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[type[Options], Any] = {TensorboardOptions: Tensorboard, MlflowOptions: Mlflow, WandbOptions: Wandb}
CLIENTS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # kind and extra -> module


def open_tracker(options: Any, run: Tracked) -> Tracker:
    """Begin a tracker's run, or go on with it. Raises whatever its client does."""
    tracker: Tracker = TRACKERS[type(options)](options, run)
    return tracker


def require_clients(options: Sequence[Any]) -> None:
    """Raise CampaignError if the client of a tracker is not installed."""
    for number, one in enumerate(options):
        if find_spec(CLIENTS[one.kind]) is None:
            raise CampaignError(
                f"trackers[{number}]: {CLIENTS[one.kind]} is not installed; pip install 'evomerge[{one.kind}]'"
            )


def _located(given: str | None, folder: Path) -> str | None:
    return None if given is None else str((folder / Path(given).expanduser()).resolve())


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
