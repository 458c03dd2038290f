"""How the tests of the doctor examine a store, and find in what it says what they are about."""

import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

import db
from db import doctor
from db.config import Settings


class Examiner:
    """Examines one database as the command does, without an open store."""

    def __init__(self, database_url, redis_url=False, **settings):
        self.settings = Settings.load({"database_url": database_url, "redis_url": redis_url, **settings})
        self.findings = []

    def __call__(self, check, *, fix=False, **limits):
        """The findings of one check."""
        self.findings = doctor.examine(self.settings, fix=fix, limits=doctor.Limits(**limits))
        return [found for found in self.findings if found.check == check]

    def statuses(self):
        return {found.check: found.status for found in self.findings}

    def one(self, check, **how):
        [found] = self(check, **how)
        return found

    def mends(self, check, **limits):
        """Assert that the fault of `check` is told, mended by a fix, and gone in the next run. Returns the finding."""
        before = [found for found in self(check, **limits) if found.status != "ok"]
        assert before, f"{check} sees nothing"
        assert all(found.remedy for found in before)
        assert not any(found.fixed for found in before)
        [mended] = self(check, fix=True, **limits)
        assert (mended.status, mended.fixed) == ("ok", True), mended
        after = self.one(check, **limits)
        assert (after.status, after.fixed) == ("ok", False), after
        return before[0]


@contextmanager
def scratch_home(prefix):
    """A home for embedded servers that their user may enter, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "home"


@contextmanager
def own_server(*, redis=False, **settings):
    """Servers of the test's own."""
    with scratch_home("vk-doctor-") as home:
        servers = db.embedded.acquire(home, settings={"shared_buffers": "32MB", **settings}, redis=redis)
        yield servers
        servers.release()


_OWNED = """
    SELECT 'TABLE ' || oid::regclass FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL SELECT 'FUNCTION ' || oid::regprocedure FROM pg_proc WHERE proname LIKE 'vectorkeep%'
"""


@contextmanager
def plain_owner(database_url):
    """A role that owns the database and what is ours in it, and sees no other role's session. Yields its URL."""
    parts = urlsplit(database_url)
    name = parts.path.strip("/")
    role = f"{name}_owner"
    with psycopg.connect(database_url, autocommit=True, application_name="administrator") as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
        try:
            admin.execute(f"ALTER DATABASE {name} OWNER TO {role}")
            for (thing,) in admin.execute(_OWNED).fetchall():
                admin.execute(f"ALTER {thing} OWNER TO {role}")
            yield parts._replace(netloc=f"{role}:pw@{parts.netloc.rpartition('@')[2]}").geturl()
        finally:
            admin.execute(f"ALTER DATABASE {name} OWNER TO CURRENT_USER")
            admin.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER")
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"DROP ROLE {role}")
