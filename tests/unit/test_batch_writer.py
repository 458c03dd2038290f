"""One batch under way at a time: where it is written, what it returns and raises, and that none outlives the block."""

import threading

import pytest

from db import batch_writer
from db.batch_writer import BatchWriter

MAIN = threading.current_thread().name


def here():
    return threading.current_thread().name


def nothing(_written):
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
        writer.start({"a"}, lambda: 7, told.append, full=True)
        assert (writer.finish(), told) == (7, [7])
        assert (writer.finish(), told) == (None, [7])


def test_the_rows_of_a_batch_are_sent_before_the_next_one_is_begun(monkeypatch):
    monkeypatch.setattr(batch_writer, "_HEAD_START_S", 30)
    sent, written = [], threading.Event()

    def write():
        written.wait(0.05)  # a caller that goes on at once is seen
        sent.append(here())
        writer.sent.set()
        return written.wait(30)

    with BatchWriter() as writer:
        for batches in (1, 2):
            written.clear()
            writer.start({"a"}, write, nothing, full=True)
            assert (len(sent), writer._write.done()) == (batches, False)
            written.set()
            assert writer.finish()


def test_a_write_that_cannot_send_at_once_keeps_nobody_from_the_next_batch():
    may_send = threading.Event()
    with BatchWriter() as writer:
        writer.start({"a"}, lambda: may_send.wait(10), nothing, full=True)
        may_send.set()
        assert writer.finish()


def test_it_is_known_what_is_under_way():
    written = threading.Event()
    with BatchWriter() as writer:
        writer.start({"a"}, lambda: written.wait(10), nothing, full=True)
        assert (writer.overlaps(iter("ba")), writer.overlaps(iter("b"))) == (True, False)
        written.set()
        writer.finish()
        assert not writer.overlaps(iter("a"))


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

            writer.start({"a"}, wait, given_up.append, full=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert given_up == [True]


def test_where_no_thread_may_begin_any_more_the_caller_writes():
    with BatchWriter() as writer:
        writer._thread.shutdown()
        writer.start({"a"}, here, nothing, full=True)
        assert writer.finish() == MAIN
