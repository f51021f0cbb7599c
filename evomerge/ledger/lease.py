"""The lease on a run: one driver at a time, enforced by the database.

A row names the holder and when its lease ends; the holder puts the end off every few seconds and with every write. A
write checks the holder's token in its own transaction, so that a driver that was taken over writes nothing more. A
successor waits until the lease has ended, or takes it at once from a process of this machine that no longer lives.
"""

import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, insert, select, update

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger.database import Database
from evomerge.ledger.location import Location
from evomerge.ledger.tables import leases

DURATION_S = 60.0
RENEWAL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that drives a run. machine: processes of one machine see each other's ids."""

    host: str
    machine: str
    pid: int
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine and is no more."""
        return self.machine == _machine() and not _lives(self.pid)


class Lease:
    """The lease of the present process on one run, from ``take`` to ``release``."""

    def __init__(self, database: Database, run: int, location: Location) -> None:
        self._database, self._run, self._location = database, run, location
        self._holder = Holder(
            host=socket.gethostname(), machine=_machine(), pid=os.getpid(), token=secrets.token_hex(16)
        )
        ours = (leases.c.run == run) & (leases.c.token == self._holder.token)
        self._renewal = update(leases).where(ours).values(expires=database.now + DURATION_S)
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease on {location}", daemon=True)

    def take(self, connection: Connection) -> None:
        """Take the lease; call while no other driver comes or goes. Raises: RunError if another process has it."""
        found = held(self._database, connection, self._run, lock=True)
        if found is not None:
            holder, seconds_left = found
            raise RunError(
                f"{self._location}: {holder} is driving this run; its lease ends at {_clock(seconds_left)} unless "
                f"it is renewed: wait for it or stop it, or look on with evomerge front {self._location.quoted}"
            )
        connection.execute(delete(leases).where(leases.c.run == self._run))
        row = {"run": self._run, **asdict(self._holder), "expires": self._database.now + DURATION_S}
        connection.execute(insert(leases).values(row))

    def renew(self, connection: Connection) -> None:
        """Put the end off, and hold off whoever would take over until the transaction ends. Raises: EvoMergeError."""
        if connection.execute(self._renewal).rowcount != 1:
            found = held(self._database, connection, self._run)
            raise EvoMergeError(
                f"{self._location}: {found[0] if found else 'another process'} has taken this run over, because this "
                f"one was not heard of for {DURATION_S:.0f} s; this one stops and has written nothing since"
            )

    def keep(self) -> None:
        """Renew the lease from now on, until it is released."""
        self._heart.start()

    def release(self, connection: Connection) -> bool:
        """Give the lease back; return whether it was still ours."""
        ours = (leases.c.run == self._run) & (leases.c.token == self._holder.token)
        return connection.execute(delete(leases).where(ours)).rowcount == 1

    def stop(self) -> None:
        """Renew it no more."""
        self._released.set()
        if self._heart.is_alive():
            self._heart.join()

    def _beat(self) -> None:
        while not self._released.wait(RENEWAL_S):
            with suppress(EvoMergeError), self._database.writing() as connection:  # the next record says what is wrong
                self.renew(connection)


def held(database: Database, connection: Connection, run: int, *, lock: bool = False) -> tuple[Holder, float] | None:
    """Return who drives a run and for how many seconds it may do so; None if nobody does, or nobody that lives.

    lock: the lease cannot be renewed before the transaction ends.
    """
    columns = [leases.c[name] for name in ("host", "machine", "pid", "token")]
    query = select(*columns, (leases.c.expires - database.now).label("left")).where(leases.c.run == run)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        return None
    holder = Holder(host=row.host, machine=row.machine, pid=row.pid, token=row.token)
    return None if row.left <= 0 or holder.is_dead else (holder, row.left)


def _machine() -> str:
    """Name this start of this machine, or the container in it: what process ids are unique in."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux says more than the name
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _clock(seconds_left: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() + seconds_left))
