"""The rules of index health, all of them in one table.

A verdict is the worst of the rules that hold: `critical` means that searches miss what is there or do without the
index, `degraded` that they are slower or the index larger than need be. The table in docs/health.md is made of this
one by `rules_table`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from .index_facts import PLANNED_ROWS, UNSEEN, Facts
from .models import MAX_INDEXED_DIMENSIONS, Base, vector_index
from .types import BuildProgress, Health, Reason

DEAD_ROWS_DEGRADED = 0.2
STALE_DEGRADED = 0.5
BLOAT_DEGRADED = 1.5
RECALL_CRITICAL = 0.75
UNREACHABLE_CRITICAL = 0.05
# HNSW is approximate: a row or two of 200 that no search finds are no damage, and a new graph would have others.
UNREACHABLE_DEGRADED = 0.02
HIT_RATE_DEGRADED = 0.9
# Of fewer rows, whatever is wrong with the index costs nothing: all are compared in a moment.
SMALL_TABLE_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Rule:
    """When an index is not healthy. The evidence and the remedies are templates over the facts.

    when: the rule in words, for people. holds: the same for the computer.
    """

    name: str
    verdict: Health
    when: str
    holds: Callable[[Facts], bool]
    evidence: str
    command: str
    sql: str


_MIGRATE = "vectorkeep migrate --model {model.model_id} --dimensions {model.dimensions} --distance {model.distance}"
_MAINTAIN = "vectorkeep maintain"
_REINDEX = "REINDEX INDEX CONCURRENTLY {index}; VACUUM (ANALYZE) {table}"

RULES: tuple[Rule, ...] = (
    Rule(
        name="no-index",
        verdict="critical",
        when="there are vectors and no vector index",
        holds=lambda f: f.model.indexed and not f.server.exists and f.vectors > 0 and f.building is None,
        evidence="no vector index over {vectors} vectors, searches compare all",
        command=_MIGRATE,
        sql="{create}",
    ),
    Rule(
        name="invalid",
        verdict="critical",
        when="the vector index is invalid, and no build of it runs",
        holds=lambda f: f.server.exists and not f.valid and f.building is None,
        evidence="the vector index is invalid, its build was interrupted; searches compare all rows",
        command=_MAINTAIN,
        sql="DROP INDEX CONCURRENTLY {index}; {create}",
    ),
    Rule(
        name="being-built",
        verdict="degraded",
        when="the vector index is not valid yet, and a build of it, or one that the role may not see, runs",
        holds=lambda f: not f.valid and f.building is not None,
        evidence="the vector index is {building_told}; until then searches compare all rows",
        command="vectorkeep stats",
        sql="SELECT phase, blocks_done, blocks_total FROM pg_stat_progress_create_index",
    ),
    Rule(
        name="wrong-operator-class",
        verdict="critical",
        when="the index's operator class is not that of the store's distance",
        holds=lambda f: f.valid and f.server.operator_class != f.expected_class,
        evidence="the vector index has the operator class {server.operator_class}, which serves no search of a "
        "{model.distance} store; expected {expected_class}",
        command="psql -c 'DROP INDEX CONCURRENTLY {index}', then vectorkeep maintain",
        sql="DROP INDEX CONCURRENTLY {index}; {create}",
    ),
    Rule(
        name="not-planned",
        verdict="critical",
        when=f"over more than {PLANNED_ROWS} vectors, the plan of the store's own search does not use the index",
        holds=lambda f: f.planned is False and f.server.operator_class == f.expected_class,
        evidence="the server plans searches without the vector index over {vectors} vectors",
        command="psql -c 'ANALYZE {table}', then VECTORKEEP_DEBUG=1 vectorkeep search TEXT",
        sql="ANALYZE {table}; SELECT name, setting, source FROM pg_settings WHERE name LIKE 'enable_%' "
        "AND setting = 'off'",
    ),
    Rule(
        name="not-planned-generic",
        verdict="degraded",
        when="only the plan for the search's own values uses the index, the plan for any values does not",
        holds=lambda f: f.planned is True and f.planned_generic is False,
        evidence="a session with generic plans would search {vectors} vectors without the index",
        command="set VECTORKEEP_PREPARE_THRESHOLD=null where a pooler drops the option plan_cache_mode",
        sql="ANALYZE {table}; SET plan_cache_mode = force_custom_plan",
    ),
    Rule(
        name="recall-lost",
        verdict="critical",
        when=f"measured recall is below {RECALL_CRITICAL:g}, its whole interval",
        holds=lambda f: f.valid and f.recall is not None and f.recall.high < RECALL_CRITICAL,
        evidence="measured recall is {recall.recall:.3f} ({recall.low:.3f} to {recall.high:.3f}) with ef_search "
        "{recall.ef_search}, the target is {recall.target:g}",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="recall-below-target",
        verdict="degraded",
        when="measured recall is below `target_recall`, its whole interval",
        holds=lambda f: f.valid and f.recall is not None and RECALL_CRITICAL <= f.recall.high < f.recall.target,
        evidence="measured recall is {recall.recall:.3f} ({recall.low:.3f} to {recall.high:.3f}) with ef_search "
        "{recall.ef_search}, the target is {recall.target:g}",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="many-unreachable",
        verdict="critical",
        when=f"more than {UNREACHABLE_CRITICAL:.0%} of the rows that were looked up do not find themselves",
        holds=lambda f: f.valid and _unreachable_share(f) > UNREACHABLE_CRITICAL,
        evidence="{recall.unreachable} of {recall.looked_up} rows do not find themselves through the vector index",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="unreachable",
        verdict="degraded",
        when=f"more than {UNREACHABLE_DEGRADED:.0%} of the rows that were looked up do not find themselves",
        holds=lambda f: f.valid and UNREACHABLE_DEGRADED < _unreachable_share(f) <= UNREACHABLE_CRITICAL,
        evidence="{recall.unreachable} of {recall.looked_up} rows do not find themselves through the vector index",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="zero-vectors",
        verdict="degraded",
        when="some sampled rows have a zero vector, which has no direction",
        holds=lambda f: f.recall is not None and f.recall.zero_vectors > 0,
        evidence="{recall.zero_vectors} sampled rows have zero vectors, which no search finds, whatever the index",
        command="vectorkeep ingest PATH, once more for those documents",
        sql="SELECT id FROM {table} WHERE vector_norm(embedding) = 0",
    ),
    Rule(
        name="stale",
        verdict="degraded",
        when=f"more than {STALE_DEGRADED:.0%} of what the index holds is dead, more than {SMALL_TABLE_ROWS} rows",
        holds=lambda f: f.stale_share > STALE_DEGRADED and f.server.dead_rows > SMALL_TABLE_ROWS,
        evidence="{stale:.0%} of what the vector index holds is dead",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="dead-rows",
        verdict="degraded",
        when=f"more than {DEAD_ROWS_DEGRADED:.0%} of the table's rows are dead, and more than {SMALL_TABLE_ROWS}",
        holds=lambda f: f.dead_share > DEAD_ROWS_DEGRADED and f.server.dead_rows > SMALL_TABLE_ROWS,
        evidence="{server.dead_rows} dead rows ({dead:.0%}) slow every scan",
        command=_MAINTAIN,
        sql="VACUUM (ANALYZE) {table}",
    ),
    Rule(
        name="bloat",
        verdict="degraded",
        when=f"the index takes {BLOAT_DEGRADED:g} times the bytes a row that it took after its build",
        holds=lambda f: f.vectors > SMALL_TABLE_ROWS and (f.bloat or 0) >= BLOAT_DEGRADED,
        evidence="the vector index takes {bytes_per_row:.0f} bytes a row, {bloat:.1f} times the "
        "{bytes_per_row_built:.0f} after its build",
        command=_MAINTAIN,
        sql=_REINDEX,
    ),
    Rule(
        name="unused",
        verdict="degraded",
        when=f"over more than {SMALL_TABLE_ROWS} vectors, not one scan in the at least 7 days that the counter covers",
        holds=lambda f: f.valid and f.used is False and f.vectors > SMALL_TABLE_ROWS,
        evidence="the vector index was not used once in {server.counted_for}, the time that its counter covers; "
        "searches on a standby are not counted",
        command="VECTORKEEP_DEBUG=1 vectorkeep search TEXT",
        sql="SELECT idx_scan, last_idx_scan FROM pg_stat_user_indexes WHERE indexrelname = '{index}'",
    ),
    Rule(
        name="duplicate-index",
        verdict="degraded",
        when="an index of the table does what another one does",
        holds=lambda f: bool(f.duplicates),
        evidence="needless beside an equal index, and slowing every write: {needless}",
        command="psql -c 'DROP INDEX CONCURRENTLY {duplicates[0]}'",
        sql="DROP INDEX CONCURRENTLY {duplicates[0]}",
    ),
    Rule(
        name="foreign-key-without-index",
        verdict="degraded",
        when=f"a foreign key of a table of more than {SMALL_TABLE_ROWS} rows has no index of its own",
        holds=lambda f: bool(f.unindexed_keys) and f.vectors + f.without_vector > SMALL_TABLE_ROWS,
        evidence="no index begins with {unindexed_keys[0]}, a foreign key: a deleted document reads the whole table",
        command="psql -c 'CREATE INDEX CONCURRENTLY ON {table} ({unindexed_keys[0]})'",
        sql="CREATE INDEX CONCURRENTLY ON {table} ({unindexed_keys[0]})",
    ),
    Rule(
        name="larger-than-memory",
        verdict="degraded",
        when=f"the index is larger than shared_buffers, and under {HIT_RATE_DEGRADED:.0%} of its pages are found there",
        holds=lambda f: f.shared_buffers_share > 1 and f.hit_rate is not None and f.hit_rate < HIT_RATE_DEGRADED,
        evidence="the vector index takes {server.size_bytes} bytes, {shared_buffers_share:.1f} times shared_buffers, "
        "and {hit_rate:.0%} of the pages asked for were found there",
        command="""psql -c "ALTER SYSTEM SET shared_buffers = '{wanted_mb}MB'", then restart the server""",
        sql="ALTER SYSTEM SET shared_buffers = '{wanted_mb}MB'",
    ),
    Rule(
        name="too-many-dimensions",
        verdict="degraded",
        when=f"over more than {SMALL_TABLE_ROWS} vectors, the model has more than {MAX_INDEXED_DIMENSIONS} dimensions",
        holds=lambda f: not f.model.indexed and f.vectors > SMALL_TABLE_ROWS,
        evidence="{model.dimensions} dimensions cannot be indexed (at most 4000 can), so searches compare all rows",
        command="vectorkeep migrate --model NAME --dimensions 1024, in another database",
        sql="SELECT model_id, dimensions FROM embedding_models WHERE active",
    ),
)


def judge(facts: Facts) -> list[Reason]:
    """A reason for each rule that holds, in the order of the table."""
    return list(_reasons(facts))


def _reasons(facts: Facts) -> Iterator[Reason]:
    for rule in RULES:
        if rule.holds(facts):
            told = _Told(facts)
            evidence = f"{facts.table}: {rule.evidence.format_map(told)}"
            yield Reason(rule.name, rule.verdict, evidence, rule.command.format_map(told), rule.sql.format_map(told))


class _Told(dict[str, Any]):
    """What the templates may name: the facts, and what follows from them."""

    def __init__(self, facts: Facts) -> None:
        building, megabytes = facts.building, facts.server.size_bytes / 1024**2
        super().__init__(
            create=_create_index(facts),
            stale=facts.stale_share,
            dead=facts.dead_share,
            needless=", ".join(facts.duplicates),
            wanted_mb=round(1.5 * megabytes),
            building_told=_shown(building) if building else "",
        )
        self._facts = facts

    def __missing__(self, name: str) -> Any:
        return getattr(self._facts, name)


def _create_index(facts: Facts) -> str:
    if not facts.model.indexed:
        return ""
    index = vector_index(Base.metadata.tables[facts.table], facts.model.dimensions, facts.model.distance)
    return " ".join(str(CreateIndex(index).compile(dialect=postgresql.dialect())).split())  # type: ignore[no-untyped-call]


def _shown(building: BuildProgress) -> str:
    if building.phase == UNSEEN:
        return f"invalid, and process {building.pid} builds an index that this role may not see, perhaps this one"
    percent = "" if building.percent is None else f", {building.percent:g} %"
    eta = "" if building.eta_s is None else f", about {building.eta_s:.0f} s to go"
    return f"being built by process {building.pid}, {building.phase}{percent}{eta}"


def _unreachable_share(facts: Facts) -> float:
    measured = facts.recall
    return measured.unreachable / measured.looked_up if measured and measured.looked_up else 0.0


_EXAMPLES = {
    "{create}": "CREATE INDEX CONCURRENTLY …",
    "{index}": "INDEX",
    "{table}": "TABLE",
    "{model.model_id}": "NAME",
    "{model.dimensions}": "D",
    "{model.distance}": "DISTANCE",
    "{duplicates[0]}": "INDEX",
    "{unindexed_keys[0]}": "COLUMN",
    "{wanted_mb}": "N",
}


def rules_table() -> str:
    """The rules for people, as a table in Markdown."""
    lines = ["| rule | verdict | when | command | SQL |", "|---|---|---|---|---|"]
    for rule in RULES:
        lines.append(f"| `{rule.name}` | {rule.verdict} | {rule.when} | `{rule.command}` | `{rule.sql}` |")
    table = "\n".join(lines)
    for placeholder, example in _EXAMPLES.items():
        table = table.replace(placeholder, example)
    return table
