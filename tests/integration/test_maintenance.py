"""maintain(): each step does what it says, tells what it could not, and one process runs it at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

import db
from db import BusyError, ClosedError, MaintenanceIncomplete, ValidationError, row_counts
from db.config import Settings
from db.locks import LOCK_CLASS, Purpose
from db.rebuild import RebuildPlan, rebuild
from tests.integration.examining import Examiner, plain_owner
from tests.integration.roles_of import roles_of

VECTOR = [1.0, *[0.0] * 7]


def outcomes(result):
    return {step.name: step.outcome for step in result.steps}


def details(result, name):
    return next(step.details for step in result.steps if step.name == name)


def vectors(count, source="batch"):
    return [
        {"id": f"{source}{n}", "text": "t", "source_id": source, "embedding": [1.0, n + 1.0, *[0.0] * 6]}
        for n in range(count)
    ]


# -- the write log -------------------------------------------------------------------------------------------


# A transaction that runs anywhere on the server holds the pruning back: the tests try until none does.


def prune(store):
    return store.maintain(skip_index=True, skip_compaction=True).rows_removed


def test_old_rows_of_the_write_log_go_and_the_watermark_rises_above_them(store, sql, until):
    for n in range(5):
        store.batch_upsert([{"id": f"{n}", "text": "t"}])
    sql("UPDATE write_log SET created_at = now() - interval '1 day' WHERE id <= 3")
    removed = []
    until(lambda: removed.append(prune(store)) or sum(removed) == 3)
    [(kept, lowest)] = sql("SELECT count(*), min(xid::text::bigint) FROM write_log")
    [(watermark,)] = sql("SELECT xid::text::bigint FROM write_log_watermark")
    assert kept == 2
    assert 0 < watermark <= lowest
    assert prune(store) == 0
    assert sql("SELECT xid::text::bigint FROM write_log_watermark")[0][0] >= watermark


def test_rows_that_a_running_transaction_may_not_see_are_kept(store, sql, until, database_url):
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_current_xact_id()")
        store.batch_upsert([{"id": "a", "text": "t"}])
        sql("UPDATE write_log SET created_at = now() - interval '1 day'")
        assert prune(store) == 0
    until(lambda: prune(store) == 1)


def test_a_cached_answer_from_before_the_watermark_is_computed_anew(store, sql, until):
    store.batch_upsert(vectors(3))
    store.search(VECTOR)
    assert store.search(VECTOR).cached
    store.batch_upsert([{"id": "other", "text": "t"}])
    sql("UPDATE write_log SET created_at = now() - interval '1 day'")
    until(lambda: prune(store) > 0 and not sql("SELECT FROM write_log"))
    assert not store.search(VECTOR).cached
    assert store.search(VECTOR).cached


# -- retention -----------------------------------------------------------------------------------------------


def test_builds_past_retention_are_removed_but_the_newest_and_the_last_large_one(store, sql):
    for rows, days in ((5000, 9), (4000, 8), *((0, 7) for _ in range(8)), (0, 1)):
        sql(
            "INSERT INTO index_builds (index_name, table_name, rows, size_bytes, duration_ms, created_at)"
            " VALUES ('chunks_vector_idx', 'chunks', %s, 1, 1, now() - %s * interval '1 day')",
            rows,
            days,
        )
    result = store.maintain(skip_index=True, skip_compaction=True, retention_days=3.5)
    told = "removed 0 runs past retention; removed 5 builds of indexes past retention"
    assert details(result, "retire run history") == told
    assert sql("SELECT rows FROM index_builds ORDER BY id") == [(4000,), (0,), (0,), (0,), (0,), (0,)]


def test_metrics_and_runs_past_retention_are_removed(store, sql):
    sql("""
        INSERT INTO performance_metrics (operation, duration_ms, created_at)
        SELECT 'x', 1, now() - make_interval(days => n) FROM generate_series(1, 10) AS n
    """)
    for _ in range(3):
        store.maintain(skip_index=True, skip_compaction=True)
    sql("UPDATE maintenance_runs SET finished_at = now() - interval '4 days'")
    assert sql("SELECT count(*) FROM performance_metrics WHERE operation = 'x'") in ([(6,)], [(7,)])
    result = store.maintain(skip_index=True, skip_compaction=True, retention_days=3.5)
    assert sql("SELECT count(*) FROM performance_metrics WHERE operation = 'x'") == [(3,)]
    assert details(result, "retire run history") == "removed 2 runs past retention"  # the newest good one tells when


def test_the_vector_cache_shrinks_to_its_limit_the_least_used_first(database_url, redis_url, sql):
    embedder = db.CallableEmbedder(lambda texts: [[1.0, len(t)] for t in texts], "test-model", 2)
    with db.connect(database_url, redis_url, embedder=embedder, vector_cache_mb=0.001) as store:
        for n in range(30):
            store.embed("x" * (n + 1))
        before = sql("SELECT count(*), sum(pg_column_size(vector_cache.*)) FROM vector_cache")[0]
        newest = sql("SELECT key FROM vector_cache ORDER BY last_used DESC, key LIMIT 1")
        assert before[1] > 1048
        store.maintain(skip_index=True, skip_compaction=True)
    after = sql("SELECT count(*), sum(pg_column_size(vector_cache.*)) FROM vector_cache")[0]
    assert 0 < after[0] < before[0]
    assert after[1] <= 1048 * 1.02
    assert sql("SELECT key FROM vector_cache ORDER BY last_used DESC, key LIMIT 1") == newest


# -- indexes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "DROP INDEX embeddings_vector_idx",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass",
    ],
    ids=["missing", "invalid"],
)
def test_an_index_that_is_missing_or_invalid_is_built(store, sql, damage):
    store.batch_upsert(vectors(5))
    sql(damage)
    result = store.maintain(skip_cleanup=True, skip_compaction=True)
    assert outcomes(result)["build missing indexes"] == "done"
    assert result.index_rebuilt
    assert result.index.valid
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_vector_idx'::regclass") == [(True,)]
    again = store.maintain(skip_cleanup=True, skip_compaction=True)
    assert outcomes(again)["build missing indexes"] == "skipped"
    assert not again.index_rebuilt


@pytest.fixture
def stale(database_url, redis_url, sql):
    """A store more than half of whose vectors are dead, and no autovacuum at work."""
    sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    sql("ALTER TABLE chunks SET (autovacuum_enabled = false)")
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8, pool_max=1) as store:
        store.batch_upsert(vectors(1200, "keep"))
        store.batch_upsert(vectors(1800, "drop"))
        store.delete_by_source_id("drop")
        with store.pool.connection() as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
        yield store


def test_a_stale_index_is_rebuilt_and_the_table_vacuumed(stale, sql, until):
    size = "SELECT pg_relation_size('embeddings_vector_idx')"
    before = sql(size)[0][0]
    told = []
    result = stale.maintain(on_progress=lambda *t: told.append(t))
    assert details(result, "rebuild stale indexes").startswith(
        "rebuilt embeddings_vector_idx (60 % stale; VACUUM of it"
    )
    assert details(result, "vacuum embeddings") == "vacuumed 1800 dead rows away"
    assert result.index_rebuilt
    assert sql(size)[0][0] < 0.7 * before
    dead = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'embeddings'"
    # A transaction of the store's own background thread may have kept the rows for this once.
    until(lambda: sql(dead) == [(0,)] or not stale.maintain(skip_index=True, skip_cleanup=True))
    begun = list(dict.fromkeys(name for name, _ in told))
    assert [*begun, "record the run"] == [step.name for step in result.steps]
    assert len(stale.search(VECTOR, 5)) == 5


def test_an_index_is_left_alone_below_the_threshold(stale):
    result = stale.maintain(index_stale_threshold=0.7, skip_compaction=True)
    assert outcomes(result)["rebuild stale indexes"] == "skipped"


def test_below_the_threshold_it_is_rebuilt_where_vacuum_is_due_and_would_cost_more(stale, sql):
    told = details(stale.maintain(index_stale_threshold=0.7, dry_run=True), "rebuild stale indexes")
    assert "60 % stale, and VACUUM is due; VACUUM of it about" in told
    sql("UPDATE index_builds SET rows = 1000, duration_ms = 0")  # builds that cost nothing make VACUUM cost nothing
    assert outcomes(stale.maintain(index_stale_threshold=0.7, dry_run=True))["rebuild stale indexes"] == "skipped"


def test_a_dry_run_changes_nothing(stale, sql):
    sql("UPDATE write_log SET created_at = now() - interval '1 day'")
    sql("INSERT INTO performance_metrics (operation, duration_ms, created_at) VALUES ('x', 1, '2020-01-01')")
    state = """
        SELECT (SELECT count(*) FROM write_log), (SELECT xid::text FROM write_log_watermark),
               (SELECT count(*) FROM performance_metrics WHERE operation = 'x'),
               (SELECT count(*) FROM maintenance_runs), pg_relation_filenode('embeddings_vector_idx'),
               (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'embeddings')
    """
    before = sql(state)
    result = stale.maintain(dry_run=True)
    assert sql(state) == before
    assert set(outcomes(result).values()) == {"skipped"}
    told = details(result, "rebuild stale indexes")
    assert told.startswith("dry run: would rebuild embeddings_vector_idx (60 % stale; VACUUM of it about ")
    assert details(result, "vacuum embeddings") == "dry run: would vacuum away 1800 dead rows"
    assert (result.index_rebuilt, result.rows_removed, result.bytes_removed) == (False, 0, 0)


def test_a_role_that_may_not_is_told_so_step_by_step(stale, sql):
    sql("DROP INDEX chunks_vector_idx")
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_worker"
    sql(f"CREATE ROLE {role}")
    try:
        sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        sql(f"GRANT INSERT ON maintenance_runs TO {role}")
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = {role}")
        stale.pool.drain()
        told = outcomes(stale.maintain())
        for step in ("prune the write log", "retire metrics", "build missing indexes", "rebuild stale indexes"):
            assert told[step] == "not permitted", step
        assert told["vacuum embeddings"] == "not permitted"
        assert sql("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'embeddings'") == [(1800,)]
    finally:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


# -- when and who --------------------------------------------------------------------------------------------


def test_a_second_run_at_once_is_refused_and_told_who_runs(store, admin):
    pid = admin.info.backend_pid
    admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.MAINTENANCE)))
    with pytest.raises(BusyError, match=f"maintenance is locked by process {pid} "):
        store.maintain()
    admin.execute("SELECT pg_advisory_unlock_all()")
    assert outcomes(store.maintain())["record the run"] == "done"


def test_of_many_runs_at_once_one_runs_at_a_time(store, until):
    running, most = [0], [0]

    def note(*_):
        running[0] += 1
        most[0] = max(most[0], running[0])
        threading.Event().wait(0.02)
        running[0] -= 1

    def run(_):
        try:
            return store.maintain(on_progress=note) is not None
        except BusyError:
            return False

    with ThreadPoolExecutor(4) as threads:
        ran = list(threads.map(run, range(4)))
    assert most == [1]
    assert any(ran)


def test_past_the_deadline_the_steps_are_not_reached(store, sql):
    result = store.maintain(deadline_s=0)
    assert set(outcomes(result).values()) == {"not reached"}
    assert len(result.steps) > 8
    assert sql("SELECT count(*) FROM maintenance_runs") == [(0,)]


def test_a_cancelled_run_stops_after_the_step_it_is_at(store):
    cancel = threading.Event()
    result = store.maintain(cancel=cancel, on_progress=lambda name, _: cancel.set())
    first, *others, last = result.steps
    assert first.outcome in ("done", "not reached")
    assert {step.outcome for step in others} == {"not reached"}
    assert last.name == "record the run"


def test_a_step_that_fails_stops_no_other_and_the_run_is_recorded(store, sql):
    sql("ALTER TABLE vector_cache RENAME TO hidden")
    result = store.maintain()
    assert outcomes(result)["retire cached vectors"] == "failed"
    assert outcomes(result)["build missing indexes"] in ("skipped", "done")
    assert sql("SELECT operation, success, details ->> 'retire cached vectors' FROM maintenance_runs") == [
        ("maintain", False, "failed")
    ]


def test_tables_are_counted_once_a_run(store, monkeypatch):
    store.batch_upsert(vectors(3))
    counted = []
    count = row_counts._counted
    monkeypatch.setattr(
        row_counts, "_counted", lambda connection, table: counted.append(table) or count(connection, table)
    )
    assert store.maintain().index.indexed_rows == 3
    assert sorted(counted) == ["chunks", "embeddings"]


def test_steps_can_be_left_out(store):
    names = outcomes(store.maintain(skip_cleanup=True, skip_index=True, skip_compaction=True))
    assert set(names) == {"record the run"}


def test_it_does_not_run_inside_a_callers_transaction(store):
    with store.transaction(), pytest.raises(ValidationError, match="cannot run inside transaction"):
        store.maintain()


# -- at close ------------------------------------------------------------------------------------------------


@pytest.fixture
def due(database_url, sql):
    """What makes maintenance due at close: the store's model is there for a week, and nothing ever ran."""
    with db.connect(database_url, False) as first:  # closed again: its background work would make the database busy
        first.batch_upsert(vectors(1))
    sql("UPDATE embedding_models SET created_at = now() - interval '7 days'")


RUNS = "SELECT count(*) FROM maintenance_runs"


@pytest.mark.usefixtures("due")
@pytest.mark.parametrize(
    ("setting", "given", "ran"), [(False, True, 1), (True, None, 1), (True, False, 0), (False, None, 0)]
)
def test_closing_maintains_where_asked_or_set(database_url, redis_url, sql, setting, given, ran):
    other = db.connect(database_url, redis_url, maintenance_on_close=setting)
    other.close(maintain=given)
    assert sql(RUNS) == [(ran,)]


@pytest.mark.usefixtures("due")
def test_closing_maintains_by_itself_once_a_day(database_url, sql):
    db.connect(database_url, False).close()
    assert sql(RUNS) == [(1,)]
    db.connect(database_url, False).close()
    assert sql(RUNS) == [(1,)]
    sql("UPDATE maintenance_runs SET finished_at = now() - interval '25 hours'")
    db.connect(database_url, False, maintenance_due_s=26 * 3600).close()
    assert sql(RUNS) == [(1,)]
    db.connect(database_url, False).close()
    assert sql(RUNS) == [(2,)]
    db.connect(database_url, False).close(maintain=True)
    assert sql(RUNS) == [(3,)]


def test_a_store_of_today_is_not_maintained_by_itself(database_url, store, sql):
    store.batch_upsert(vectors(1))
    db.connect(database_url, False).close()
    assert sql(RUNS) == [(0,)]


@pytest.mark.usefixtures("due")
def test_closing_leaves_a_database_alone_in_which_somebody_works_unless_asked(database_url, sql):
    with psycopg.connect(database_url) as busy:
        busy.execute("SELECT 1")
        db.connect(database_url, False).close()
        assert sql(RUNS) == [(0,)]
        db.connect(database_url, False).close(maintain=True)
        assert sql(RUNS) == [(1,)]


@pytest.mark.usefixtures("due")
def test_closing_leaves_a_database_alone_in_which_it_cannot_see_what_another_role_does(database_url, sql):
    with plain_owner(database_url) as url:  # whose sessions are not those of `sql`
        db.connect(url, False).close()
        assert sql(RUNS) == [(0,)]
        db.connect(url, False).close(maintain=True)
        assert sql(RUNS) == [(1,)]


@pytest.mark.usefixtures("due")
def test_what_a_role_may_not_do_stays_due_for_the_owner_and_is_not_tried_at_every_close(database_url, sql):
    sql("DROP INDEX chunks_vector_idx")
    with roles_of(database_url) as roles:
        roles.make()
        worker = roles.login("worker", "app")
        roles.admin.execute(f"GRANT pg_read_all_stats TO {roles.prefix}_worker_login")
        for _ in range(2):
            db.connect(worker, False).close()
            assert sql("SELECT success, details ->> 'build missing indexes' FROM maintenance_runs") == [
                (False, "not permitted")
            ]
        found = Examiner(database_url).one("maintenance", maintenance_days=5)
        assert (found.status, "the last try: build missing indexes not permitted" in found.evidence) == ("warn", True)
        db.connect(database_url, False).close()
        assert sql("SELECT success FROM maintenance_runs ORDER BY id") == [(False,), (True,)]
        assert sql("SELECT to_regclass('chunks_vector_idx') IS NOT NULL") == [(True,)]


@pytest.mark.usefixtures("due")
def test_closing_by_itself_while_another_maintains_says_nothing(database_url, admin, sql):
    admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.MAINTENANCE)))
    db.connect(database_url, False).close()
    assert sql(RUNS) == [(0,)]


def test_closing_where_maintenance_cannot_connect_closes_and_says_so(database_url):
    other = db.connect(database_url, False, maintenance_url="postgresql://127.0.0.1:1/nowhere")
    with pytest.raises(MaintenanceIncomplete, match="the store is closed, but not done: cannot connect"):
        other.close(maintain=True)
    assert other.pool.closed


def test_closing_without_time_closes_and_says_what_was_not_done(store):
    with pytest.raises(MaintenanceIncomplete, match=r"the store is closed, but not done: prune the write log"):
        store.close(maintain=True, deadline_s=0)
    with pytest.raises(ClosedError):
        store.get(["a"])


def test_closing_while_another_maintains_closes_and_says_so(store, admin):
    admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.MAINTENANCE)))
    with pytest.raises(MaintenanceIncomplete, match="maintenance is locked by"):
        store.close(maintain=True)
    assert store.pool.closed


# -- what a rebuild leaves -------------------------------------------------------------------------------------


def test_the_tables_that_a_rebuild_replaced_are_kept_for_a_while_and_then_dropped(store, database_url, sql):
    store.batch_upsert(vectors(5))
    rebuild(Settings.load({"database_url": database_url}), RebuildPlan())
    assert details(store.maintain(), "retire previous tables") == "the previous tables are kept for 7 days"
    with db.connect(database_url, False, keep_previous_days=0) as other:
        told = details(other.maintain(dry_run=True), "retire previous tables")
        assert told.startswith("dry run: would drop the previous tables")
        result = other.maintain()
        assert details(result, "retire previous tables").startswith("dropped the previous tables")
        assert result.bytes_removed > 0
        assert outcomes(other.maintain())["retire previous tables"] == "skipped"
    assert sql("SELECT count(*) FROM pg_tables WHERE tablename = 'embeddings'") == [(1,)]
    assert sql("SELECT count(*) FROM embeddings") == [(5,)]


@pytest.mark.usefixtures("due")
@pytest.mark.parametrize("raised", [RuntimeError("the caller's own"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_block_that_an_exception_ends_closes_at_once_and_maintains_nothing(database_url, sql, raised):
    with (
        pytest.raises(type(raised)),
        db.connect(database_url, False, maintenance_url="postgresql://127.0.0.1:1/nowhere") as other,
    ):
        raise raised
    assert other.pool.closed
    assert sql(RUNS) == [(0,)]
