"""The Ray cluster that a campaign's workers run on: connecting to it, and how many of them it has room for."""

import logging
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from evomerge.errors import CampaignError, in_one_line
from evomerge.records import Options

AGAIN_S = 5.0  # until a cluster that refused is asked once more


class RayOptions(Options):
    """Score on workers that Ray runs.

    address: ``auto`` (a running cluster), ``ray://host:10001`` (one elsewhere), ``local`` (start one here); by default
    a running cluster if there is one, else one is started here. count: workers; ``auto`` is as many as the cluster has
    room for, now and later. cpus, gpus: of each worker; gpus may be a fraction, ``auto`` is one where the cluster has
    any. timeout_s: seconds after which a candidate has failed. attempts: how often a candidate is tried whose worker
    died. runtime_env: Ray's own, for code that workers do not have installed.
    """

    kind: Literal["ray"]
    address: str | None = None
    count: PositiveInt | Literal["auto"] = "auto"
    cpus: PositiveFloat = 1.0
    gpus: float | Literal["auto"] = Field(default="auto")
    timeout_s: PositiveFloat | None = None
    attempts: PositiveInt = 3
    runtime_env: dict[str, Any] | None = None

    @field_validator("gpus")
    @classmethod
    def _can_be_placed(cls, given: float | str) -> float | str:
        if isinstance(given, float) and not (0 <= given <= 1 or (given > 1 and given % 1 == 0)):
            raise ValueError("expected a fraction of one GPU, or a whole number of them")
        return given

    def located(self, folder: Path) -> "RayOptions":
        """Return the options with absolute paths in runtime_env, given relative to a folder. Raises: CampaignError."""

        def locate(given: Any) -> Any:
            if not isinstance(given, str) or "://" in given:
                return given
            path = folder / Path(given).expanduser()
            if not path.exists():
                raise CampaignError(f"workers.runtime_env: {given}: no such folder or file in {folder}")
            return str(path.resolve())

        env = dict(self.runtime_env or {})
        if "working_dir" in env:
            env["working_dir"] = locate(env["working_dir"])
        if isinstance(env.get("py_modules"), list):
            env["py_modules"] = [locate(given) for given in env["py_modules"]]
        return self.model_copy(update={"runtime_env": env}) if env else self


class RayCluster:
    """A cluster that is connected to, or started on this machine; both end with ``close``.

    ray: the library, connected. gpus: of each worker. Raises: CampaignError if there is no such cluster.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self.ray, self._is_ours = _connect(options)
        if options.gpus == "auto":
            self.gpus = float(any(node["Resources"].get("GPU", 0) for node in self._alive_nodes()))
        else:
            self.gpus = options.gpus

    def close(self) -> None:
        """Leave the cluster, and stop it if it was started for this."""
        if self._is_ours:
            self.ray.shutdown()

    def room(self) -> int:
        """How many workers the cluster would hold now if nothing else ran there."""
        return sum(places(node["Resources"], self._options.cpus, self.gpus) for node in self._alive_nodes())

    def _alive_nodes(self) -> list[Mapping[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]


def _connect(options: RayOptions) -> tuple[Any, bool]:
    """Connect to the cluster that the options name; return Ray, and whether it was connected to for this pool.

    Raises: CampaignError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are what the machine is for
    try:
        import ray
    except ImportError as error:
        raise CampaignError("workers: ray is not installed; pip install 'evomerge[ray]'") from error
    ray._private.worker._worker_logs_enabled = False  # of a death it prints a screenful; ``notify`` says it in a line
    if ray.is_initialized():
        return ray, False
    asked: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": options.runtime_env}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if options.address is None:
                with suppress(ConnectionError):
                    ray.init("auto", **asked)
                    return ray, True
            if options.address in {None, "local"}:
                asked["include_dashboard"] = False
            try:
                ray.init(options.address or "local", **asked)
            except ConnectionAbortedError:  # a head that has just started cannot always serve its first client
                time.sleep(AGAIN_S)
                ray.init(options.address or "local", **asked)
        except Exception as error:  # Ray raises a dozen unrelated classes
            raise CampaignError(
                f"workers.address: no Ray cluster at {options.address or 'this machine'} ({in_one_line(error)}); start "
                "one with ray start --head, leave the address out, or set RAY_AUTH_MODE=token if it asks for a token"
            ) from error
    return ray, True


def places(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers one machine has room for; a fraction of a GPU lies on one of them."""
    by_cpu = _times(resources.get("CPU", 0.0), cpus)
    if not gpus:
        return by_cpu
    num_gpus = resources.get("GPU", 0.0)
    return min(by_cpu, int(num_gpus) * _times(1.0, gpus) if gpus < 1 else _times(num_gpus, gpus))


def _times(whole: float, part: float) -> int:
    """How often a part fits into a whole, in the ten-thousandths that Ray counts in: 0.1 fits into 1 ten times."""
    return round(whole * 1e4) // max(round(part * 1e4), 1)
