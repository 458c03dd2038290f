import shlex

import pytest

from db.psql import psql


@pytest.mark.parametrize(
    ("statements", "command"),
    [
        (["ANALYZE t"], "psql -c 'ANALYZE t'"),
        (["REINDEX INDEX CONCURRENTLY i", "VACUUM t"], "psql -c 'REINDEX INDEX CONCURRENTLY i' -c 'VACUUM t'"),
        (["SET a = '1'"], """psql -c "SET a = '1'\""""),
    ],
)
def test_each_statement_is_one_of_its_own(statements, command):
    assert psql(*statements) == command


@pytest.mark.parametrize("statement", ["""ALTER ROLE "my-app" SET a = '1'""", "SELECT '$HOME'", "SELECT '`ls`\\'"])
def test_a_shell_takes_it_for_what_it_is(statement):
    assert shlex.split(psql(statement)) == ["psql", "-c", statement]
