"""`vectorkeep migrate`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from db import adopt as adoption
from db import registry
from db.config import Settings
from db.embedder import embedder_by_name
from db.engine import connect_directly
from db.errors import translated
from db.migrate import current_revision, head_revision, upgrade
from db.roles import DEFAULT_PREFIX, RolesPlan, RolesResult, make_roles, roles_sql
from db.write_triggers import set_write_triggers

from .command import Cli
from .exit_codes import ExitCode
from .opening import DEFAULT_EMBEDDER, target_url


class Distance(StrEnum):
    COSINE = "cosine"
    L2 = "l2"
    INNER_PRODUCT = "inner_product"


@dataclass(frozen=True)
class _Model:
    model_id: str
    dimensions: int | None
    distance: Distance


def migrate(
    cli: Cli,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Register this embedding model and build its indexes."),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, max=16_000, show_default=False, help="Dimensions of the model's vectors.")
    ] = None,
    distance: Annotated[
        Distance | None,
        typer.Option(
            help="How vectors are compared; fixed for good. Default: VECTORKEEP_DISTANCE, else cosine.",
            show_default=False,
        ),
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take over tables made by hand; --model names what made their vectors.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only tell whether the schema is at head.")] = False,
    roles: Annotated[
        bool, typer.Option("--roles", help="Also make the roles owner, app, reader and tenant, with what each needs.")
    ] = False,
    tenants: Annotated[
        bool,
        typer.Option("--tenants", help="With --roles: each tenant sees its workspaces only, by row-level security."),
    ] = False,
    role_prefix: Annotated[
        str, typer.Option(metavar="NAME", help="With --roles: what the roles' names begin with.")
    ] = DEFAULT_PREFIX,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="With --roles: print the SQL, for an administrator; change nothing.")
    ] = False,
    triggers: Annotated[
        bool | None,
        typer.Option(
            "--with-triggers/--without-triggers",
            help="Also make triggers that tell the cache of writes by other SQL, or drop them.",
            show_default=False,
        ),
    ] = None,
) -> ExitCode | None:
    """Bring the schema to the newest revision.

    It works online, but for --adopt, which locks everybody out while it rewrites the tables, and is safe to run again.
    Prints the revisions before and after. With --check nothing is changed, and the exit code is 4 where the schema is
    not at head.
    """
    chosen = _chosen_model(model, dimensions, distance, adopt=adopt)
    plan = _roles_plan(role_prefix, roles=roles, tenants=tenants, print_sql=print_sql)
    alone = {"--check": check, "--adopt": adopt, "--print-sql": print_sql}
    _refuse_beside("--with-triggers", triggers is not None, alone)
    _refuse_beside("--roles", roles, {"--check": check, "--adopt": adopt})
    _refuse_beside("--model", model is not None, {"--check": check, "--print-sql": print_sql})
    _refuse_beside("--adopt", adopt, {"--check": check})
    with target_url(cli.options) as url:
        if check:
            return _check(cli, url)
        if plan is not None and print_sql:
            _print_sql(cli, roles_sql(url, plan))
            return None
        if adopt and chosen is not None:
            _adopt(cli, url, chosen)
            return None
        before, after = upgrade(url, lock_timeout_s=Settings.load({}).lock_timeout_s, on_wait=cli.output.say)
        if chosen is not None and chosen.dimensions is not None:
            cli.output.say(f"registering {chosen.model_id} and building its indexes")
            registry.register_model(url, chosen.model_id, chosen.dimensions, chosen.distance.value)
        made = make_roles(url, plan) if plan is not None else None
        if triggers is not None:
            set_write_triggers(url, wanted=triggers)
    done = {"before": before, "after": after, "model": asdict(chosen) if chosen else None}
    cli.output.document({**done, **_roles_shown(made), **_triggers_shown(triggers)})
    done = {"before": before or "none", "after": after, **_model_fields(chosen), **_roles_fields(made)}
    cli.output.fields({**done, **_triggers_shown(triggers)})
    for note in made.notes if made else ():
        cli.output.say(note)
    return None


def _refuse_beside(option: str, given: bool, others: Mapping[str, bool]) -> None:
    """Raise BadParameter where `option` would be passed over: one of the `others` ends the command before."""
    for other in (other for other, is_given in others.items() if given and is_given):
        raise typer.BadParameter(f"goes without {other}: run one after the other", param_hint=option)


def _chosen_model(
    model: str | None, dimensions: int | None, distance: Distance | None, *, adopt: bool
) -> _Model | None:
    if model is None:
        if adopt:
            raise typer.BadParameter("--adopt needs --model: what made the vectors", param_hint="--model")
        if dimensions is not None:
            raise typer.BadParameter("--dimensions needs --model", param_hint="--dimensions")
        if distance is not None:
            raise typer.BadParameter("--distance needs --model", param_hint="--distance")
        return None
    distance = distance or Distance(Settings.load({}).distance)
    if model == DEFAULT_EMBEDDER:
        embedder = embedder_by_name(model)
        return _Model(embedder.model_id, dimensions or embedder.dimensions, distance)
    if dimensions is None and not adopt:
        raise typer.BadParameter("--model needs --dimensions", param_hint="--model")
    return _Model(model, dimensions, distance)


def _check(cli: Cli, url: str) -> ExitCode | None:
    current = revision_at(url)
    head = head_revision()
    cli.output.document({"current": current, "head": head, "at_head": current == head})
    cli.output.fields({"current": current or "none", "head": head})
    if current == head:
        return None
    cli.output.complain("the schema is not at head; run 'vectorkeep migrate'")
    return ExitCode.SCHEMA


def revision_at(url: str) -> str | None:
    """The schema's revision, None where there is no schema."""
    with translated(), connect_directly(url, Settings(database_url=url)) as connection:
        return current_revision(connection)


def _adopt(cli: Cli, url: str, model: _Model) -> None:
    result = adoption.adopt(url, model_id=model.model_id, dimensions=model.dimensions, distance=model.distance.value)
    cli.output.document(result)
    adopted = asdict(result)
    for sentence in adopted.pop("details"):
        cli.output.say(sentence)
    cli.output.fields(adopted)


def _model_fields(model: _Model | None) -> dict[str, Any]:
    if model is None:
        return {}
    return {"model": model.model_id, "dimensions": model.dimensions, "distance": model.distance.value}


def _roles_plan(prefix: str, *, roles: bool, tenants: bool, print_sql: bool) -> RolesPlan | None:
    given = {"--tenants": tenants, "--print-sql": print_sql, "--role-prefix": prefix != DEFAULT_PREFIX}
    if roles:
        return RolesPlan(prefix, tenants)
    for option in (option for option, is_given in given.items() if is_given):
        raise typer.BadParameter(f"{option} needs --roles", param_hint=option)
    return None


def _print_sql(cli: Cli, planned: RolesResult) -> None:
    """A script for psql: one transaction, stopped by the first error."""
    cli.output.document(planned)
    for line in ("\\set ON_ERROR_STOP on", "BEGIN;", *(f"{sql};" for sql in planned.statements), "COMMIT;"):
        cli.output.line(line)
    for note in planned.notes:
        cli.output.say(note)


def _roles_shown(made: RolesResult | None) -> dict[str, Any]:
    if made is None:
        return {}
    return {"roles": made.roles, "tenants": made.tenants, "notes": made.notes}


def _roles_fields(made: RolesResult | None) -> dict[str, Any]:
    if made is None:
        return {}
    return {"roles": ", ".join(made.roles.values()), "row_level_security": "on" if made.tenants else "off"}


def _triggers_shown(triggers: bool | None) -> dict[str, Any]:
    return {} if triggers is None else {"triggers": "on" if triggers else "off"}
