"""The SQL of every migration is online by the rules of squawk, with the exclusions that .squawk.toml gives reasons for.

It reads statements, not what a DO block runs: what those lock is tried out in test_online.py.
"""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from db.migrate import alembic_config

ROOT = Path(__file__).parents[2]
REVISIONS = sorted(
    (script.down_revision or "base", script.revision)
    for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
)
# Each would keep readers or writers from a table in use, or fail when it is run again.
BAD = {
    "CREATE INDEX bad_idx ON embeddings (source_id);": "require-concurrent-index-creation",
    "DROP INDEX embeddings_source_id_idx;": "require-concurrent-index-deletion",
    "ALTER TABLE embeddings ADD COLUMN must text NOT NULL;": "adding-required-field",
    "ALTER TABLE embeddings ADD COLUMN moment timestamptz NOT NULL DEFAULT clock_timestamp();": (
        "adding-field-with-default"
    ),
    "ALTER TABLE embeddings ALTER COLUMN metadata TYPE json;": "changing-column-type",
    "ALTER TABLE embeddings ALTER COLUMN workspace SET NOT NULL;": "adding-not-nullable-field",
    "ALTER TABLE embeddings RENAME COLUMN text TO body;": "renaming-column",
    "ALTER TABLE embeddings ADD CONSTRAINT c CHECK (id <> '');": "constraint-missing-not-valid",
    "ALTER TABLE chunks ADD CONSTRAINT u UNIQUE (origin_id);": "disallowed-unique-constraint",
    "ALTER TABLE chunks ADD CONSTRAINT f FOREIGN KEY (origin_id) REFERENCES embeddings (id);": (
        "adding-foreign-key-constraint"
    ),
}


def sql_of(before, revision):
    config = alembic_config()
    config.output_buffer = io.StringIO()
    command.upgrade(config, f"{before}:{revision}", sql=True)
    return config.output_buffer.getvalue()


def found_in(sql):
    """The rules that are broken, each with its line."""
    squawk = shutil.which("squawk", path=str(Path(sys.executable).parent)) or shutil.which("squawk")
    if squawk is None:
        pytest.skip("squawk-cli, of the extra dev, is not installed")
    ended = subprocess.run(
        [squawk, "--config", str(ROOT / ".squawk.toml"), "--reporter", "json"],
        input=sql, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.stdout, ended.stderr
    return {f"{item['rule_name']} at line {item['line']}" for item in json.loads(ended.stdout)}


@pytest.mark.parametrize(("before", "revision"), REVISIONS)
def test_the_sql_of_each_migration_is_online(before, revision):
    sql = sql_of(before, revision)
    assert f"'{revision}'" in sql
    assert found_in(sql) == set()


@pytest.mark.parametrize(("statement", "rule"), BAD.items(), ids=BAD.values())
def test_a_bad_migration_is_found(statement, rule):
    good = sql_of("0005", "0006")
    broken = {found.partition(" at ")[0] for found in found_in(good.replace("COMMIT;", f"{statement}\n\nCOMMIT;"))}
    assert rule in broken


def test_every_exclusion_gives_its_reason():
    lines = (ROOT / ".squawk.toml").read_text().partition("excluded_rules = [")[2].splitlines()[1:-1]
    rules = [number for number, line in enumerate(lines) if line.strip().startswith('"')]
    assert rules
    assert all(number and lines[number - 1].strip().startswith("#") for number in rules)
    for migration in (ROOT / "alembic" / "versions").glob("*.py"):
        for line in re.findall(r"(.*)\n.*-- squawk-ignore", migration.read_text()):
            assert line.strip().startswith("-- "), f"{migration.name} excuses a statement without a reason"
