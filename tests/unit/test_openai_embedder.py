"""Against a real HTTP server in a thread that limits rates, fails, reorders and cuts its answers short."""

import json
import logging
import pickle
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from db.embedder import checked, configured_embedder, embedder_by_name
from db.errors import ClosedError, DimensionError, UnavailableError, ValidationError
from db.openai_embedder import OpenAIEmbedder

KEY = "sk-very-secret-0123"


def vector_of(text, dimensions=3):
    return [float(len(text)), float(sum(text.encode()) % 1000), 1.0][:dimensions]


def answer_to(request, order=list):
    data = [{"object": "embedding", "index": n, "embedding": vector_of(t)} for n, t in enumerate(request["input"])]
    return {"object": "list", "model": request["model"], "data": order(data), "usage": {"total_tokens": 1}}


class EmbeddingServer(ThreadingHTTPServer):
    """Answers by `replies` while there are any, then well. Notes each request and how many ran at once."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = []
        self.otherwise = lambda request: (200, {}, json.dumps(answer_to(request)))
        self.requests, self.times, self.headers, self.paths = [], [], [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that gave up waiting is no error here."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.requests.append(request)
            server.times.append(time.monotonic())
            server.headers.append(self.headers)
            server.paths.append(self.path)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            reply = server.replies.pop(0) if server.replies else server.otherwise
        try:
            status, headers, body = reply(request) if callable(reply) else reply
        finally:
            with server.lock:
                server.running -= 1
        body = body.encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if int(headers.get("content-length", len(body))) > len(body):
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    opened = EmbeddingServer()
    thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield opened
    opened.shutdown()
    thread.join()
    opened.server_close()


@pytest.fixture
def make(server):
    made = []

    def build(**options):
        options = {"api_key": KEY, "batch_size": 2, **options}
        made.append(OpenAIEmbedder(server.url, "m", options.pop("dimensions", 3), **options))
        return made[-1]

    yield build
    for embedder in made:
        embedder.close()


@pytest.fixture
def waits(monkeypatch):
    """The backoffs between tries, noted and not waited for."""
    slept = []
    monkeypatch.setattr("db.openai_embedder._rest", lambda _ended, seconds: slept.append(seconds))
    return slept


def error(status, message="no", headers=None):
    return status, headers or {}, json.dumps({"error": {"message": message, "type": "t", "code": "c"}})


def test_texts_travel_in_batches_and_come_back_in_order(server, make):
    texts = [f"text {'x' * n}" for n in range(7)]
    vectors = checked(make(), texts)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [vector_of(t) for t in texts]
    assert sorted(len(r["input"]) for r in server.requests) == [1, 2, 2, 2]
    assert {r["model"] for r in server.requests} == {"m"}
    assert set(server.paths) == {"/v1/embeddings"}
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"}


def test_no_text_sends_no_request(server, make):
    assert make().embed([]).shape == (0, 3)
    assert server.requests == []


def test_without_a_key_none_is_sent(server, make):
    make(api_key=None).embed(["a"])
    assert server.headers[0]["authorization"] is None


def test_vectors_are_put_in_order_by_their_index(server, make):
    server.otherwise = lambda r: (200, {}, json.dumps(answer_to(r, order=lambda data: data[::-1])))
    texts = ["a", "bb", "ccc"]
    assert make(batch_size=3).embed(texts).tolist() == [vector_of(t) for t in texts]


def test_a_server_that_gives_no_index_is_taken_by_order(server, make):
    def without_index(request):
        answer = answer_to(request)
        for entry in answer["data"]:
            del entry["index"]
        return 200, {}, json.dumps(answer)

    server.otherwise = without_index
    assert make().embed(["a", "bb"]).tolist() == [vector_of("a"), vector_of("bb")]


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_requests_run_at_a_time_of_all_threads_together(server, make, limit):
    arrived = threading.Semaphore(0)
    go = threading.Event()

    def held(request):
        arrived.release()
        go.wait(20)
        return 200, {}, json.dumps(answer_to(request))

    server.otherwise = held
    embedder = make(batch_size=1, max_concurrency=limit)
    callers = [threading.Thread(target=embedder.embed, args=([f"{n} {m}" for m in range(4)],)) for n in range(2)]
    for caller in callers:
        caller.start()
    assert all(arrived.acquire(timeout=20) for _ in range(limit))
    assert not arrived.acquire(timeout=0.3)  # the next is not sent while these run
    go.set()
    for caller in callers:
        caller.join()
    assert server.most_running == limit
    assert len(server.requests) == 8


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_passing_failure_is_tried_again(server, make, waits, status):
    server.replies = [error(status), error(status)]
    assert make().embed(["a"]).tolist() == [vector_of("a")]
    assert len(server.requests) == 3
    assert len(waits) == 2


def test_waits_grow_and_differ(server, make, waits):
    server.otherwise = error(503)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            make(attempts=5).embed(["a"])
    assert len(set(waits)) == 8
    for wait, least in zip(waits, [0.5, 1, 2, 4] * 2, strict=True):
        assert least <= wait <= least + 1


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "2500"}, 2.5),
    ],
)
def test_a_server_that_says_how_long_to_wait_is_obeyed(server, make, waits, headers, least):
    server.replies = [error(429, headers=headers)]
    make().embed(["a"])
    assert least <= waits[0] <= 1.1 * least + 0.1


def test_a_server_that_says_until_when_to_wait_is_obeyed(server, make, waits):
    until = datetime.now(UTC) + timedelta(seconds=90)
    server.replies = [error(429, headers={"retry-after": format_datetime(until, usegmt=True)})]
    make().embed(["a"])
    assert 60 <= waits[0] <= 101


def test_retry_after_is_really_waited(server, make):
    server.replies = [error(429, headers={"retry-after-ms": "300"})]
    make().embed(["a"])
    assert server.times[1] - server.times[0] >= 0.3


def test_a_server_that_asks_to_wait_too_long_is_not_waited_for(server, make, waits):
    server.otherwise = error(429, "quota used up", {"retry-after": "3600"})
    with pytest.raises(UnavailableError, match=r"status 429: quota used up"):
        make(retry_for_s=120).embed(["a"])
    assert len(server.requests) == 1
    assert waits == []


@pytest.mark.parametrize("value", ["soon", "-1", "", "nan", "٣", f"Wed, {10**20} Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_means_nothing_is_passed_over(server, make, waits, value):
    server.replies = [(503, {"retry-after": value.encode("utf-8").decode("latin-1")}, "")]
    make().embed(["a"])
    assert 0.5 <= waits[0] <= 1.5


def test_a_bad_number_of_milliseconds_leaves_the_other_header(server, make, waits):
    server.replies = [error(429, headers={"retry-after-ms": "abc", "retry-after": "7"})]
    make().embed(["a"])
    assert waits[0] >= 7


def test_a_wait_that_would_end_too_late_is_not_begun(server, make, waits):
    server.otherwise = error(429, headers={"retry-after": "1"})
    with pytest.raises(UnavailableError):
        make(retry_for_s=0.9).embed(["a"])
    assert (len(server.requests), waits) == (1, [])


def test_what_ends_a_call_ends_the_waits_of_its_requests(server, make):
    """They run in threads, which the interpreter waits for at its end."""
    server.otherwise = error(429, headers={"retry-after": "100"})
    embedder = make(batch_size=1)
    failed = []

    def embed():
        with pytest.raises(UnavailableError) as raised:
            embedder.embed(["a", "b"])
        failed.append(raised.value)

    waiting = threading.Thread(target=embed)
    waiting.start()
    while len(server.requests) < 2:
        time.sleep(0.01)
    embedder.close()
    waiting.join(20)
    assert len(failed) == 1
    with pytest.raises(ClosedError, match="closed"):
        embedder.embed(["a"])


def test_one_request_that_is_refused_ends_the_waits_of_the_others(server, make):
    arrived = threading.Event()

    def one_waits(request):
        if request["input"] == ["waits"]:
            arrived.set()
            return error(429, headers={"retry-after": "100"})
        arrived.wait(20)
        return error(400, "never")

    server.otherwise = one_waits
    embedder = make(batch_size=1)
    with pytest.raises(ValidationError, match="never"):
        embedder.embed(["waits", "b"])
    embedder.close()  # waits for threads
    assert len(server.requests) == 2


def test_after_the_last_try_it_is_unavailable_and_says_why(server, make, waits):
    server.otherwise = error(503, "model is loading")
    with pytest.raises(UnavailableError, match=rf"{server.url} cannot serve this now: status 503: model is loading"):
        make(attempts=3).embed(["a"])
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_unavailable(server, waits):
    with pytest.raises(UnavailableError, match="ConnectError"):
        OpenAIEmbedder("http://127.0.0.1:9/v1", "m", 3, attempts=2).embed(["a"])
    assert len(waits) == 1


def test_a_server_that_is_too_slow_is_unavailable(server, make, waits):
    done = threading.Event()
    server.otherwise = lambda request: (done.wait(20) and 0) or (200, {}, "{}")
    try:
        with pytest.raises(UnavailableError, match="ReadTimeout"):
            make(attempts=2, timeout_s=0.2).embed(["a"])
    finally:
        done.set()
    assert len(server.requests) == 2


@pytest.mark.parametrize("told_length", [True, False], ids=["cut in the body", "cut and the length is right"])
def test_an_answer_cut_short_is_asked_for_again(server, make, waits, told_length):
    def cut(request):
        body = json.dumps(answer_to(request))
        return 200, {"content-length": str(len(body))} if told_length else {}, body[:40]

    server.replies = [cut, cut]
    assert make().embed(["a"]).tolist() == [vector_of("a")]
    server.otherwise = cut
    with pytest.raises(UnavailableError):
        make(attempts=2).embed(["b"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_told_in_the_servers_words_and_not_repeated(server, make, waits, status):
    server.otherwise = error(status, "maximum context length is 8192 tokens")
    with pytest.raises(ValidationError, match=rf"status {status}: maximum context length is 8192 tokens"):
        make().embed(["a"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"message": "bad input"}', "bad input"),
        ('{"error": "as a string"}', "as a string"),
        ("<h1>Bad\n Gateway</h1>", "<h1>Bad Gateway</h1>"),
        ("", "no message"),
        ("[1, 2]", r"\[1, 2\]"),
    ],
)
def test_the_message_is_found_in_other_forms_of_error_too(server, make, body, said):
    server.otherwise = (404, {}, body)
    with pytest.raises(ValidationError, match=f"status 404: {said}$"):
        make().embed(["a"])


def test_a_redirect_is_told_and_not_followed_with_the_key(server, make):
    server.otherwise = (307, {"location": "http://elsewhere.example/"}, "")
    with pytest.raises(ValidationError, match="status 307"):
        make().embed(["a"])
    assert len(server.requests) == 1


def test_what_comes_after_a_batch_that_failed_is_not_sent(server, make):
    server.otherwise = error(400)
    with pytest.raises(ValidationError):
        make(batch_size=1, max_concurrency=1).embed([str(n) for n in range(50)])
    assert len(server.requests) < 5


def test_vectors_of_another_length_name_both(server, make):
    with pytest.raises(DimensionError, match=r"vectors of 3 dimensions for 'm', expected 4"):
        make(dimensions=4).embed(["a"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: [*data, data[0]],
        lambda data: [data[0], {**data[1], "index": 0}],
        lambda data: [data[0], {**data[1], "index": 2}],
        lambda data: [data[0], {"index": 1}],
        lambda data: None,
        lambda data: [data[0], {**data[1], "embedding": [1.0]}],
        lambda data: [data[0], {**data[1], "embedding": ["x", "y", "z"]}],
    ],
)
def test_an_answer_of_another_form_is_refused_and_not_asked_for_again(server, make, waits, spoil):
    server.otherwise = lambda r: (200, {}, json.dumps(answer_to(r, order=spoil)))
    with pytest.raises(ValidationError, match=server.url):
        make().embed(["a", "b"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 503])
def test_the_key_is_in_no_error_even_where_the_server_repeats_it(server, make, waits, caplog, status):
    caplog.set_level(logging.DEBUG)
    server.otherwise = error(status, f"Incorrect API key provided: {KEY}")
    with pytest.raises((ValidationError, UnavailableError)) as caught:
        make(attempts=2).embed(["a"])
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert caplog.records
    assert not [r for r in caplog.records if KEY in r.getMessage() or KEY in str(vars(r))]


def test_the_key_is_in_no_repr(server, make):
    embedder = make()
    embedder.embed(["a"])
    assert repr(embedder) == f"OpenAIEmbedder('{server.url}', 'm', 3)"
    assert KEY not in str(vars(embedder))
    assert KEY not in repr(embedder._client.headers)
    with pytest.raises(TypeError):
        pickle.dumps(embedder)


def test_a_key_read_from_a_file_works_and_a_bad_one_is_not_shown(server, make):
    make(api_key=f"{KEY}\n").embed(["a"])
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    for bad in (f"{KEY}\nx", f"{KEY}é", f"two {KEY}"):
        with pytest.raises(ValidationError, match="api_key has characters") as caught:
            make(api_key=bad)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "api.openai.com/v1", "ftp://h/v1", "https://", "https://u:p4ss@h/v1", "http://h/?a=1"]
)
def test_a_url_of_another_form_is_refused_and_its_password_not_shown(url):
    with pytest.raises(ValidationError, match="base_url") as caught:
        OpenAIEmbedder(url, "m", 3)
    assert "p4ss" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "/", "/embeddings", "/embeddings/"])
def test_the_url_may_end_as_people_write_it(server, end):
    OpenAIEmbedder(server.url + end, "m", 3).embed(["a"])
    assert server.paths == ["/v1/embeddings"]


@pytest.mark.parametrize("name", ["batch_size", "max_concurrency", "attempts"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_bad_number_is_named(name, value):
    with pytest.raises(ValidationError, match=f"{name} is {value}; expected an integer of 1 or more"):
        OpenAIEmbedder("http://h/v1", "m", 3, **{name: value})


def test_the_command_lines_openai_is_configured_by_the_environment(server, monkeypatch):
    for name, value in {"BASE_URL": server.url, "API_KEY": KEY, "MODEL": "e-small", "DIMENSIONS": "3"}.items():
        monkeypatch.setenv(f"VECTORKEEP_OPENAI_{name}", value)
    embedder = configured_embedder()
    assert (embedder.model_id, embedder.dimensions) == ("e-small", 3)
    assert embedder.embed(["a"]).tolist() == [vector_of("a")]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_the_command_lines_embedder_is_the_packaged_one_where_nothing_is_configured(monkeypatch):
    monkeypatch.delenv("VECTORKEEP_OPENAI_MODEL", raising=False)
    assert configured_embedder().model_id == "wordllama-l2-supercat-256"


def test_the_command_lines_openai_names_what_is_not_configured(monkeypatch):
    for name in ("BASE_URL", "API_KEY", "MODEL", "DIMENSIONS"):
        monkeypatch.delenv(f"VECTORKEEP_OPENAI_{name}", raising=False)
    with pytest.raises(ValidationError, match=r"VECTORKEEP_OPENAI_MODEL.*VECTORKEEP_OPENAI_DIMENSIONS"):
        embedder_by_name("openai")
