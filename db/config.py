"""Settings: from `connect(...)`, else from the environment, else their defaults."""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import platformdirs
import psycopg
import pydantic
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from .errors import ValidationError
from .values import utf8_size

Consistency = Literal["strict", "bounded"]
Distance = Literal["cosine", "l2", "inner_product"]


class Settings(BaseSettings):
    """What a store needs to know. Each field is read from `VECTORKEEP_<NAME>` where it is not given.

    Times carry their unit in the name. `database_url` absent and no `POSTGRES_HOST` set means the
    embedded servers under `home`; `redis_url` False means no cache.
    """

    model_config = SettingsConfigDict(
        env_prefix="VECTORKEEP_",
        env_ignore_empty=True,
        env_parse_none_str="null",
        extra="forbid",
        populate_by_name=True,
        hide_input_in_errors=True,  # a URL given under a wrong name is an input, too
    )

    # URLs hold passwords: no repr shows them.
    database_url: str | None = Field(default=None, repr=False)
    maintenance_url: str | None = Field(default=None, repr=False)
    redis_url: str | Literal[False] | None = Field(default=None, repr=False)
    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("vectorkeep")))
    embedded_settings: dict[str, str] = {}

    model_id: str | None = None
    dimensions: int | None = Field(default=None, ge=1, le=16_000)
    distance: Distance = "cosine"
    # Given, it is what searches use; else what `maintain` tuned them to, else this default.
    ef_search: int = Field(default=100, ge=1, le=1000)
    target_recall: float = Field(default=0.95, gt=0, le=1)
    query_samples: int = Field(default=500, ge=0)
    consistency: Consistency = "strict"
    cache_ttl_s: int = Field(default=3600, ge=1)
    bounded_ttl_s: int = Field(default=60, ge=1)
    # What a search waits for Redis, at most, before it asks the database: an answer from there takes a few ms.
    redis_timeout_ms: float = Field(default=80, gt=0, le=60_000)
    redis_connect_timeout_ms: float = Field(default=50, gt=0, le=60_000)
    chunk_size: int = Field(default=1000, ge=50)
    chunk_overlap: int = Field(default=100, ge=0)
    vector_cache_mb: float = Field(default=512, ge=0)

    pool_max: int = Field(default=20, ge=1)
    pool_idle_s: float = Field(default=30, gt=0)
    pool_timeout_s: float = Field(default=30, gt=0)
    connect_timeout_s: float = Field(default=2, gt=0)
    statement_timeout_s: float = Field(default=30, gt=0)
    idle_in_transaction_timeout_s: float = Field(default=60, gt=0)
    lock_timeout_s: float = Field(default=5, gt=0)
    prepare_threshold: int | None = 5
    on_pause: Literal["raise", "wait"] = "raise"
    pause_wait_s: float = Field(default=600, gt=0)
    keep_previous_days: float = Field(default=7, ge=0)
    maintenance_on_close: bool = True
    maintenance_due_s: float = Field(default=86_400, ge=0)
    debug: bool = False

    postgres_host: str | None = Field(default=None, validation_alias=AliasChoices("postgres_host", "POSTGRES_HOST"))
    # Text, and read only where POSTGRES_HOST is used: Kubernetes sets a variable of this name to an address.
    postgres_port: str = Field(default="5432", validation_alias=AliasChoices("postgres_port", "POSTGRES_PORT"))
    postgres_db: str | None = Field(default=None, validation_alias=AliasChoices("postgres_db", "POSTGRES_DB"))
    postgres_user: str | None = Field(default=None, validation_alias=AliasChoices("postgres_user", "POSTGRES_USER"))
    postgres_password: pydantic.SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("postgres_password", "POSTGRES_PASSWORD")
    )

    @pydantic.field_validator("postgres_port", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @pydantic.field_validator("database_url", "maintenance_url")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        """What a variable of a shell that is not set gives must not mean another store than the one intended."""
        if value == "":
            raise ValueError("it is empty; give a URL, or leave it out")
        utf8_size("the database URL", value or "")
        return value

    @pydantic.field_validator("home")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError as exc:
            raise ValueError(f"{exc}; expected the path of a folder") from exc

    @pydantic.field_validator("redis_url", mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        return False if isinstance(value, str) and value.lower() in ("none", "false", "off", "") else value

    @classmethod
    def load(cls, given: Mapping[str, Any]) -> Self:
        """Settings from `given` over the environment. Raises ValidationError that names each bad setting."""
        return _loaded(cls, given)

    def direct_url(self) -> str | None:
        """The URL for maintenance in libpq's form, or None where the usual one serves."""
        return libpq_url(self.maintenance_url) if self.maintenance_url else None

    def postgres_url(self) -> str | None:
        """The URL of the configured server in libpq's form, or None where the embedded one is meant."""
        if self.database_url:
            return libpq_url(self.database_url)
        if not self.postgres_host:
            return None
        if not self.postgres_port.isdigit():
            raise ValidationError(f"POSTGRES_PORT is {self.postgres_port!r}; expected a number")
        user = quote(self.postgres_user or "", safe="")
        if self.postgres_password is not None:
            user += ":" + quote(self.postgres_password.get_secret_value(), safe="")
        database = quote(self.postgres_db or "", safe="")
        at = f"{user}@" if user else ""
        host = self.postgres_host
        if host.startswith("/"):
            return f"postgresql://{at}/{database}?host={quote(host, safe='')}&port={self.postgres_port}"
        if not _is_host(host):  # it would be read as another part of the URL, or the URL be told by an error
            raise ValidationError(
                f"POSTGRES_HOST is {host!r}; expected a host name, an address, or the folder of a socket"
            )
        if "," not in host and host.count(":") > 1:
            host = f"[{quote(host.removeprefix('[').removesuffix(']'), safe=':')}]"
        return f"postgresql://{at}{host}:{self.postgres_port}/{database}"


class OpenAISettings(BaseSettings):
    """The OpenAI-compatible endpoint of the command line, each field from `VECTORKEEP_OPENAI_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="VECTORKEEP_OPENAI_", env_ignore_empty=True, extra="forbid", hide_input_in_errors=True
    )

    base_url: str = "https://api.openai.com/v1"
    api_key: pydantic.SecretStr | None = None
    model: str
    dimensions: int = Field(ge=1, le=16_000)
    batch_size: int = Field(default=128, ge=1)
    max_concurrency: int = Field(default=4, ge=1)
    timeout_s: float = Field(default=30, gt=0)

    @classmethod
    def load(cls, given: Mapping[str, Any]) -> Self:
        """Settings from `given` over the environment. Raises ValidationError that names each bad variable."""
        return _loaded(cls, given, "VECTORKEEP_OPENAI_{}")


S = TypeVar("S", bound=BaseSettings)
_JSON_EXAMPLE = '{"work_mem": "8MB"}'


def _loaded(kind: type[S], given: Mapping[str, Any], shown: str | None = None) -> S:
    """`kind` from `given` and the environment; errors name a setting by its own name, or as `shown` says."""
    try:
        return kind(**given)
    except SettingsError as exc:  # its cause shows what was given
        field = next((name for name in kind.model_fields if f'"{name}"' in str(exc)), "a setting")
        raise ValidationError(f"bad settings: {field}: it is no JSON; expected such as {_JSON_EXAMPLE}") from None
    except pydantic.ValidationError as exc:
        names = [".".join(map(str, error["loc"])) for error in exc.errors()]
        names = [shown.format(name.upper()) for name in names] if shown else names
        problems = "; ".join(f"{name}: {e['msg']}" for name, e in zip(names, exc.errors(), strict=True))
        raise ValidationError(f"bad settings: {problems}") from exc


def _is_host(text: str) -> bool:
    """Whether `text` is a host name or an address, of version 6 also in brackets; a URL reads others otherwise."""
    if "," not in text and (text.startswith("[") or text.count(":") > 1):
        try:
            address = ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]"))
            return text.startswith("[") == text.endswith("]") and bool(address)
        except ValueError:
            return False
    return re.fullmatch(r"([\w.-]+(:\d+)?,)*[\w.-]+", text) is not None  # POSTGRES_PORT is that of the last


def libpq_url(url: str) -> str:
    """`url` as libpq reads it. Accepts postgres://, postgresql:// and postgresql+psycopg://."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+psycopg", "postgres+psycopg"):
        begin = scheme.split(":")[0][:20] if separator else "no scheme"
        raise ValidationError(
            f"database URL begins with {begin!r}; expected postgres://, postgresql:// or postgresql+psycopg://"
        )
    if not is_unambiguous(rest) or not _is_readable(f"postgresql://{rest}"):
        raise ValidationError(
            "database URL cannot be read; expected postgresql://user:password@host:port/database, "
            "special characters in each part percent-encoded"
        )
    return f"postgresql://{rest}"


def is_unambiguous(rest: str) -> bool:
    """Whether what follows `scheme://` has its password where it is looked for.

    A password with an @ or a / that is not encoded would be taken for host and port, and told by every error.
    """
    address, _, path = rest.partition("?")[0].partition("/")
    return address.count("@") <= 1 and "@" not in path


def _is_readable(url: str) -> bool:
    # libpq's own message would show the URL, or the password in it, and so would an exception chained to it.
    try:
        ports = str(conninfo_to_dict(url).get("port") or "")
    except psycopg.ProgrammingError:
        return False
    return all(not port or port.isdigit() for port in ports.split(","))


def redacted(url: str) -> str:
    """`url` without its password, fit for logs and reports."""
    if url.startswith("postgresql://"):
        parts = conninfo_to_dict(url)
        parts.pop("password", None)
        parts.pop("passfile", None)
        user, host, port, name = (parts.get(key) for key in ("user", "host", "port", "dbname"))
        host, port = str(host or "localhost"), str(port or 5432)
        at = f"{user}@" if user else ""
        if host.startswith("/"):
            return f"postgresql://{at}/{name or ''}?host={host}"
        return f"postgresql://{at}{host}:{port}/{name or ''}"
    split = urlsplit(url)
    host = split.hostname or ""
    netloc = (f"{split.username}@" if split.username else "") + host + (f":{split.port}" if split.port else "")
    return urlunsplit((split.scheme, netloc, split.path, "", ""))


def pool_session(settings: Settings) -> dict[str, str]:
    """What a session of a store's pool is to have set, as pg_settings shows it: times in milliseconds."""
    return {
        "statement_timeout": str(int(settings.statement_timeout_s * 1000)),
        "idle_in_transaction_session_timeout": str(int(settings.idle_in_transaction_timeout_s * 1000)),
        # A generic plan made while a table was empty, or for any source alike, is kept and reads everything.
        "plan_cache_mode": "force_custom_plan",
    }


def session_conninfo(url: str, settings: Settings, *, maintenance: bool = False) -> str:
    """Connection string of one session: its timeouts and name set, off for maintenance.

    A statement timeout in maintenance would leave an invalid index behind, so there is none there.
    """
    given = pool_session(settings)
    if maintenance:
        given |= dict.fromkeys(
            ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"), "0"
        )
    parts = conninfo_to_dict(url)
    options = [str(parts["options"])] if parts.get("options") else []
    options += [f"-c {name}={value}" for name, value in given.items()]
    options.append("-c client_min_messages=warning")
    parts["client_encoding"] = "UTF8"  # whatever the environment, the role or the database says: rows are sent in it
    parts.setdefault("application_name", "vectorkeep maintenance" if maintenance else "vectorkeep")
    parts.setdefault("connect_timeout", max(2, round(settings.connect_timeout_s)))
    return make_conninfo("", **{**parts, "options": " ".join(options)})
