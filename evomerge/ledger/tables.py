"""The tables of a ledger. A change to them raises SCHEMA_VERSION."""

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

SCHEMA_VERSION = 2

metadata = MetaData()

run = Table(  # one row: what this run is
    "run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("created", Float, nullable=False),  # Unix seconds
    Column("campaign", String, nullable=False),  # JSON: the campaign as last run
    Column("facts", String, nullable=False),  # JSON: objectives, dimensions, checkpoint hashes, stages that have begun
    Column("test_touches", String, nullable=False),  # JSON: number of finished trials at each use of the test items
)

trials = Table(  # issued: order is null; finished: order is its place among the results
    "trials",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("stage", Integer, nullable=False),
    Column("stage_index", Integer, nullable=False),
    Column("candidate", String, nullable=False),  # JSON: point, descent, memo
    Column("known", Integer, nullable=False),
    Column("issued", Float, nullable=False),
    Column("finish_order", Integer, unique=True),
    Column("finished", Float),
    Column("fingerprint", String),
    Column("failure", String),
    UniqueConstraint("stage", "stage_index"),
)

measurements = Table(  # subject: "trial:12", or a reference model: "base", "expert:rot90", "uniform", "scalar:0.3"
    "measurements",
    metadata,
    Column("subject", String, primary_key=True),
    Column("split", String, primary_key=True),
    Column("cost", Float, nullable=False),
    Column("seconds", String, nullable=False),  # JSON
    Column("weights", String),
    Column("arrival", String),  # JSON
    Column("stopped", String),  # why a race left the other items out
)

scores = Table(
    "scores",
    metadata,
    Column("subject", String, primary_key=True),
    Column("split", String, primary_key=True),
    Column("objective", String, primary_key=True),
    Column("value", Float, nullable=False),
    Column("stderr", Float, nullable=False),
    Column("items", LargeBinary, nullable=False),  # zlib of little-endian float32, in the order of the split's items
    Column("companion", LargeBinary),  # the same
)
