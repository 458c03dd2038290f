"""How Redis is reached: by TLS, as a user with few rights, with a patience of one's own, and bytes as they are."""

import contextlib
import logging
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

import db
from db import redis_client
from tests.servers import database_of

VECTOR = [1.0, *[0.0] * 7]
PASSWORD = "s3cret-of-redis"
DOC = Path(__file__).parents[2] / "docs" / "roles.md"


def search_twice(database_url, redis_url):
    """Whether the second of two equal searches came from the cache."""
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8, maintenance_on_close=False) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
        return [store.search(VECTOR, 1).cached for _ in range(2)]


def as_user(url, user, password):
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.netloc}").geturl()


# ---- users


@pytest.fixture
def acl_user(redis_url, database_url):
    """A user that may do what docs/roles.md says, and on keys of ours only."""
    name = database_of(database_url)
    with redis.Redis.from_url(redis_url) as admin:
        [line] = [line for line in DOC.read_text().splitlines() if line.startswith("ACL SETUSER vk ")]
        rules = line.removeprefix("ACL SETUSER vk ").replace("PASSWORD", PASSWORD)
        admin.execute_command("ACL", "SETUSER", name, *rules.split())
        yield name
        admin.execute_command("ACL", "DELUSER", name)


def test_a_user_with_few_rights_is_enough(database_url, redis_url, acl_user):
    assert search_twice(database_url, as_user(redis_url, acl_user, PASSWORD)) == [False, True]


def test_keys_begin_with_the_store(database_url, redis_url):
    assert search_twice(database_url, redis_url) == [False, True]
    with db.connect(database_url, redis_url) as store, store.pool.connection() as connection:
        prefix = f"vectorkeep:{connection.identity.store}:".encode()
    with redis.Redis.from_url(redis_url) as client:
        names = list(client.scan_iter())
        assert names
        assert all(name.startswith(prefix) for name in names)


def test_without_the_right_password_the_database_answers(database_url, redis_url, acl_user, caplog):
    wrong = as_user(redis_url, acl_user, "wrong-" + PASSWORD)
    assert search_twice(database_url, wrong) == [False, False]
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == ["cache.unavailable"]
    assert PASSWORD not in caplog.text + str([vars(record) for record in caplog.records])


# ---- TLS


@pytest.fixture
def tls_server(servers, tmp_path):
    """A Redis that speaks TLS only, with its CA's certificate; in a container."""
    if getattr(servers, "others", servers).kind != "containers":
        pytest.skip("the embedded Valkey is built without TLS")
    trustme = pytest.importorskip("trustme")
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    authority = trustme.CA()
    certificate = authority.issue_cert(DockerContainer("redis:7").get_container_host_ip())
    folder = tmp_path / "tls"
    folder.mkdir()
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    command = (
        "redis-server --port 0 --tls-port 6379 --tls-cert-file /tls/cert.pem --tls-key-file /tls/key.pem "
        f"--tls-ca-cert-file /tls/ca.pem --tls-auth-clients no --user default off --user vk on >{PASSWORD} "
        "~vectorkeep:* +@all"
    )
    container = (
        DockerContainer("redis:7")
        .with_volume_mapping(str(folder), "/tls", "ro")
        .with_exposed_ports(6379)
        .with_command(command)
        .waiting_for(LogMessageWaitStrategy("Ready to accept connections"))
    )
    with container:
        yield f"{container.get_container_host_ip()}:{container.get_exposed_port(6379)}", folder / "ca.pem"


def test_tls_and_a_user(database_url, tls_server, caplog):
    address, authority = tls_server
    url = f"rediss://vk:{PASSWORD}@{address}/0?ssl_ca_certs={authority}"
    assert search_twice(database_url, url) == [False, True]
    untrusted = url.partition("?")[0]  # no authority of this machine signed that certificate
    assert search_twice(database_url, untrusted) == [False, False]
    plain = f"redis://vk:{PASSWORD}@{address}/0"
    assert search_twice(database_url, plain) == [False, False]
    warnings = [vars(r) for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert PASSWORD not in str(warnings)


def test_a_certificate_for_another_host_is_refused(tls_server):
    address, authority = tls_server
    host, _, port = address.partition(":")
    other = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}.get(host)
    if other is None:
        pytest.skip(f"containers are on {host}, which has no other name to try")
    url = f"rediss://vk:{PASSWORD}@{other}:{port}/0?ssl_ca_certs={authority}"
    client = redis_client.connect(url, timeout_s=10, connect_timeout_s=10)
    with contextlib.closing(client), pytest.raises(redis.ConnectionError, match="certificate"):
        client.ping()


# ---- patience and bytes


@pytest.mark.parametrize("option", ["decode_responses=True", "db=1&decode_responses=1", "encoding=latin-1"])
def test_a_url_that_would_change_values_is_refused(database_url, redis_url, option):
    with pytest.raises(db.ValidationError, match=r"redis_url sets (decode_responses|encoding); take it out"):
        db.connect(database_url, f"{redis_url}?{option}" if "?" not in redis_url else f"{redis_url}&{option}")


@pytest.mark.parametrize(
    "url", [f"redis://:{PASSWORD}/x@127.0.0.1/0", f"redis://u:{PASSWORD}@h:port/0", f"nonsense://{PASSWORD}@h"]
)
def test_a_url_that_cannot_be_read_is_not_repeated(database_url, url):
    with pytest.raises(db.ValidationError, match="redis_url cannot be read") as refused:
        db.connect(database_url, url)
    assert "s3cret" not in str(refused.value)
    assert refused.value.__cause__ is None
