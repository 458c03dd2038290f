"""What each role can do: one matrix, which a test runs and docs/roles.md shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import sqlalchemy

import db
from db.config import Settings
from db.migrate import upgrade
from db.rebuild import RebuildPlan, rebuild
from db.reset import reset
from db.roles import KINDS, RolesPlan, make_roles

VECTOR = [1.0, 0, 0, 0, 0, 0, 0, 0]


def document(id_: str, **more: Any) -> dict[str, Any]:
    chunk = {"text": f"a piece of {id_}", "embedding": VECTOR}
    given = {"id": id_, "text": id_, "embedding": VECTOR, "chunks": [chunk], "metadata": {"workspace": "w"}}
    return given | {"source_id": "s"} | more


class Embedder:
    model_id = "test-model"
    dimensions = 8

    def embed(self, texts):
        return np.tile(np.asarray(VECTOR, dtype=np.float32), (len(texts), 1))


def item(id_: str) -> dict[str, Any]:
    return {"id": id_, "text": f"text of {id_}", "metadata": {"workspace": "w"}}


def wrote(result: Any) -> str:
    assert not result.errors, result.errors
    assert result.inserted == 1
    return ""


def steps(result: Any) -> str:
    assert not [step for step in result.steps if step.outcome in ("failed", "not reached")], result.steps
    return ", ".join(step.name for step in result.steps if step.outcome == "not permitted")


def vacuumed(result: Any) -> str:
    return "" if result.vacuumed else "VACUUM"


def in_bulk(store: Any) -> str:
    with store.bulk_load():
        return wrote(store.batch_upsert([document("bulk")]))


def own_sql(store: Any) -> str:
    with store.transaction() as connection:
        connection.execute(sqlalchemy.text("UPDATE embeddings SET text = 'own' WHERE id = 'kept'"))
        store.record_write(connection, everything=True)
    return ""


def examined(findings: Any) -> str:
    return ", ".join(f.check for f in findings if "may not" in f.evidence or "permission denied" in f.evidence)


def found(result: Any) -> str:
    assert len(result) > 0
    return ""


def nothing(_: Any) -> str:
    return ""


# In this order. Each begins where those before have left the store, whichever of them worked.
OPERATIONS: dict[str, Callable[[Any], str]] = {
    "search": lambda store: found(store.search(VECTOR, 3)),
    "search of a text": lambda store: found(store.search("which?", 3)),
    "get": lambda store: found(store.get(["kept"])),
    "iter_hashes": lambda store: found(list(store.iter_hashes())),
    "batch_upsert": lambda store: wrote(store.batch_upsert([document("new")])),
    "embed_batch": lambda store: wrote(store.embed_batch([item("embedded")])),
    "sync": lambda store: wrote(store.sync([item("synced")], source_id="t")),
    "transaction, record_write": own_sql,
    "delete": lambda store: nothing(store.delete(["gone"])),
    "delete_by_source_id": lambda store: nothing(store.delete_by_source_id("t")),
    "delete_by_source_id(cascade=False)": lambda store: nothing(store.delete_by_source_id("u", cascade=False)),
    "cleanup_orphaned": lambda store: vacuumed(store.cleanup_orphaned()),
    "get_statistics": lambda store: nothing(store.get_statistics()),
    "get_diagnostics": lambda store: nothing(store.get_diagnostics()),
    "measure_recall": lambda store: nothing(store.measure_recall(k=2, sample=5)),
    "maintain": lambda store: steps(store.maintain()),
    "doctor": lambda store: examined(store.doctor()),
    "pause_ingestion": lambda store: nothing(store.pause_ingestion("a test")),
    "resume_ingestion": lambda store: nothing(store.resume_ingestion()),
    "bulk_load": in_bulk,
}
# Operators' verbs, on a connection of their own; "migrate" from the revision before.
VERBS: dict[str, Callable[[Settings, str], Any]] = {
    "migrate": lambda settings, _: upgrade(settings.database_url),
    "migrate --roles": lambda settings, prefix: make_roles(settings.database_url, RolesPlan(prefix)),
    "rebuild": lambda settings, _: rebuild(settings, RebuildPlan()),
    "reset": lambda settings, _: reset(settings),
}

WORKS, DENIED = "works", "PermissionDeniedError"
_NO_UPKEEP = "prune the write log, retire metrics, retire run history, retire cached vectors"
_BUILD = "build missing indexes"
_VACUUM = "vacuum performance_metrics"


def but(*denied: str) -> str:
    return f"not permitted: {', '.join(denied)}"


# Outcomes of owner, app, reader, tenant; a pair is PostgreSQL 16 and 17 or newer, where VACUUM can be granted.
Outcome = str | tuple[str, str]
MATRIX: dict[str, tuple[Outcome, Outcome, Outcome, Outcome]] = {
    "search": (WORKS, WORKS, WORKS, WORKS),
    "search of a text": (WORKS, WORKS, WORKS, WORKS),
    "get": (WORKS, WORKS, WORKS, WORKS),
    "iter_hashes": (WORKS, WORKS, WORKS, WORKS),
    "batch_upsert": (WORKS, WORKS, DENIED, WORKS),
    "embed_batch": (WORKS, WORKS, DENIED, WORKS),
    "sync": (WORKS, WORKS, DENIED, WORKS),
    "transaction, record_write": (WORKS, WORKS, DENIED, WORKS),
    "delete": (WORKS, WORKS, DENIED, WORKS),
    "delete_by_source_id": (WORKS, WORKS, DENIED, WORKS),
    "delete_by_source_id(cascade=False)": (WORKS, WORKS, DENIED, DENIED),
    "cleanup_orphaned": (WORKS, (but("VACUUM"), WORKS), DENIED, but("VACUUM")),
    "get_statistics": (WORKS, WORKS, WORKS, DENIED),
    "get_diagnostics": (WORKS, WORKS, WORKS, WORKS),
    "measure_recall": (WORKS, WORKS, WORKS, DENIED),
    "maintain": (
        WORKS,
        (but(_BUILD, _VACUUM), but(_BUILD)),
        but(_NO_UPKEEP, _BUILD, _VACUUM, "record the run"),
        but(_NO_UPKEEP, "remove leftovers", _BUILD, _VACUUM, "record the run"),
    ),
    "doctor": (WORKS, WORKS, WORKS, but("pool, invalidations, maintenance, rebuild")),
    "pause_ingestion": (WORKS, WORKS, DENIED, DENIED),
    "resume_ingestion": (WORKS, WORKS, DENIED, DENIED),
    "bulk_load": (WORKS, DENIED, DENIED, DENIED),
    "migrate": (WORKS, DENIED, DENIED, DENIED),
    "migrate --roles": (WORKS, DENIED, DENIED, DENIED),
    "rebuild": (WORKS, DENIED, DENIED, DENIED),
    "reset": (WORKS, DENIED, DENIED, DENIED),
}


def expected(kind: str, server: int) -> dict[str, str]:
    """The column of a role's kind, on a server of that major version."""
    column = {operation: row[KINDS.index(kind)] for operation, row in MATRIX.items()}
    newer = int(server >= 17)
    return {operation: cell if isinstance(cell, str) else cell[newer] for operation, cell in column.items()}


def as_markdown() -> str:
    """The matrix as docs/roles.md shows it."""
    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    lines += [f"| `{operation}` | {' | '.join(map(_shown, row))} |" for operation, row in MATRIX.items()]
    return "\n".join(lines) + "\n"


def _shown(cell: Outcome) -> str:
    if isinstance(cell, str):
        return cell
    return f"16: {cell[0]}; 17 and newer: {cell[1]}"


def outcome(work: Callable[[], Any]) -> str:
    """What became of `work`, which says what it was not permitted; no other error is an outcome."""
    try:
        denied = work()
    except db.PermissionDeniedError:
        return DENIED
    return but(denied) if isinstance(denied, str) and denied else WORKS
