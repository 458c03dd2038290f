"""Bringing one source to exactly what an iterable holds: what is no longer in it is deleted, at the very end."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from psycopg import Connection, Cursor

from . import faults
from .deletion import delete_ids
from .documents import check_key
from .embedding import TextEmbedder
from .errors import ValidationError, of_caller
from .ingestion import Ingestion
from .locks import sync_lock
from .staging import copy_ids
from .tally import Tally
from .transactions import WriteTransaction, run_write
from .types import Item

_FLUSH_IDS = 10_000
_DELETE_AT_ONCE = 10_000

_CREATE_SEEN = "CREATE TEMP TABLE vectorkeep_seen (id text)"
_INDEX_SEEN = "CREATE INDEX ON vectorkeep_seen (id); ANALYZE vectorkeep_seen"
_DROP_SEEN = "DROP TABLE IF EXISTS vectorkeep_seen"
_UNSEEN = """
    SELECT id FROM embeddings
    WHERE source_id = %s AND NOT EXISTS (SELECT FROM vectorkeep_seen AS seen WHERE seen.id = embeddings.id)
      AND id > %s
    ORDER BY id LIMIT %s
"""
# Locked, in order of id: one that another writer is moving right now is waited for and read again.
_STILL_THERE = 'SELECT id FROM embeddings WHERE id = ANY(%s) AND source_id = %s ORDER BY id COLLATE "C" FOR UPDATE'


class SourceSync:
    """One sync. The ids seen are kept in a temporary table: any number of items, bounded memory."""

    def __init__(self, ingestion: Ingestion, source_id: str, tally: Tally) -> None:
        self._ingestion = ingestion
        self._source_id = source_id
        self._tally = tally
        self._buffer: list[str] = []
        self._seen_any = False
        self._nameless = 0
        self._why_nameless = ""

    def run(
        self,
        items: Iterable[Item | Mapping[str, Any]],
        embedder: TextEmbedder,
        *,
        batch_size: int,
        allow_empty: bool,
        dry_run: bool,
        keep: Callable[[str], bool],
        wait_s: float,
        bulk: AbstractContextManager[None],
    ) -> int:
        """Embed and store what changed, then delete what `items` did not hold. Returns how many were deleted.

        Where the iteration raises, nothing is deleted. Of what `items` did not hold, `keep(id)` spares a document.
        `bulk` is entered when no other sync of the source can run: one that has to give way drops no index.

        Raises BusyError where another sync of the source runs; ValidationError where there are no items, or some that
        do not say which document they are. Those that do are stored all the same.
        """
        database = self._ingestion.database
        with database.maintenance() as connection, sync_lock(connection, self._source_id, wait_s=wait_s), bulk:
            connection.execute(_CREATE_SEEN)
            watched = self._watched(items, connection)
            if dry_run:
                self._ingestion.compare(watched, embedder.model_id, batch_size, self._tally)
            else:
                self._ingestion.embed(watched, embedder, batch_size, self._tally)
            self._flush(connection)
            if not self._seen_any and not allow_empty:
                raise ValidationError(
                    f"no items for source {self._source_id!r}; give allow_empty=True to delete all of it"
                )
            if self._nameless:
                raise ValidationError(
                    f"{self._nameless} items of source {self._source_id!r} have no id that can be used "
                    f"({self._why_nameless}): nothing was deleted, for nobody knows which documents they are"
                )
            faults.point("sync.stored")
            connection.execute(_INDEX_SEEN, prepare=False)
            deleted = 0
            for ids in self._unseen(connection):
                with of_caller():
                    gone = [id_ for id_ in ids if not keep(id_)]
                deleted += len(gone) if dry_run else self._delete(gone)
            faults.point("sync.deleted")
            connection.execute(_DROP_SEEN)
        return deleted

    def _watched(
        self, items: Iterable[Item | Mapping[str, Any]], connection: Connection[Any]
    ) -> Iterator[Item | Mapping[str, Any]]:
        """`items` as of this source, their ids noted: an item that is not valid keeps what is stored of it."""
        for given in items:
            self._seen_any = True
            id_ = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
            try:
                self._buffer.append(check_key("id", id_))
            except ValidationError as exc:
                self._nameless += 1
                self._why_nameless = self._why_nameless or str(exc)
            if len(self._buffer) >= _FLUSH_IDS:
                self._flush(connection)
            if isinstance(given, Item):
                yield replace(given, source_id=self._source_id)
            elif isinstance(given, Mapping):
                yield {**given, "source_id": self._source_id}
            else:
                yield given

    def _flush(self, connection: Connection[Any]) -> None:
        with connection.cursor() as cursor:
            copy_ids(cursor, "vectorkeep_seen", self._buffer)
        self._buffer.clear()

    def _unseen(self, connection: Connection[Any]) -> Iterator[list[str]]:
        """The ids of the source that were not among the items. Each is given once, deleted or not."""
        last = ""
        while ids := [row[0] for row in connection.execute(_UNSEEN, (self._source_id, last, _DELETE_AT_ONCE))]:
            yield ids
            last = ids[-1]

    def _delete(self, ids: list[str]) -> int:
        def delete(transaction: WriteTransaction) -> int:
            return delete_ids(transaction, self._still_there(transaction.cursor, ids)).deleted

        if not ids:
            return 0
        return run_write(self._ingestion.database, delete, after_commit=self._ingestion.after_commit, unlimited=True)

    def _still_there(self, cursor: Cursor[Any], ids: list[str]) -> list[str]:
        """Those of `ids` that did not move to another source meanwhile."""
        return [row[0] for row in cursor.execute(_STILL_THERE, (ids, self._source_id))]
