"""`vectorkeep pause` and `resume`, as an operator types them."""

import pytest

from .conftest import Run


def test_a_pause_outlives_its_command_and_stops_ingestion_but_not_searches(vectorkeep: Run, folder):
    vectorkeep("ingest", str(folder))
    paused = vectorkeep("pause", "the disk is being moved", "--ttl-s", "600")
    assert paused.fields["reason"] == "the disk is being moved"
    (folder / "cats.md").write_text("# On cats\n\nCats sleep eighteen hours a day.\n")
    refused = vectorkeep("ingest", str(folder), code=7)
    assert "the disk is being moved; 'vectorkeep resume' ends the pause" in refused.err
    vectorkeep("delete-source", str(folder), "--yes", code=7)
    assert len(vectorkeep("search", "cats").rows) == 3
    assert vectorkeep("resume").fields["owner"] == paused.fields["owner"]
    assert vectorkeep("ingest", str(folder)).fields["updated"] == "1"


def test_a_pause_ends_by_itself(vectorkeep: Run, folder):
    vectorkeep("pause", "for a moment", "--ttl-s", "0.1")
    vectorkeep("ingest", str(folder))
    resumed = vectorkeep("resume")
    assert "had ended already" in resumed.err


def test_resuming_what_is_not_paused_is_no_failure(vectorkeep: Run):
    assert "was not paused" in vectorkeep("resume").err
    assert vectorkeep("resume", "--json").json == {"resumed": False, "pause": None}


def test_both_tell_who_paused_as_json(vectorkeep: Run):
    paused = vectorkeep("pause", "why", "--json").json
    assert paused["paused"] is True
    assert paused["owner_pid"] is None
    resumed = vectorkeep("resume", "--json").json
    assert resumed["resumed"] is True
    assert resumed["pause"]["owner"] == paused["owner"]


@pytest.mark.parametrize(
    "arguments", [["pause"], ["pause", "why", "--ttl-s", "0"], ["pause", "why", "--ttl-s", "1e12"]]
)
def test_a_pause_needs_a_reason_and_a_time_that_makes_sense(vectorkeep: Run, arguments):
    vectorkeep(*arguments, code=2)
