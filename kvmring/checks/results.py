"""Results of a run as a document: made, written to a directory, read again, and compared.

results.json is what `kvmring check --json` prints; results.ktap the same as KTAP; host.json the
host's facts alone. Two documents are compared rule by rule.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvmring.checks.run import Outcome
from kvmring.errors import KvmringError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmring.checks.run import Options, Result
    from kvmring.facts import JsonValue

    Document = dict[str, JsonValue]

__all__ = ["Difference", "Folder", "as_document", "compare", "read", "totals"]

SCHEMA = 1
FAILURES = (Outcome.FAIL.value, Outcome.XFAIL.value)
KIND = "kvmring check"


class WriteError(KvmringError):
    """The results could not be written."""


def totals(results: Sequence[Result]) -> dict[str, int]:
    """Count results by outcome; every outcome has its place."""
    counted = Counter(result.outcome for result in results)
    return {outcome.value: counted[outcome] for outcome in Outcome}


def as_document(
    results: Sequence[Result], facts: Mapping[str, JsonValue], options: Options, *, planned: int
) -> Document:
    """Put a run into a document of JSON values, in plan order."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "host": dict(facts),
        "seed": options.seed,
        "planned": planned,
        "totals": dict(totals(results)),
        "results": [_entry(result) for result in results],
    }


def _entry(result: Result) -> Document:
    return {
        "id": result.rule.id,
        "outcome": result.outcome.value,
        "cause": result.cause.value,
        "reason": result.reason,
        "rule": result.rule.text,
        "source": result.rule.source,
        "meaning": result.rule.meaning,
        "evidence": [
            {"what": one.what, "expected": one.expected, "got": one.got, "holds": one.holds}
            for one in result.evidence
        ],
        "notes": dict(result.notes),
        "seconds": round(result.seconds, 6),
    }


# Files


class Folder:
    """A directory for the results: three files, and nothing of anybody else's is written over.

    Args:
        path: Made where it does not exist.

    Raises:
        ValueError: It cannot be used, and why. Before any check has run.
    """

    KTAP, JSON, HOST = "results.ktap", "results.json", "host.json"

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (self.KTAP, self.JSON, self.HOST):
                self._require_ours(self.path / name)
        except OSError as error:
            raise ValueError(f"--output {path}: {error.strerror}") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ValueError(f"--output {path}: no permission to write there")

    def _require_ours(self, path: Path) -> None:
        if not path.exists() and not path.is_symlink():
            return
        if path.is_symlink() or not path.is_file() or KIND not in path.read_text(errors="replace"):
            raise ValueError(
                f"--output: {path} is there and is none of {KIND}'s files; name another directory"
            )

    def write(self, ktap: str, document: Document) -> None:
        """Write the files, each at once or not at all.

        Raises:
            WriteError: The file system refused.
        """
        host = document["host"]
        facts: Document = {"schema": SCHEMA, "kind": KIND}
        if isinstance(host, dict):
            facts |= host
        try:
            self._put(self.KTAP, ktap)
            self._put(self.JSON, json.dumps(document, indent=2) + "\n")
            self._put(self.HOST, json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise WriteError(f"the results are not in {self.path}: {error.strerror}") from None

    def _put(self, name: str, text: str) -> None:
        draft = self.path / f".{name}.{os.getpid()}"
        draft.write_text(text)
        draft.replace(self.path / name)


def read(path: str) -> Document:
    """Read a document again.

    Raises:
        ValueError: It cannot be read, or is not one of as_document()'s.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is not a document of `kvmring check --json`")
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {found.get('schema')}; this version reads {SCHEMA}")
    return found


# Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that two runs do not have in common.

    Attributes:
        id: The check's.
        what: "outcome", or the note's name.
        a, b: What each run has; None where it has nothing.
        figure: It is a number, or what a failure noted: that varies from run to run, and decides
            nothing.
    """

    id: str
    what: str
    a: JsonValue
    b: JsonValue
    figure: bool = False


def _by_id(document: Document) -> dict[str, Document]:
    entries = document.get("results")
    found: dict[str, Document] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            found[str(entry.get("id"))] = entry
    return found


def _notes(entry: Document) -> Document:
    notes = entry.get("notes")
    return notes if isinstance(notes, dict) else {}


def _is_figure(*values: JsonValue) -> bool:
    """Tell whether these are numbers, or nothing at all."""
    return all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values
    )


def compare(a: Document, b: Document) -> list[Difference]:
    """List what differs, in A's order: outcomes, reasons of skips, and what was noted."""
    left, right = _by_id(a), _by_id(b)
    found: list[Difference] = []
    for id in left | right:
        one, other = left.get(id), right.get(id)
        if one is None or other is None:
            mine = None if one is None else one["outcome"]
            theirs = None if other is None else other["outcome"]
            found.append(Difference(id=id, what="outcome", a=mine, b=theirs))
            continue
        if one["outcome"] != other["outcome"]:
            found.append(Difference(id=id, what="outcome", a=one["outcome"], b=other["outcome"]))
        elif one["outcome"] == Outcome.SKIP.value and one["reason"] != other["reason"]:
            found.append(Difference(id=id, what="reason", a=one["reason"], b=other["reason"]))
        mine_noted, theirs_noted = _notes(one), _notes(other)
        for name in mine_noted | theirs_noted:
            x, y = mine_noted.get(name), theirs_noted.get(name)
            if x != y:
                # what a failure noted is its own story, and as good as a figure
                figure = (
                    _is_figure(x, y) or one["outcome"] in FAILURES or other["outcome"] in FAILURES
                )
                found.append(Difference(id=id, what=name, a=x, b=y, figure=figure))
    return found
