"""Vectors from any server that speaks OpenAI's `/v1/embeddings`: in batches, patient with rate limits."""

import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import tenacity
from numpy.typing import NDArray
from pydantic import SecretStr

from .errors import ClosedError, DimensionError, UnavailableError, ValidationError

_SHOWN_CHARACTERS = 500
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 20.0
# Not stamina, which builds on this: its waits cannot be ended.
_backoff = tenacity.wait_exponential(_FIRST_WAIT_S, max=_LONGEST_WAIT_S) + tenacity.wait_random(0, 1)


class OpenAIEmbedder:
    """An embedder behind an OpenAI-compatible endpoint. Needs the `openai` extra.

    Threads may share it; processes must not: make one in each. `model_id` is the name of the model. `close`
    gives its connections and threads back.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        dimensions: int,
        *,
        api_key: str | None = None,
        batch_size: int = 128,
        max_concurrency: int = 4,
        timeout_s: float = 30,
        attempts: int = 6,
        retry_for_s: float = 120,
    ) -> None:
        """
        base_url: what comes before `/embeddings`, such as https://api.openai.com/v1.
        api_key: sent as a bearer token; no repr, log or error shows it.
        batch_size: texts in a request. max_concurrency: requests at a time, of all threads together.
        timeout_s: for connecting, and for each wait for data.
        attempts, retry_for_s: a request that fails for a passing reason is tried so many times, and not again
        after so many seconds; a wait that would end later than that, such as a server asks for, is not begun.

        Raises ValidationError for a bad argument or where the extra is not installed.
        """
        if find_spec("httpx2") is None:
            raise ValidationError("the package httpx2 is not installed; run: pip install 'vectorkeep[openai]'")
        self.model_id = model
        self.dimensions = dimensions
        self._base_url = _checked_url(base_url)
        self._key = SecretStr(_checked_key(api_key or ""))
        self._batch_size = _at_least_one("batch_size", batch_size)
        self._timeout_s = timeout_s
        self._attempts = _at_least_one("attempts", attempts)
        self._retry_for_s = retry_for_s
        self._threads = ThreadPoolExecutor(_at_least_one("max_concurrency", max_concurrency), "vectorkeep-openai")
        self._client: Any = None
        self._opening = threading.Lock()
        self._calls: set[threading.Event] = set()  # each set once its call has ended: no request of it is sent again

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self._base_url!r}, {self.model_id!r}, {self.dimensions})"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The server's vectors of `texts`, float32, shape (len(texts), dimensions).

        Raises UnavailableError where it cannot be reached, limits the rate or fails, each time it is tried;
        ValidationError with its message where it refuses the request, or where its answer has another form;
        DimensionError where its vectors have another length.
        """
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        parts = [slice(start, start + self._batch_size) for start in range(0, len(texts), self._batch_size)]
        requests: list[Future[list[Any]]] = []
        ended = threading.Event()
        self._calls.add(ended)
        try:
            for part in parts:
                requests.append(self._submit(list(texts[part]), ended))
            for finished in wait(requests, return_when=FIRST_EXCEPTION).done:
                finished.result()  # where it failed, the others are not waited for
            for part, request in zip(parts, requests, strict=True):
                vectors[part] = self._as_array(request.result())
        finally:
            ended.set()
            self._calls.discard(ended)
            for request in requests:
                request.cancel()  # of those after one that failed; no more is paid for
        return vectors

    def _submit(self, texts: list[str], ended: threading.Event) -> "Future[list[Any]]":
        try:
            return self._threads.submit(self._embed_batch, texts, ended)
        except RuntimeError as exc:
            raise ClosedError("the embedder is closed; make another one") from exc

    def close(self) -> None:
        """Give connections and threads back. It cannot embed afterwards."""
        for ended in list(self._calls):
            ended.set()
        self._threads.shutdown(cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def _embed_batch(self, texts: list[str], ended: threading.Event) -> list[Any]:
        """One request, tried again with backoff and jitter until its call has `ended`: else the interpreter would wait.

        Returns a vector for each text, in order.
        """
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._attempts),
                tenacity.stop_before_delay(self._retry_for_s),
                tenacity.stop_when_event_set(ended),
            ),
            wait=_wait_s,
            sleep=partial(_rest, ended),
            reraise=True,
        )
        try:
            return tries(self._try, texts, ended)
        except _PassingError as exc:
            raise UnavailableError(f"the embedding server {self._base_url} cannot serve this now: {exc}") from exc
        except _RefusedError as exc:
            raise ValidationError(f"the embedding server {self._base_url} {exc}") from exc

    def _try(self, texts: list[str], ended: threading.Event) -> list[Any]:
        if ended.is_set():
            raise _PassingError("nobody waits for it any more")
        return _in_order(self._post(texts), len(texts))

    def _post(self, texts: list[str]) -> Any:
        """The server's answer as JSON. Raises _PassingError and _RefusedError."""
        import httpx2  # here: it is an extra

        request = {"model": self.model_id, "input": texts, "encoding_format": "float"}
        try:
            response = self._open_client().post(f"{self._base_url}/embeddings", content=orjson.dumps(request))
        except httpx2.TransportError as exc:  # not reached, too slow, or cut off in mid-answer
            raise _PassingError(self._redacted(f"{type(exc).__name__}: {exc}")) from exc
        except (httpx2.RequestError, httpx2.InvalidURL) as exc:
            raise _RefusedError(
                self._redacted(f"gave no answer that can be read: {type(exc).__name__}: {exc}")
            ) from exc
        if response.status_code == 200:
            try:
                return orjson.loads(response.content)
            except orjson.JSONDecodeError as exc:
                raise _PassingError(f"its answer of {len(response.content)} bytes is not whole JSON: {exc}") from exc
        said = self._redacted(f"status {response.status_code}: {_message_in(response.content)}")
        if response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
            raise _PassingError(said, _retry_after_s(response.headers))
        raise _RefusedError(f"refused the request with {said}")

    def _open_client(self) -> Any:
        with self._opening:
            if self._client is None:
                import httpx2

                headers = {"content-type": "application/json"}
                if key := self._key.get_secret_value():
                    headers["authorization"] = f"Bearer {key}"
                self._client = httpx2.Client(headers=headers, timeout=self._timeout_s)
            return self._client

    def _redacted(self, text: str) -> str:
        """`text` without the key: some servers repeat it when they refuse it."""
        key = self._key.get_secret_value()
        return text.replace(key, "***") if key else text

    def _as_array(self, returned: list[Any]) -> NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):  # an infinity then, which the store refuses
                vectors = np.asarray(returned, dtype=np.float32)
        except (TypeError, ValueError) as exc:
            raise ValidationError(
                f"the embedding server {self._base_url} returned vectors of {self.model_id!r} "
                f"that are no lists of numbers of one length: {exc}"
            ) from exc
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise DimensionError(
                f"the embedding server {self._base_url} returned vectors of {vectors.shape[-1]} dimensions "
                f"for {self.model_id!r}, expected {self.dimensions}; correct `dimensions`, or the model's name"
            )
        return vectors


class _PassingError(Exception):
    """The server could not answer; it may another time, after `retry_after_s` where it said so."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _RefusedError(Exception):
    """The server will not answer this, however often it is asked."""


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try, as long as the server said where it did. Jitter spreads those who wait alike."""
    exc = state.outcome.exception() if state.outcome else None
    if not isinstance(exc, _PassingError) or exc.retry_after_s is None:
        return _backoff(state)
    return exc.retry_after_s + random.uniform(0, 0.1 * exc.retry_after_s + 0.1)


def _rest(ended: threading.Event, seconds: float) -> None:
    ended.wait(seconds)


def _in_order(answer: Any, expected: int) -> list[Any]:
    """The vectors of `answer` by their `index`; in the order given where the server leaves that out."""
    try:
        entries = [(entry.get("index", place), entry["embedding"]) for place, entry in enumerate(answer["data"])]
        by_index = dict(entries)
    except (TypeError, KeyError, AttributeError) as exc:
        raise _RefusedError("returned JSON of another form; expected {'data': [{'index', 'embedding'}]}") from exc
    if len(entries) != expected or by_index.keys() != set(range(expected)):
        raise _RefusedError(f"returned {len(by_index)} vectors for {expected} texts; expected one for each, by index")
    return [by_index[place] for place in range(expected)]


def _message_in(body: bytes) -> str:
    """What the server says of an error: OpenAI's form, others' forms, else the beginning of the body."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        told = None
    for key in ("error", "message", "detail"):
        if isinstance(told, Mapping) and key in told:
            told = told[key]
    text = told if isinstance(told, str) else body.decode(errors="replace")
    return " ".join(text.split())[:_SHOWN_CHARACTERS] or "no message"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: RFC 9110's Retry-After, a number or a date, or `retry-after-ms`."""
    with suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    value = headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValidationError("base_url is no http:// or https:// URL; expected one such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValidationError("base_url holds more than a host and a path; give the key as api_key")
    return url.rstrip("/").removesuffix("/embeddings")


def _checked_key(key: str) -> str:
    key = key.strip()  # a key read from a file ends with a line break
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValidationError("api_key has characters that no HTTP header can hold; check how it was read")
    return key


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValidationError(f"{name} is {value!r}; expected an integer of 1 or more")
    return value
