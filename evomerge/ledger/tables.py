"""The tables of a ledger, which hold any number of runs. A change to them raises SCHEMA_VERSION (``migration.py``).

Their names have a prefix: the database may hold other tables, such as Optuna's.
"""

from typing import Any

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

SCHEMA_VERSION = 3

metadata = MetaData()


def _run_key() -> Column[int]:
    return Column("run", Integer, primary_key=True, autoincrement=False)


def _keys(*names: str) -> list[Column[Any]]:
    return [_run_key(), *(Column(name, String, primary_key=True) for name in names)]


schema = Table("evomerge_schema", metadata, Column("version", Integer, nullable=False))  # one row

runs = Table(  # before a run has begun, it has neither campaign nor facts
    "evomerge_runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("created", Float, nullable=False),  # Unix seconds
    Column("campaign", String),  # JSON: the campaign as last run
    Column("facts", String),  # JSON: objectives, dimensions, checkpoint hashes, stages that have begun
    Column("test_touches", String, nullable=False),  # JSON: number of finished trials at each use of the test items
)

leases = Table(  # who drives a run; only with its token can anything be written
    "evomerge_leases",
    metadata,
    _run_key(),
    Column("host", String, nullable=False),
    Column("machine", String, nullable=False),  # processes of one machine see each other's ids
    Column("pid", Integer, nullable=False),
    Column("token", String, nullable=False),
    Column("expires", Float, nullable=False),  # Unix seconds
)

trials = Table(  # issued: order is null; finished: order is its place among the results
    "evomerge_trials",
    metadata,
    _run_key(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("stage", Integer, nullable=False),
    Column("stage_index", Integer, nullable=False),
    Column("candidate", String, nullable=False),  # JSON: point, descent, memo
    Column("known", Integer, nullable=False),
    Column("issued", Float, nullable=False),
    Column("finish_order", Integer),
    Column("finished", Float),
    Column("fingerprint", String),
    Column("failure", String),
    Column("fate", String),  # JSON: how it ended
    UniqueConstraint("run", "stage", "stage_index"),
    UniqueConstraint("run", "finish_order"),
)

measurements = Table(  # subject: "trial:12", or a reference model: "base", "expert:rot90", "uniform", "scalar:0.3"
    "evomerge_measurements",
    metadata,
    *_keys("split", "subject"),
    Column("place", Integer, nullable=False),  # in the order in which they were made
    Column("cost", Float, nullable=False),
    Column("seconds", String, nullable=False),  # JSON
    Column("weights", String),
    Column("arrival", String),  # JSON
    Column("stopped", String),  # why a race left the other items out
    UniqueConstraint("run", "place"),
)

scores = Table(
    "evomerge_scores",
    metadata,
    *_keys("split", "subject", "objective"),
    Column("place", Integer, nullable=False),  # among the measurement's scores
    Column("value", Float, nullable=False),
    Column("stderr", Float, nullable=False),
    Column("loss", Float),  # the mean of the companion
    Column("loss_stderr", Float),
)

items = Table(  # apart from the scores, so that these are read without them
    "evomerge_items",
    metadata,
    *_keys("split", "subject", "objective"),
    Column("scores", LargeBinary, nullable=False),  # zlib of little-endian float32, in the order of the split's items
    Column("companion", LargeBinary),  # the same; empty if it is the scores themselves
)
