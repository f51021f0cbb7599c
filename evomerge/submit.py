"""A campaign handed to a cluster: its file, as it is read here, and the command that searches there.

The file travels with the job; checkpoints and data do not. Its paths, and the run's, are absolute by then: they must
lead to the same files on the cluster, in a file system that its machines share.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.errors import CampaignError, RunError
from evomerge.ledger.location import Location, locate
from evomerge.strict import read_yaml
from evomerge.workers.jobs import JobServer
from evomerge.workers.ray_cluster import RayOptions

DRAIN_S = 3600
"""How long a driver that is stopped may finish what is under way; left to itself, Ray kills it after 3 seconds."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was submitted: its name, where its run is, and to which server."""

    job: str
    run: Location
    server: str


def submit(file: Path, address: str | None = None, *, run: str | None = None, workers: str | None = None) -> Submitted:
    """Submit a campaign's search, new or to be resumed, to the job server at an address (default: see JobServer).

    run: folder, URL or URL#NAME, as the cluster's head node finds it (default: runs/NAME of the campaign, here).
    workers: in place of the file's; as many of the cluster's as there is room for, if that names none.
    Raises: InputError for a mistake in the file, a password in the run's URL, no server, or another job on the run.
    """
    campaign = read_campaign(file, workers=workers)
    options = _ray_options(campaign, workers)
    location = locate(run or Path("runs") / campaign.name).called(campaign.name).absolute
    if location.has_secret:
        raise RunError(
            f"{location}: who sees the cluster's jobs would see the password; leave it out of the URL and give it to "
            "the cluster's head node, as PGPASSWORD or in ~/.pgpass"
        )
    server = JobServer(address)
    for job in server.jobs():
        if job.run == str(location) and not job.is_over:
            raise RunError(f"{location}: {job.name} is driving this run; wait for it, or evomerge job stop {job.name}")
    name = f"{campaign.name}-{secrets.token_hex(4)}"
    with TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_text(yaml.safe_dump(_anywhere(file, campaign, options), sort_keys=False), encoding="utf-8")
        command = f"exec evomerge search {quote(file.name)} --run {location.quoted}"
        server.submit(name, command, str(location), _runtime_env(options.runtime_env or {}, copy))
    return Submitted(name, location, server.address)


def _ray_options(campaign: Campaign, workers: str | None) -> RayOptions:
    options = campaign.workers
    if not isinstance(options, RayOptions):
        if workers is not None:
            raise CampaignError(f"--workers: a job scores on workers of its cluster; expected ray, found {workers}")
        return RayOptions(kind="ray")
    if options.address not in {None, "auto"}:
        raise CampaignError(
            f"workers.address: a job scores on the cluster that it is submitted to, found {options.address!r}; leave "
            "the address out, and name the cluster's job server with --address"
        )
    return options


def _anywhere(file: Path, campaign: Campaign, options: RayOptions) -> dict[str, Any]:
    """Return the file's sections, saying the same from any folder; its workers have the job's runtime_env."""
    return {
        **read_yaml(file),
        "base": campaign.base,
        "experts": dict(campaign.experts),
        "evaluation": dict(campaign.evaluation),
        "workers": options.model_dump(exclude={"runtime_env"}),
    }


def _runtime_env(given: Mapping[str, Any], copy: Path) -> dict[str, Any]:
    """Return what the campaign asks for its workers, for driver and workers: the campaign file lies in its folder."""
    if own := given.get("working_dir"):
        if not Path(own).is_dir():
            raise CampaignError(
                f"workers.runtime_env.working_dir: expected a folder, which the campaign file can join, found {own}; "
                "name what lies elsewhere under py_modules"
            )
        for entry in Path(own).iterdir():
            if entry.name != copy.name:
                (copy.parent / entry.name).symlink_to(entry.resolve())
    here = os.path.dirname(sys.executable)  # for a cluster that was started from an environment without activating it
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_S), "PATH": f"${{PATH}}:{here}"}
    return {**given, "working_dir": str(copy.parent), "env_vars": ours | (given.get("env_vars") or {})}
