"""Where a run lives: in a folder of its own, or under a name in a database of many, SQLite or PostgreSQL."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from evomerge.errors import RunError
from evomerge.strict import NAME

FILE_NAME = "ledger.sqlite"
DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
SECRETS = ("password", "sslpassword")  # among the parameters of a URL


@dataclass(frozen=True, slots=True, repr=False)
class Location:
    """A run's database and its name there; without a name, the only run that the database holds.

    folder: of a run that has one of its own, beside its ledger. Printed, it is what a person types, without passwords.
    """

    url: URL
    name: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder)
        return shown(self.url) + (f"#{self.name}" if self.name else "")

    __repr__ = __str__

    def file(self, name: str) -> Path:
        """Return a file in the run's folder. Raises: RunError if it has none."""
        if self.folder is None:
            raise RunError(f"{self}: a run in a database has no folder for {name}; say where with --out")
        return self.folder / name

    def beside(self, name: str) -> Path:
        """Return where what goes with the run lies: in its folder; of a database, beside its file, or under runs/.

        In a database, the location must have the run's name.
        """
        if self.folder is not None:
            return self.folder / name
        return (self.path.parent if self.path else Path("runs")) / f"{self.name}.{name}"

    @property
    def path(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(str(self.url.database)) if self.url.get_backend_name() == "sqlite" else None

    @property
    def is_missing(self) -> bool:
        """Whether there is no file, which looking for a run would make."""
        return self.path is not None and not self.path.is_file()

    @property
    def quoted(self) -> str:
        """As it is typed in a shell."""
        return quote(str(self))

    @property
    def absolute(self) -> "Location":
        """The same place, whatever the working directory."""
        if self.path is None:
            return self
        path = self.path.absolute()
        return replace(self, url=self.url.set(database=str(path)), folder=self.folder and path.parent)

    @property
    def has_secret(self) -> bool:
        """Whether the URL holds a password."""
        return self.url.password is not None or any(key in self.url.query for key in SECRETS)

    def called(self, name: str) -> "Location":
        """Return the location with a name, where it needs one and has none."""
        return self if self.folder or self.name else replace(self, name=name)


def locate(given: str | Path | Location) -> Location:
    """Read a folder, ``URL`` or ``URL#NAME``. Raises: RunError for a URL that is none of ours."""
    if isinstance(given, Location):
        return given
    if isinstance(given, Path) or "://" not in given:
        folder = Path(given)
        return Location(URL.create(DRIVERS["sqlite"], database=str(folder / FILE_NAME)), folder=folder)
    address, _, name = given.rpartition("#") if "#" in given else (given, "", "")
    if name and not re.search(NAME, name):  # it may be the end of a password: it is not shown
        raise RunError(
            "expected URL#NAME with a name of letters, digits, '.', '_' and '-', found another one; "
            "in a password, write # as %23"
        )
    try:
        url = make_url(address)
        url = url.set(drivername=DRIVERS[url.drivername])
    except (ArgumentError, KeyError, ValueError) as error:
        raise RunError(
            "expected a database as postgresql://USER@HOST/DATABASE or sqlite:///FILE, found another URL "
            f"({given.partition('://')[0]}://...)"
        ) from error
    if not url.database:
        raise RunError(f"{shown(url)}: expected the name of a database at the end of the URL, found none")
    return Location(url, name or None)


def find_place(given: str | Path | Location) -> Location:
    """Return a run's place or that of many, as given; if nothing is there but under runs/ is, a run's of that name."""
    location = locate(given)
    if location.folder is None or not location.is_missing:
        return location
    named = locate(Path("runs") / location.folder)
    return location if named.is_missing else named


def shown(url: URL) -> str:
    """Return a URL as it is typed, without its passwords."""
    hidden = url.set(drivername=url.get_backend_name()).update_query_dict(
        {key: "***" for key in SECRETS if key in url.query}
    )
    address, mark, query = hidden.render_as_string(hide_password=True).partition("?")
    return address + mark + query.replace("%2A", "*").replace("%2F", "/")
