"""One batch under way at a time: where it is written, what it returns and raises, and that none outlives the block."""

import threading

import pytest

from db.batch_writer import BatchWriter
from db.documents import hash_item
from db.types import Item

MAIN = threading.current_thread().name


def here():
    return threading.current_thread().name


def nothing():
    pass


def test_the_first_batch_that_is_not_full_and_an_empty_one_need_no_thread():
    with BatchWriter() as writer:
        places = []
        for ids, full in (({"a"}, False), ({"b"}, False), (set(), True), ({"c"}, True)):
            writer.start(ids, here, nothing, full=full)
            places.append(writer.finish())
    assert [place == MAIN for place in places] == [True, False, True, False]


def test_a_write_returns_once_and_is_told_when_it_is_done():
    told = []
    with BatchWriter() as writer:
        writer.start({"a"}, lambda: 7, lambda: told.append("done"), full=True)
        assert (writer.finish(), told) == (7, ["done"])
        assert (writer.finish(), told) == (None, ["done"])


def test_it_is_known_what_is_under_way():
    written = threading.Event()
    one, other = (hash_item(Item(id_, "text")) for id_ in "ab")
    with BatchWriter() as writer:
        writer.start({"a"}, written.wait, nothing, full=True)
        assert (writer.overlaps([other, one]), writer.overlaps([other])) == (True, False)
        written.set()
        writer.finish()
        assert not writer.overlaps([one])


def test_the_end_of_the_block_waits_and_raises_what_the_write_raised():
    def fail():
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"), BatchWriter() as writer:
        writer.start({"a"}, fail, nothing, full=True)


def test_what_ends_the_program_is_not_replaced_by_what_the_write_raises_and_ends_its_waiting():
    given_up = []

    def interrupted():
        with BatchWriter() as writer:

            def wait():
                given_up.append(writer.stopped.wait(30))
                raise ConnectionError("gone")

            writer.start({"a"}, wait, lambda: given_up.append("told"), full=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert given_up == [True]


def test_where_no_thread_may_begin_any_more_the_caller_writes():
    with BatchWriter() as writer:
        writer._thread.shutdown()
        writer.start({"a"}, here, nothing, full=True)
        assert writer.finish() == MAIN
