"""What the doctor makes of figures that a test server is not brought to for a test."""

from pathlib import Path

import pytest

from db.checks.base import age
from db.checks.cache import judge_memory, judge_persistence
from db.checks.embedded import judge_file_system, judge_room
from db.checks.server import judge_durability, judge_pgvector, judge_wraparound
from db.checks.storage import judge_autovacuum

SAFE = dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit", "data_checksums"), "on")
GB = 1024**3


@pytest.mark.parametrize(
    ("installed", "available", "status", "told"),
    [
        ("0.8.5", "0.8.5", "ok", "pgvector 0.8.5"),
        ("0.8.4", "0.8.4", "ok", "pgvector 0.8.4"),
        ("0.8.4", "0.8.5", "warn", "older than its files"),
        ("0.8.4", None, "ok", "pgvector 0.8.4"),
        ("0.8.3", "0.8.5", "fail", "unrepaired"),
        ("0.8.2", "0.8.5", "fail", "corrupt"),
        ("0.8.1", "0.8.1", "fail", "overflow"),
        ("0.7.4", "0.8.5", "fail", "iterative"),
        ("0.10.0", "0.10.0", "ok", "pgvector 0.10.0"),
        (None, "0.8.5", "fail", "not installed"),
        (None, None, "fail", "not installed"),
    ],
)
def test_versions_of_pgvector(installed, available, status, told):
    [found] = judge_pgvector(installed, available)
    assert found.status == status
    assert told in found.evidence
    assert bool(found.remedy) == (status != "ok")


def test_pgvector_that_must_be_installed_anew_says_so():
    [old_files] = judge_pgvector("0.8.1", "0.8.1")
    [new_files] = judge_pgvector("0.8.1", "0.8.5")
    assert "install pgvector 0.8.4 or newer" in old_files.remedy
    assert "install" not in new_files.remedy
    assert "install pgvector's package" in next(iter(judge_pgvector(None, None))).remedy


@pytest.mark.parametrize(
    ("name", "status"),
    [("fsync", "fail"), ("full_page_writes", "fail"), ("synchronous_commit", "warn"), ("data_checksums", "warn")],
)
def test_settings_that_lose_data(name, status):
    [found] = judge_durability({**SAFE, name: "off"})
    assert found.status == status
    assert found.remedy
    [sound] = judge_durability(SAFE)
    assert sound.status == "ok"


@pytest.mark.parametrize(
    ("oldest", "status"), [(57, "ok"), (300_000_000, "ok"), (300_000_001, "warn"), (1_500_000_001, "fail")]
)
def test_the_distance_to_wraparound(oldest, status):
    assert judge_wraparound(oldest, 200_000_000).status == status


def test_autovacuum_off_on_the_server():
    assert list(judge_autovacuum(on=True, counts=True)) == []
    assert [found.status for found in judge_autovacuum(on=False, counts=True)] == ["fail"]
    assert "track_counts is off" in next(iter(judge_autovacuum(on=True, counts=False))).evidence


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "cifs"])
def test_a_network_file_system(kind):
    assert judge_file_system(Path("/data"), kind).status == "fail"
    assert judge_file_system(Path("/data"), "ext4").status == "ok"


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(50 * GB, 100 * GB, "ok"), (5 * GB, 100 * GB, "warn"), (GB - 1, 2 * GB, "warn"), (GB // 4 - 1, GB, "fail")],
)
def test_room_on_the_disk(free, total, status):
    assert judge_room(Path("/data"), free, total, GB, 0.1).status == status


@pytest.mark.parametrize(
    ("maxmemory", "policy", "status"),
    [(10**8, "allkeys-lru", "ok"), (10**8, "volatile-ttl", "ok"), (10**8, "noeviction", "warn"), (0, "x", "warn")],
)
def test_memory_of_redis(maxmemory, policy, status):
    info = {"used_memory": 10**6, "maxmemory": maxmemory, "maxmemory_policy": policy}
    assert judge_memory(info).status == status


@pytest.mark.parametrize(
    ("info", "save", "consistency", "status"),
    [
        ({}, "", "strict", "ok"),
        ({}, "3600 1", "strict", "ok"),
        ({}, "3600 1", "bounded", "warn"),
        ({"aof_enabled": 1}, "3600 1", "bounded", "ok"),
        ({"rdb_last_bgsave_status": "err"}, "3600 1", "strict", "warn"),
        ({"aof_last_write_status": "err"}, "", "strict", "warn"),
    ],
)
def test_persistence_of_redis(info, save, consistency, status):
    assert judge_persistence(info, save, consistency).status == status


def test_ages_in_words():
    assert [age(s) for s in (3, 119, 600, 8000, 864_000)] == ["3 s", "119 s", "10 min", "2 h", "10 days"]
