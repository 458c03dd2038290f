import json

import pytest

DARK = "which animal is awake in the dark?"


@pytest.fixture
def filled(vectorkeep, folder):
    """The three documents of the folder and a fourth of another source and workspace."""
    vectorkeep("ingest", folder, "--source", "handbook")
    other = {
        "id": "bats\t\x1b[31m",
        "text": "Bats fly in the dark.\n\x1b[31mred\x1b[0m",
        "source_id": "caves",
        "metadata": {"workspace": "acme", "year": 2020, "title": "On\tbats"},
    }
    vectorkeep("ingest", "-", stdin=json.dumps(other))
    return vectorkeep


def test_hits_are_tab_separated_lines_best_first(filled):
    ran = filled("search", DARK, "--source", "handbook", "-k", "2")
    assert len(ran.rows) == 2
    assert all(len(row) == 5 for row in ran.rows)
    score, source, id_, title, text = ran.rows[0]
    assert (source, id_, title) == ("handbook", "handbook/animals/owls.html", "On owls")
    assert text.startswith("Owls hunt at night")
    assert float(score) > float(ran.rows[1][0])
    assert ran.err == ""


def test_a_documents_control_characters_do_not_reach_the_terminal_or_the_columns(filled):
    [row] = filled("search", DARK, "--source", "caves").rows  # `filled` itself refuses escape codes
    assert row[2:4] == ["bats  [31m", "On bats"]
    assert row[4].startswith("Bats fly in the dark. ")


def test_json_has_everything(filled):
    found = filled("search", DARK, "-k", "4", "--json", "--exact").json
    assert (len(found["hits"]), found["complete"], found["exact"]) == (4, True, True)
    bats = next(hit for hit in found["hits"] if hit["source_id"] == "caves")
    assert bats["metadata"] == {"workspace": "acme", "year": 2020, "title": "On\tbats"}
    assert bats["score"] == pytest.approx(1 - bats["distance"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workspace", "acme"], 1),
        (["--where", '{"year": {"$gte": 2020}}'], 1),
        (["--where", '{"year": {"$gt": 2020}}'], 0),
        (["--source", "handbook"], 3),
        (["--level", "chunks"], 4),
        (["--source", "nowhere"], 0),
    ],
)
def test_filters(filled, arguments, expected):
    ran = filled("search", DARK, *arguments)
    assert len(ran.rows) == expected
    assert ran.err == ("" if expected else "nothing found\n")


def test_a_repeated_search_is_cached_until_a_write(filled):
    assert filled("search", DARK, "--json").json["cached"] is False
    assert filled("search", DARK, "--json").json["cached"] is True
    filled("delete-source", "caves", "--yes")
    after = filled("search", DARK, "--json").json
    assert after["cached"] is False
    assert "caves" not in {hit["source_id"] for hit in after["hits"]}
    assert filled("search", DARK, "--json", "--redis-url", "none").json["cached"] is False


@pytest.mark.parametrize("where", ["{", "[]", '"x"'])
def test_a_filter_that_is_no_json_object_is_a_wrong_command_line(vectorkeep, where):
    assert "--where" in vectorkeep("search", "x", "--where", where, code=2).err


def test_a_filter_that_means_nothing_is_told(vectorkeep):
    ran = vectorkeep("search", "x", "--where", '{"a": {"$near": 1}}', code=6)
    assert "'$near'" in ran.err


def test_an_empty_store_has_nothing(vectorkeep):
    ran = vectorkeep("search", "anything")
    assert (ran.out, ran.err) == ("", "nothing found\n")
    assert vectorkeep("search", "  ", code=6).err.startswith("vectorkeep: the query is empty")


def test_a_store_of_another_model_says_what_to_do(vectorkeep):
    vectorkeep("migrate", "--model", "mine", "--dimensions", "3")
    ran = vectorkeep("search", "anything", code=6)
    assert "'mine' (3 dimensions)" in ran.err
    assert "CallableEmbedder" in ran.err


def test_a_query_that_is_no_text_is_refused(vectorkeep):
    assert "lone surrogate" in vectorkeep("search", "a\udcff", code=6).err
    assert "twice" in vectorkeep("search", "a", "--where", '{"a": 1, "a": 2}', code=2).err
