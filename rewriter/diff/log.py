"""The record of a rewrite's changes, and the check of a comparison against it.

The record is made from the models in memory, pass by pass; a comparison is made from the two models on the disk. For
each change, the record has its author and a hash of the difference. Without the hash, another change in the same
place would pass for the rewrite's work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rewriter.diff.report import Change, Detail
from rewriter.ir import Error

SCHEMA_VERSION = 1
WHOLE, VALUE = "all of it", "value"

LOG, RECORD = "bnqat.json", "bnqat_changes.json"
"""Files in ``assets.extra``: the rewrite's report to its user, and the record."""

Record = Mapping[str, Any]
"""``{"schema_version": 1, "source": hash, "authors": [[pass, ...], ...], "changes": {kind: {graph: {name: [author, hash
or hashes by aspect]}}}}``; author is an index into authors, source a hash of the file with the source's graph."""


def record(source: Path, changes: tuple[Change, ...], author: Callable[[Change], tuple[str, ...]]) -> Record:
    """Return the record of the changes of a model.

    Args:
        source: the file with the source's graph.
        changes: the changes; those of nodes need no details.
        author: returns the passes that made a change; a change without an author is left out.
    """
    authors: dict[tuple[str, ...], int] = {}
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for change in changes:
        by = author(change)
        if by:
            number = authors.setdefault(by, len(authors))
            places = entries.setdefault(change.kind, {}).setdefault(change.graph, {})
            places[change.name] = [number, change.fingerprint or _hashes(change)]
    return {
        "schema_version": SCHEMA_VERSION,
        "source": graph_hash(source),
        "authors": [list(by) for by in authors],
        "changes": entries,
    }


def graph_hash(file: Path) -> str:
    """Return a hash of the file with a model's graph."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def explained(changes: tuple[Change, ...], rewrite_record: Record, source: Path, *, values: bool) -> tuple[Change, ...]:
    """Return the changes with their authors.

    A change that agrees with the record only in part becomes two: one with an author, one without. A recorded change
    that is missing is added, if the model before is the one that was rewritten.

    Args:
        changes: the changes of a comparison.
        rewrite_record: the record.
        source: the file with the graph of the model before.
        values: true if the values of tensors were compared, too.
    """
    entries = _entries(rewrite_record)
    attributed: list[Change] = []
    for change in changes:
        number, recorded = entries.pop((change.kind, change.graph, change.name), (0, {}))
        hashes = _hashes(change)
        agreeing = {aspect for aspect, value in hashes.items() if recorded.get(aspect) == value}
        # Values that were not compared cannot be missing.
        accounted_for = hashes.keys() if values else {*hashes, VALUE}
        missing_details = [Detail(aspect, None, None) for aspect in recorded.keys() - accounted_for]
        by = tuple(rewrite_record["authors"][number]) if recorded else ()
        if agreeing == hashes.keys():
            attributed.append(replace(change, by=by))
        else:
            rest = tuple(d for d in change.details if d.aspect not in agreeing)
            if WHOLE in recorded and WHOLE in hashes:
                rest = (*rest, Detail(WHOLE, f"hash {recorded[WHOLE]}, as the record has it", f"hash {hashes[WHOLE]}"))
            if agreeing:
                attributed.append(
                    replace(change, details=tuple(d for d in change.details if d.aspect in agreeing), by=by)
                )
            attributed.append(replace(change, details=rest))
        if missing_details and WHOLE not in recorded and WHOLE not in hashes:
            attributed.append(replace(change, what="missing", details=tuple(missing_details)))
    if rewrite_record["source"] == graph_hash(source):
        for kind, graph, name in entries:
            attributed.append(Change(kind, "missing", graph, name))
    return tuple(attributed)


def _entries(rewrite_record: Record) -> dict[tuple[str, str, str], tuple[int, Mapping[str, str]]]:
    """Return a record's entries: (kind, graph, name) -> the author's number, and hashes by aspect."""
    return {
        (kind, graph, name): (number, {WHOLE: hashes} if isinstance(hashes, str) else hashes)
        for kind, graphs in rewrite_record["changes"].items()
        for graph, names in graphs.items()
        for name, (number, hashes) in names.items()
    }


def _hashes(change: Change) -> Mapping[str, str]:
    """Return the fingerprint of a node or function that was added or removed; otherwise a hash of each aspect."""
    return {WHOLE: change.fingerprint} if change.fingerprint else {d.aspect: _hash(d) for d in change.details}


def _hash(detail: Detail) -> str:
    return hashlib.blake2b(json.dumps([detail.old, detail.new]).encode(), digest_size=6).hexdigest()


def read_record(file: Path) -> Record | None:
    """Return the record in a file; None if there is no file.

    Raises:
        Error: the file holds no record, or one of a later version.
    """
    try:
        rewrite_record: Record = json.loads(file.read_text(encoding="utf-8"))
        version = rewrite_record["schema_version"]
        authors, entries = rewrite_record["authors"], _entries(rewrite_record)
        sound = isinstance(rewrite_record["source"], str) and all(
            isinstance(by, list) and all(isinstance(name, str) for name in by) for by in authors
        )
        sound = sound and all(
            isinstance(number, int)
            and 0 <= number < len(authors)
            and all(isinstance(text, str) for text in hashes.values())
            for number, hashes in entries.values()
        )
        if not sound:
            raise ValueError("authors or changes of other types")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise Error(f"{file} is no record of a rewrite; delete it to compare without") from e
    if version != SCHEMA_VERSION:
        raise Error(f"{file} was written by a later version of bnqat; delete it to compare without")
    return rewrite_record


class Log(NamedTuple):
    """The part of a log that a comparison uses.

    Attributes:
        skipped: (graph, node) of a site that a rewrite skipped -> the reason.
        baked: name of a layer whose variables hold quantised values, as `finalize` leaves them, and role of these ->
            their widths.
    """

    skipped: Mapping[tuple[str, str], str]
    baked: Mapping[tuple[str, str], set[int]]


def read_log(file: Path) -> Log:
    """Return what the log of a rewrite or of `finalize` says; nothing if there is none, or if it is damaged."""
    try:
        log = json.loads(file.read_text(encoding="utf-8"))
        baked: dict[tuple[str, str], set[int]] = {}
        for row in log.get("baked", ()):
            baked.setdefault((str(row["layer_name"]), str(row["role"])), set()).add(int(row["bits"]))
        return Log({(s["graph"], s["node"]): str(s["reason"]) for s in log.get("skipped", ())}, baked)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Log({}, {})
