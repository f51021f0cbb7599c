"""Ledgers of earlier versions: schema 2 held one run a file, and all of a score in one row."""

import json
from collections import Counter

from sqlalchemy import Connection, insert, inspect, select

from evomerge.ledger import tables
from evomerge.ledger.rows import item_numbers_of, loss_columns
from evomerge.records import Score

RUN = 1
COPY = (
    "INSERT INTO evomerge_trials (run, number, stage, stage_index, candidate, known, issued, finish_order, finished, "
    "fingerprint, failure) SELECT 1, number, stage, stage_index, candidate, known, issued, finish_order, finished, "
    "fingerprint, failure FROM trials",
    "INSERT INTO evomerge_measurements (run, split, subject, place, cost, seconds, weights, arrival, stopped) "
    "SELECT 1, split, subject, rowid, cost, seconds, weights, arrival, stopped FROM measurements",
    "INSERT INTO evomerge_items (run, split, subject, objective, scores, companion) "
    "SELECT 1, split, subject, objective, items, companion FROM scores",
)
SCORES = "SELECT split, subject, objective, value, stderr, items AS scores, companion FROM scores ORDER BY rowid"


def schema_version(connection: Connection) -> int | None:
    """Return the version of the schema; None if the database holds no tables of ours."""
    inspector = inspect(connection)
    if inspector.has_table(tables.schema.name):
        return int(connection.execute(select(tables.schema.c.version)).scalar_one())
    if {"run", "trials", "measurements", "scores"} <= set(inspector.get_table_names()):
        return int(connection.exec_driver_sql("SELECT schema_version FROM run").scalar_one())
    return None


def make_tables(connection: Connection) -> None:
    """Make the tables of the present schema, and note its version."""
    tables.metadata.create_all(connection)
    connection.execute(insert(tables.schema).values(version=tables.SCHEMA_VERSION))


def upgrade_from_2(connection: Connection) -> None:
    """Make the present tables of those of schema 2, which go."""
    make_tables(connection)
    run = connection.exec_driver_sql("SELECT created, campaign, facts, test_touches FROM run").one()
    name = json.loads(run.campaign)["name"]
    connection.execute(insert(tables.runs).values(id=RUN, name=name, **run._mapping))
    for statement in COPY:
        connection.exec_driver_sql(statement)
    places = Counter[tuple[str, str]]()
    for row in connection.exec_driver_sql(SCORES).all():
        items, companion = item_numbers_of(row)
        score = Score(value=row.value, stderr=row.stderr, items=items, companion=companion)
        key = {"run": RUN, "split": row.split, "subject": row.subject, "objective": row.objective}
        numbers = {"value": row.value, "stderr": row.stderr, **loss_columns(score)}
        connection.execute(insert(tables.scores).values(place=places[row.split, row.subject], **key, **numbers))
        places[row.split, row.subject] += 1
    for table in ("run", "trials", "measurements", "scores"):
        connection.exec_driver_sql(f"DROP TABLE {table}")
