"""Whether what was read and what is stored can be explained by what was acknowledged.

A document has one writer, whose versions grow by one. At any moment the possible versions are the last one
that is known to be committed and whatever was intended after it. Known are acknowledged versions from their
acknowledgement on, and seen ones from the end of the first strict read that saw them.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field

from . import content

FOREVER = 1 << 62


@dataclass(slots=True)
class Version:
    """What a writer intended: `source` is None for a deletion."""

    number: int
    source: str | None
    intended: int = 0
    known: int | None = None

    @property
    def workspace(self):
        return content.workspace_of(self.number)


ABSENT = Version(0, None, 0, 0)
_KEPT = 50  # more than one document gets within the bound on the age of an answer


class History:
    """The versions of one document in their order."""

    def __init__(self, baseline=ABSENT, earlier=()):
        """earlier: versions of the round before, which a cached answer may show for a while."""
        self.versions = [*earlier, baseline]
        self.of_before = len(self.versions)
        self._times, self._floors = [], []

    def continued(self, stored, at):
        """The history of the next round, which begins with the version that was found stored then."""
        known = next((v.known for v in self.versions if (v.number, v.source) == (stored.number, stored.source)), None)
        earlier = [version for version in self.versions if version.number < stored.number][-_KEPT:]
        return History(Version(stored.number, stored.source, at if known is None else known, known or at), earlier)

    def add(self, version):
        self.versions.append(version)

    def version(self, number):
        index = bisect_left(self.versions, number, key=lambda version: version.number)
        found = self.versions[index : index + 1]
        return found[0] if found and found[0].number == number else None

    def seal(self):
        """Ready for questions: from when on which version is the oldest possible one."""
        known = sorted((version.known, version.number) for version in self.versions if version.known is not None)
        self._times = [time for time, _ in known]
        self._floors, highest = [], 0
        for _, number in known:
            highest = max(highest, number)
            self._floors.append(highest)

    def possible(self, start, end):
        """The versions that a read from `start` to `end` may find."""
        index = bisect_left(self._times, start)  # known strictly before
        floor = self._floors[index - 1] if index else 0
        first = bisect_left(self.versions, floor, key=lambda version: version.number)
        last = bisect_right(self.versions, end, key=lambda version: version.intended)
        return self.versions[first:last]

    def ages(self, start):
        """How far back a read that began at `start` may have looked, in steps that matter."""
        return [0, *sorted({start - time + 1 for time in self._times if 0 < time < start})]


@dataclass
class Findings:
    """What cannot be explained, each with one sentence; and how much was looked at."""

    lost: list = field(default_factory=list)
    stale: list = field(default_factory=list)
    half: list = field(default_factory=list)
    twice: list = field(default_factory=list)
    other: list = field(default_factory=list)
    reads: Counter = field(default_factory=Counter)  # by mode, and "cached" or "incomplete"
    bounded_staleness_ms: float = 0.0
    acknowledged: int = 0
    unacknowledged: int = 0
    unacknowledged_present: int = 0

    @property
    def clean(self):
        return not (self.lost or self.stale or self.half or self.twice or self.other)


def histories_of(operations, reads, baseline):
    """The history of every document: intents and acknowledgements, and what strict reads have seen."""
    histories = dict(baseline)  # as `continued` made them
    for operation in sorted(operations, key=lambda operation: operation["at"]):
        for id_, (number, source) in operation["documents"].items():
            acked = None if id_ in operation["failed"] else operation["acked"]
            history = histories.setdefault(id_, History())
            history.add(Version(number, source, operation["at"], acked))
    for read in reads:
        for id_, number in read["seen"].items() if read["mode"] == "strict" else ():
            version = histories[id_].version(number) if id_ in histories else None
            if version is not None and (version.known is None or version.known > read["end"]):
                version.known = read["end"]
    for history in histories.values():
        history.seal()
    return histories


def check_reads(reads, histories, findings, bounded_ttl_s):
    for read in reads:
        findings.reads[read["mode"]] += 1
        findings.reads[f"{read['mode']} cached"] += bool(read["cached"])
        findings.reads[f"{read['mode']} incomplete"] += not read["complete"]
        findings.half += [f"a read: {problem}" for problem in read["half"]]
        findings.twice += [f"a read: {problem}" for problem in read["twice"]]
        for id_ in read["seen"].keys() - histories.keys():
            findings.other.append(f"a read found {id_}, which nobody wrote")
        for id_, history in histories.items():
            if read["ids"] is None or id_ in read["ids"]:
                _check_document(read, id_, history, findings, bounded_ttl_s)


def _check_document(read, id_, history, findings, bounded_ttl_s):
    seen = read["seen"].get(id_)
    if _explained(read, history, seen, 0):
        return
    as_of = ""
    if read["mode"] == "bounded":
        for age in history.ages(read["start"]):
            if _explained(read, history, seen, age):
                findings.bounded_staleness_ms = max(findings.bounded_staleness_ms, age / 1e6)
                if age <= bounded_ttl_s * 1e9:
                    return
                as_of = f", as it was {age / 1e6:.3f} ms before"
                break
    possible = [(v.number, v.source) for v in history.possible(read["start"], read["end"])]
    findings.stale.append(
        f"{read['mode']} read {read['filter']} ({'cached' if read['cached'] else 'computed'}) at {read['start']} "
        f"found version {seen} of {id_}; possible were {possible[:4]}{as_of}"
    )


def _explained(read, history, seen, age):
    possible = history.possible(read["start"] - age, read["end"])
    if seen is not None:
        return any(v.number == seen and _matches(read["filter"], v) for v in possible)
    # One that was cancelled says itself that something is missing.
    return not read["complete"] or any(not _matches(read["filter"], v) for v in possible)


def _matches(wanted, version):
    """Whether this version passes the filter of a read: {} or source or workspace."""
    if version.source is None:
        return False
    return wanted.get("source_id", version.source) == version.source and (
        wanted.get("workspace", version.workspace) == version.workspace
    )


def check_stored(documents, chunks, histories, findings):
    """Compare the rows with the histories; returns the state of each document, the next round's baseline.

    documents: (id, source, version, text). chunks: (document id or None, origin id, index, text), in order of index.
    """
    stored = {}
    for id_, source, number, text in documents:
        if id_ in stored:
            findings.twice.append(f"{id_} is stored twice")
        stored[id_] = (number, source, text)
    texts = _chunks_by_document(chunks, stored, findings)
    for id_ in stored.keys() - histories.keys():
        findings.other.append(f"{id_} is stored, and nobody wrote it")
    return {id_: _check_row(id_, history, stored, texts, findings) for id_, history in histories.items()}


def _chunks_by_document(chunks, stored, findings):
    texts, indexes = {}, set()
    for document_id, _origin, index, text in chunks:
        if document_id is None:
            continue  # detached, for cleanup to remove
        if document_id not in stored:
            findings.half.append(f"a chunk of {document_id} is stored, the document is not")
        if (document_id, index) in indexes:
            findings.twice.append(f"chunk {index} of {document_id} is stored twice")
        indexes.add((document_id, index))
        texts.setdefault(document_id, []).append(text)
    return texts


def _check_row(id_, history, stored, texts, findings):
    possible = history.possible(FOREVER, FOREVER)
    for version in history.versions[history.of_before :]:
        findings.acknowledged += version.known is not None
        findings.unacknowledged += version.known is None
    if id_ not in stored:
        gone = [version for version in possible if version.source is None]
        if not gone:
            findings.lost.append(f"{id_} is not stored; possible were {[v.number for v in possible]}")
        return gone[-1] if gone else Version(possible[-1].number, None)
    number, source, text = stored[id_]
    found = [version for version in possible if version.number == number and version.source == source]
    if not found:
        expected = [(version.number, version.source) for version in possible]
        findings.lost.append(f"{id_} is stored in version {number} of {source}; possible were {expected}")
    elif found[0].known is None:
        findings.unacknowledged_present += 1
    if problem := content.torn(id_, number, text, texts.get(id_, ())):
        findings.half.append(f"stored: {problem}")
    return Version(number, source)
