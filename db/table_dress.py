"""What belongs to a table beside its columns and rows: its owner, grants, policies, triggers, comments and options.

Read from the table that goes as statements, and run on the one that takes its name: `CREATE TABLE … (LIKE …)` copies
none of it. Every name in the statements is quoted by the server.
"""

from typing import Any

from psycopg import Connection

# Each gives statements in order: `table` is the table that is read, `target` the quoted name of what is dressed.
_OPTIONS = """
    SELECT format('ALTER TABLE %%s SET (%%s%%s = %%L)', %(target)s::text, prefix, option_name, option_value)
    FROM (SELECT '' AS prefix, reloptions FROM pg_class WHERE oid = %(table)s::regclass
          UNION ALL
          SELECT 'toast.', toast.reloptions FROM pg_class JOIN pg_class AS toast ON toast.oid = pg_class.reltoastrelid
          WHERE pg_class.oid = %(table)s::regclass) AS holder, pg_options_to_table(reloptions)
"""
_COLUMN_OPTIONS = """
    SELECT format('ALTER TABLE %%s ALTER %%I SET STATISTICS %%s', %(target)s::text, attname, attstattarget)
    FROM pg_attribute WHERE attrelid = %(table)s::regclass AND attnum > 0 AND NOT attisdropped AND attstattarget >= 0
    UNION ALL
    SELECT format('ALTER TABLE %%s ALTER %%I SET (%%s = %%L)', %(target)s::text, attname, option_name, option_value)
    FROM pg_attribute, pg_options_to_table(attoptions)
    WHERE attrelid = %(table)s::regclass AND attnum > 0 AND NOT attisdropped
"""
_OWNER = """
    SELECT format('ALTER TABLE %%s OWNER TO %%I', %(target)s::text, pg_get_userbyid(relowner))
    FROM pg_class WHERE oid = %(table)s::regclass
"""
_GRANTS = """
    SELECT format('GRANT %%s%%s ON %%s TO %%s%%s', privilege_type, columns, %(target)s::text,
                  CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                  CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
    FROM (SELECT '' AS columns, coalesce(relacl, acldefault('r', relowner)) AS acl
          FROM pg_class WHERE oid = %(table)s::regclass
          UNION ALL
          SELECT format(' (%%I)', attname), attacl
          FROM pg_attribute WHERE attrelid = %(table)s::regclass AND NOT attisdropped) AS holder, aclexplode(acl)
"""
_ROW_SECURITY = """
    SELECT format('ALTER TABLE %%s %%s ROW LEVEL SECURITY, %%s ROW LEVEL SECURITY', %(target)s::text,
                  CASE WHEN relrowsecurity THEN 'ENABLE' ELSE 'DISABLE' END,
                  CASE WHEN relforcerowsecurity THEN 'FORCE' ELSE 'NO FORCE' END)
    FROM pg_class WHERE oid = %(table)s::regclass
"""
_POLICIES = """
    SELECT format('CREATE POLICY %%I ON %%s AS %%s FOR %%s TO %%s', polname, %(target)s::text,
                  CASE WHEN polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
                  CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                              WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                  (SELECT string_agg(CASE role WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(role)) END, ', ')
                   FROM unnest(polroles) AS role))
           || coalesce(' USING (' || pg_get_expr(polqual, polrelid) || ')', '')
           || coalesce(' WITH CHECK (' || pg_get_expr(polwithcheck, polrelid) || ')', '')
    FROM pg_policy WHERE polrelid = %(table)s::regclass
"""
_TRIGGERS = """
    SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = %(table)s::regclass AND NOT tgisinternal
    UNION ALL
    SELECT format('ALTER TABLE %%s %%s TRIGGER %%I', %(target)s::text,
                  CASE tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END,
                  tgname)
    FROM pg_trigger WHERE tgrelid = %(table)s::regclass AND NOT tgisinternal AND tgenabled <> 'O'
"""
_REPLICA_IDENTITY = """
    SELECT format('ALTER TABLE %%s REPLICA IDENTITY %%s', %(target)s::text,
                  CASE relreplident WHEN 'n' THEN 'NOTHING' WHEN 'f' THEN 'FULL'
                      ELSE 'USING INDEX ' || (
                          SELECT quote_ident(relname) FROM pg_index JOIN pg_class ON oid = indexrelid
                          WHERE indrelid = %(table)s::regclass AND indisreplident) END)
    FROM pg_class WHERE oid = %(table)s::regclass AND relreplident <> 'd'
"""
# Indexes are named without a schema: the new ones have taken the names of the old.
_COMMENTS = """
    SELECT format('COMMENT ON TABLE %%s IS %%L', %(target)s::text, description)
    FROM pg_description
    WHERE classoid = 'pg_class'::regclass AND objoid = %(table)s::regclass AND objsubid = 0
    UNION ALL
    SELECT format('COMMENT ON COLUMN %%s.%%I IS %%L', %(target)s::text, attname, description)
    FROM pg_description JOIN pg_attribute ON attrelid = objoid AND attnum = objsubid
    WHERE classoid = 'pg_class'::regclass AND objoid = %(table)s::regclass AND objsubid > 0
    UNION ALL
    SELECT format('COMMENT ON CONSTRAINT %%I ON %%s IS %%L', conname, %(target)s::text, description)
    FROM pg_description JOIN pg_constraint ON pg_constraint.oid = objoid
    WHERE classoid = 'pg_constraint'::regclass AND conrelid = %(table)s::regclass
    UNION ALL
    SELECT format('COMMENT ON INDEX %%I IS %%L', relname, description)
    FROM pg_description JOIN pg_index ON indexrelid = objoid JOIN pg_class ON pg_class.oid = objoid
    WHERE classoid = 'pg_class'::regclass AND indrelid = %(table)s::regclass
    UNION ALL
    SELECT format('COMMENT ON TRIGGER %%I ON %%s IS %%L', tgname, %(target)s::text, description)
    FROM pg_description JOIN pg_trigger ON pg_trigger.oid = objoid
    WHERE classoid = 'pg_trigger'::regclass AND tgrelid = %(table)s::regclass
    UNION ALL
    SELECT format('COMMENT ON POLICY %%I ON %%s IS %%L', polname, %(target)s::text, description)
    FROM pg_description JOIN pg_policy ON pg_policy.oid = objoid
    WHERE classoid = 'pg_policy'::regclass AND polrelid = %(table)s::regclass
"""
_DRESS = (
    _OWNER, _GRANTS, _OPTIONS, _COLUMN_OPTIONS, _ROW_SECURITY, _POLICIES, _TRIGGERS, _REPLICA_IDENTITY, _COMMENTS,
)  # fmt: skip

_STRIP = (
    """
    SELECT format('DROP POLICY %%I ON %%s', polname, %(target)s::text)
    FROM pg_policy WHERE polrelid = %(table)s::regclass
    """,
    """
    SELECT format('DROP TRIGGER %%I ON %%s', tgname, %(target)s::text)
    FROM pg_trigger WHERE tgrelid = %(table)s::regclass AND NOT tgisinternal
    """,
    """
    SELECT DISTINCT format('REVOKE ALL ON %%s FROM %%s', %(target)s::text,
                           CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END)
    FROM (SELECT relacl AS acl FROM pg_class WHERE oid = %(table)s::regclass
          UNION ALL
          SELECT attacl FROM pg_attribute WHERE attrelid = %(table)s::regclass) AS holder, aclexplode(acl)
    """,
)


def dress_of(connection: Connection[Any], table: str) -> list[str]:
    """Statements that make whatever takes the name `table`, quoted where it must be, like the table that has it now."""
    return _statements(connection, _DRESS, table, table)


def storage_of(connection: Connection[Any], table: str, target: str) -> list[str]:
    """Statements that give `target` the storage options of `table`: they count for rows that come in."""
    return _statements(connection, (_OPTIONS, _COLUMN_OPTIONS), table, target)


def strip(connection: Connection[Any], table: str) -> None:
    """Take policies, triggers and grants off `table`."""
    run(connection, _statements(connection, _STRIP, table, table))


def run(connection: Connection[Any], statements: list[str]) -> None:
    for statement in statements:
        connection.execute(statement.encode())


def _statements(connection: Connection[Any], queries: tuple[str, ...], table: str, target: str) -> list[str]:
    names = {"table": table, "target": target}
    return [row[0] for query in queries for row in connection.execute(query.encode(), names).fetchall()]
