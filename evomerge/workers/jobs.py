"""Ray's job server: searches that run on a cluster after the command that submitted them has ended.

A job's driver runs on the cluster's head node. The server tells everyone who reaches it a job's command, metadata and
environment: no secret may be in them.
"""

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.chat import web_address
from evomerge.errors import CampaignError, InputError, in_one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

RUN = "evomerge_run"  # in a job's metadata: what tells our jobs from others'
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A submitted search: its name, where its run is, and what has become of it.

    state: pending, running, stopped, succeeded or failed. started, ended: seconds since 1970. problem: the last line
    that a failed job printed.
    """

    name: str
    run: str
    state: str
    started: float | None
    ended: float | None
    problem: str

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs or will."""
        return self.state not in ("pending", "running")


class JobServer:
    """The job server of a cluster.

    address: such as ``http://HOST:8265``; by default what RAY_API_SERVER_ADDRESS or RAY_ADDRESS say, or this machine's.
    Raises: InputError if there is none, or Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise InputError("jobs need Ray, which is not installed; pip install 'evomerge[ray]'") from error
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)  # it would tell of every file that it uploads
        try:
            address = address and web_address(address)
        except ValueError as error:
            raise InputError(f"--address: {error}, such as http://HOST:8265; found {address}") from error
        try:
            with _without_addresses() if address else nullcontext():
                self._client = JobSubmissionClient(address)
        except Exception as error:  # Ray raises a dozen unrelated classes
            raise InputError(
                f"no Ray job server at {address or 'this machine'} ({in_one_line(error)}); name one with "
                "--address http://HOST:8265, start a cluster with ray start --head, or set RAY_AUTH_MODE=token if it "
                "asks for a token"
            ) from error
        self.address = self._client.get_address()

    def submit(self, name: str, command: str, run: str, runtime_env: Mapping[str, Any]) -> None:
        """Submit a shell command under a name that no job has; return at once. Raises: CampaignError."""
        try:
            self._client.submit_job(
                entrypoint=command, submission_id=name, metadata={RUN: run}, runtime_env=dict(runtime_env)
            )
        except Exception as error:  # what is wrong with a runtime_env comes as anything
            raise CampaignError(f"the cluster does not take the job: {in_one_line(error)}") from error

    def jobs(self) -> list[Job]:
        """Return the searches that were submitted to the cluster, the latest first."""
        with self._asking():
            listed = self._client.list_jobs()
        found = [_read(details) for details in listed if RUN in (details.metadata or {})]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, name: str) -> Job:
        """Return one of them. Raises: InputError if there is none of that name."""
        for job in self.jobs():
            if job.name == name:
                return job
        raise InputError(
            f"no search {name!r} was submitted to {self.address}; evomerge job status lists those that were"
        )

    def stop(self, name: str) -> Job:
        """Send a job's driver SIGTERM, so that it lets finish what is under way; return the job as it was before."""
        job = self.job(name)
        if not job.is_over:
            with self._asking():
                self._client.stop_job(name)
        return job

    def logs(self, name: str) -> str:
        """Return what a job has printed so far."""
        self.job(name)
        with self._asking():
            return self._client.get_job_logs(name)

    def follow(self, name: str, show: Callable[[str], object]) -> None:
        """Show what a job prints and has printed, until it is over."""
        self.job(name)

        async def show_all() -> None:
            async for lines in self._client.tail_job_logs(name):
                show(lines)

        with self._asking(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how Ray calls aiohttp
            asyncio.run(show_all())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # of requests, of aiohttp, and Ray's own
            raise InputError(f"the job server at {self.address} does not answer: {in_one_line(error)}") from error


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Hide addresses that the environment holds: Ray would take them in place of the one that it is given."""
    held = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _read(details: "JobDetails") -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    lines = (details.message or "").strip().splitlines() if details.status == "FAILED" else []
    return Job(
        name=details.submission_id or "",
        run=(details.metadata or {})[RUN],
        state=details.status.value.lower(),
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        problem=lines[-1] if lines else "",
    )
