"""Tenants: which login role may see which workspaces, and what tells their cached answers from others'

Row-level security itself is switched on by `vectorkeep migrate --roles --tenants`: a store without tenants pays
nothing for it.

Revision ID: 0006
Revises: 0005
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops and which mean something to a person.
drops = ("tenant_workspaces",)

# What row security shows to this session: the policies that apply to it, and its workspaces. It is a part of the key
# of cached answers, and asked for only where row security is active. Tables are named with their schema: a session's
# own temporary table must not stand in for one.
SCOPE = """
DO $do$
BEGIN
    EXECUTE replace($body$
        CREATE OR REPLACE FUNCTION vectorkeep_scope() RETURNS text LANGUAGE plpgsql STABLE AS $function$
        DECLARE
            policies text;
            workspaces text;
        BEGIN
            SELECT string_agg(
                concat_ws(' ', policy.oid, policy.xmin, ARRAY(
                    SELECT CASE role WHEN 0 THEN true ELSE pg_catalog.pg_has_role(role, 'USAGE') END
                    FROM unnest(policy.polroles) AS role)), ',' ORDER BY policy.oid)
            INTO policies FROM pg_catalog.pg_policy AS policy
            WHERE policy.polrelid IN (to_regclass('embeddings'), to_regclass('chunks'));
            IF has_table_privilege('THE_SCHEMA.tenant_workspaces', 'SELECT') THEN
                SELECT string_agg(own.workspace, chr(1) ORDER BY own.workspace) INTO workspaces
                FROM THE_SCHEMA.tenant_workspaces AS own WHERE own.role = session_user;
            END IF;
            RETURN md5(concat_ws(';', policies, workspaces));
        END
        $function$
    $body$, 'THE_SCHEMA', quote_ident(current_schema()));
END
$do$
"""
# Whether no write has ended an answer, for roles that may not read the write log: its tags name the sources and
# workspaces of all. It tells of writes to the caller's own workspaces, and else only that there was one. STABLE: it
# sees what the statement that calls it sees.
STILL_TRUE = """
DO $do$
BEGIN
    EXECUTE replace($body$
        CREATE OR REPLACE FUNCTION vectorkeep_still_true(computed_in pg_snapshot, depends_on text[]) RETURNS boolean
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = THE_SCHEMA, pg_temp AS $function$
            SELECT pg_snapshot_xmin(computed_in) >= (SELECT xid FROM write_log_watermark)
                AND (SELECT xid FROM write_log
                     WHERE xid >= pg_snapshot_xmin(computed_in)
                       AND tags && (SELECT CASE WHEN depends_on <@ own.tags THEN depends_on
                                           ELSE ARRAY['all', 'store'] END
                                    FROM (SELECT array_agg('workspace:' || workspace) || ARRAY['all', 'store'] AS tags
                                          FROM tenant_workspaces WHERE role = session_user) AS own)
                       AND NOT pg_visible_in_snapshot(xid, computed_in)
                     ORDER BY xid LIMIT 1) IS NULL
        $function$
    $body$, 'THE_SCHEMA', quote_ident(current_schema()));
END
$do$
"""


def upgrade() -> None:
    op.execute("""
        CREATE TABLE tenant_workspaces (
            role name NOT NULL,
            workspace text NOT NULL,
            PRIMARY KEY (role, workspace)
        )
    """)
    # session_user: what the login proved. No SET ROLE changes it, and SET SESSION AUTHORIZATION takes a superuser.
    op.execute("ALTER TABLE tenant_workspaces ENABLE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY own ON tenant_workspaces FOR SELECT USING (role = session_user)")
    op.execute(SCOPE)
    op.execute(STILL_TRUE)
    op.execute("REVOKE EXECUTE ON FUNCTION vectorkeep_still_true(pg_snapshot, text[]) FROM PUBLIC")


def downgrade() -> None:
    op.execute("DROP FUNCTION vectorkeep_still_true(pg_snapshot, text[])")
    op.execute("DROP FUNCTION vectorkeep_scope()")
    # With it go the policies that show tenants their rows. Row security stays on: they then see none.
    op.execute("DROP TABLE tenant_workspaces CASCADE")
