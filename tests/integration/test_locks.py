"""Who holds an advisory lock of ours: another session, or this one."""

import psycopg

from db.locks import Purpose, advisory_lock, holds, is_held, other_holders


def test_a_lock_is_told_to_be_anothers_or_ones_own(admin, database_url):
    with psycopg.connect(database_url, autocommit=True) as other:
        with advisory_lock(other, Purpose.BULK_LOAD, wait_s=0):
            assert other_holders(admin, Purpose.REBUILD, Purpose.BULK_LOAD) == [other.info.backend_pid]
            assert is_held(admin, Purpose.BULK_LOAD)
            assert not is_held(admin, Purpose.REBUILD)
            assert (holds(admin, Purpose.BULK_LOAD), holds(other, Purpose.BULK_LOAD)) == (False, True)
            assert not is_held(other, Purpose.BULK_LOAD)
        assert not is_held(admin, Purpose.BULK_LOAD)
