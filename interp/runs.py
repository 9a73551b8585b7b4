"""Run folders: everything a run leaves behind, and the proof of what it was.

A figure is worth as much as one's ability to say, a year later, which model, which data and
which versions it came from. So a run writes one folder, and the folder explains itself:

    manifest.json     what ran: arguments, seed, versions, fingerprints, and a hash of every file
    summary.json      the findings, each with its interval
    tables/*.parquet  the numbers behind every figure, one row a number
    *.safetensors     what was fitted (probes)
    report.html       the page, drawn from the files above and from nothing else

Three rules keep such a folder trustworthy.

1. *No half-written file ever carries its final name.* A file is written beside its place under a
   temporary name and then renamed, which a file system does in one step. A run that dies leaves
   whole files, or none.
2. *Nothing of yours is lost.* A folder that holds anything is refused, unless it holds the same
   run (same kind and arguments); then the files that run wrote, and only those, are replaced,
   each at the moment when its successor is complete.
3. *The manifest is written last*, so a folder with a manifest is a finished run. Until then
   `manifest.partial.json` names the files written so far: this is how an interrupted run is
   recognised as one's own when it is started again.

The manifest holds no path of the machine, no host name and nothing from the environment.

>>> import pandas as pd, tempfile
>>> place = tempfile.mkdtemp()
>>> folder = RunFolder.create(f"{place}/study", arguments={"model": "tiny", "data": "scenes"})
>>> _ = folder.write_table("stages", pd.DataFrame({"stage": ["adapter.hook_out"], "low": [0.6]}))
>>> _ = folder.write_json("summary.json", {"n_images": 300})
>>> _ = folder.finish({"seed": 0})
>>> again = RunFolder.open(f"{place}/study")
>>> again.verify()
>>> again.files
['summary.json', 'tables/stages.parquet']
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from interp import __version__
from interp.errors import FolderInUse, RunDamaged, RunNotFound, nearest
from interp.manifest import (
    IDENTITY,
    describe,
    file_fingerprint,
    jsonable,
    read_manifest,
    versions,
    without_paths,
    write_whole,
)

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
_RESERVED = ("kind", "interp", "versions", "arguments", "started", "duration_seconds", "files")


class RunFolder:
    """A run's folder. Make one with `create`, read one with `open`.

    Attributes:
        path: the folder.
        manifest: what is known about the run: kind, arguments, versions, ... While the run goes
            on this is a draft without duration and files; `finish` completes and writes it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._files: dict[str, dict[str, Any]] = dict(manifest.get("files", {}))
        self._finished = "files" in manifest
        self._before: dict[str, Any] = {}  # files of the run that is done again
        self._overwrite = False
        self._clock = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | Path,
        kind: str = "study",
        arguments: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> RunFolder:
        """Make a folder for a new run, or take over the one of the same run.

        Two runs are the same if their kind and all of their arguments are. With
        `overwrite` files of anything else may be replaced as well; even then a file that the new
        run does not write stays, unless another run's manifest vouches for it.

        Raises:
            FolderInUse: the folder holds something that this run did not write.
        """
        path = Path(path)
        manifest = {
            "kind": kind,
            "interp": __version__,
            "versions": versions(),
            "arguments": without_paths(jsonable(dict(arguments or {}), "arguments")),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if path.exists() and not path.is_dir():
            raise FolderInUse(f"{path} is a file; a run writes a folder: give another --out")
        folder = cls(path, manifest)
        folder._overwrite = overwrite
        if path.is_dir() and any(path.iterdir()):
            folder._before = folder._admit()
        path.mkdir(parents=True, exist_ok=True)
        folder._journal()
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a finished run.

        Raises:
            RunNotFound: there is no such folder, or it holds no finished run.
        """
        path = Path(path)
        manifest = read_manifest(path / MANIFEST)
        if manifest is None:
            why = (
                "the run in it was not finished: start it again with the same --out"
                if (path / PARTIAL).exists()
                else f"it has no {MANIFEST}"
                if path.is_dir()
                else "there is no such folder"
            )
            raise RunNotFound(f"{path} is no finished run: {why}")
        return cls(path, manifest)

    @property
    def files(self) -> list[str]:
        """Names of the files this run has written, sorted."""
        return sorted(self._files)

    @property
    def manifest_files(self) -> dict[str, dict[str, Any]]:
        """`{name: {"bytes": ..., "sha256": ...}}` of the files written so far."""
        return dict(sorted(self._files.items()))

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest: `folder.note(seed=0, fingerprints={"model": ...})`."""
        if wrong := sorted(set(facts) & set(_RESERVED)):
            raise ValueError(f"{', '.join(wrong)}: the manifest fills in these keys itself")
        self.manifest |= without_paths(jsonable(facts, MANIFEST))

    # -- writing ---------------------------------------------------------------------------

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path to write `name` to; renamed to `name` when the block ends well.

        `with folder.writing("probes.safetensors") as temporary: bank.save(temporary)`

        If the block raises, the temporary file is removed and an older `name` stays as it was.
        The temporary name keeps the suffix of `name`, for writers that look at it.

        Raises:
            FolderInUse: a file of that name is there and is not the run's own.
        """
        target = self._place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".writing-{target.name}")
        try:
            yield temporary
            if (self.path / PARTIAL).exists():
                # some writers (safetensors) make files for their owner alone
                temporary.chmod((self.path / PARTIAL).stat().st_mode)
            record = file_fingerprint(temporary)
            if name not in self._files:
                # Named before it is there: a file without an owner could never be replaced.
                self._files[name] = record
                self._journal()
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        self._files[name] = record
        if self._finished:
            self._write_manifest()

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file, such as `folder.write_bytes("pictures/test/17.png", png)`."""
        with self.writing(name) as temporary:
            temporary.write_bytes(data)
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file as UTF-8 with `\\n` line ends."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, data: Any) -> Path:
        """Write JSON, keys in the order given. Intervals and NumPy numbers become plain ones.

        Raises:
            ValueError: a number is nan or infinite; the message names its key path.
            TypeError: a value that JSON has no word for.
        """
        return self.write_text(name, json.dumps(jsonable(data, name), indent=2) + "\n")

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table to `tables/<name>.parquet`. `ValueError` if its index holds data."""
        if not isinstance(table.index, pd.RangeIndex) and len(table):
            raise ValueError(
                f"table {name}: its index {list(table.index.names)} would be lost; use columns "
                "for everything: table.reset_index()"
            )
        buffer = BytesIO()
        table.to_parquet(buffer, index=False)
        return self.write_bytes(f"tables/{name}.parquet", buffer.getvalue())

    def finish(self, extra: Mapping[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
        """Write the manifest: the run is done. Returns it.

        `extra` and `facts` are noted first, as by `note`: the seed, the fingerprints. (Facts that
        the report is to show must be noted before it is written.) Files of an earlier run of the
        same folder that this run did not write again are removed, now that the new manifest
        stands, if they are still byte for byte what that run wrote.
        """
        self.note(**(extra or {}), **facts)
        self.manifest["duration_seconds"] = round(time.monotonic() - self._clock, 1)
        self._finished = True
        self._write_manifest()
        for name, record in self._before.items():
            stale = self.path / name
            if name not in self._files and stale.is_file() and file_fingerprint(stale) == record:
                stale.unlink()
        (self.path / PARTIAL).unlink(missing_ok=True)
        return self.manifest

    # -- reading ---------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether this run wrote the file `name`."""
        return name in self._files

    def has_table(self, name: str) -> bool:
        """Whether this run wrote the table `name`."""
        return self.has(f"tables/{name}.parquet")

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a file of this run. `RunNotFound` names the nearest file it does have."""
        if not self.has(name):
            raise RunNotFound(f"the run in {self.path} wrote no {name} {nearest(name, self.files)}")
        return (self.path / name).read_bytes()

    def read_json(self, name: str) -> Any:
        """A JSON file of this run."""
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str) -> pd.DataFrame:
        """The table `tables/<name>.parquet` of this run."""
        return pd.read_parquet(BytesIO(self.read_bytes(f"tables/{name}.parquet")))

    def verify(self) -> None:
        """Check size and SHA-256 of every file against the manifest.

        Raises:
            RunDamaged: files are missing or differ; the message names each.
        """
        wrong = []
        if (self.path / PARTIAL).exists():
            wrong.append("a later run into this folder was not finished")
        for name, record in self._files.items():
            file = self.path / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif file_fingerprint(file) != record:
                wrong.append(f"{name} is not the file that was written")
        if wrong:
            raise RunDamaged(f"{self.path}: {'; '.join(wrong)}")

    def __repr__(self) -> str:
        state = "finished" if self._finished else "open"
        return f"RunFolder({str(self.path)!r}, {self.manifest['kind']}, {state})"

    # -- inside ----------------------------------------------------------------------------

    def _admit(self) -> dict[str, Any]:
        """Files of the run that was here before, if the new one may have the folder."""
        old = read_manifest(self.path / MANIFEST)
        partial = read_manifest(self.path / PARTIAL)
        there = partial or old
        names = sorted(p.name for p in self.path.iterdir())
        if names == [PARTIAL] and partial is not None and not partial.get("files"):
            return {}  # a run that wrote nothing holds no folder
        if not self._overwrite and (there is None or not self._same_run(there)):
            held = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            what = (
                f"no run of interp (it holds {held})"
                if there is None
                else f"a {describe(there)} (it holds {held}), not a {describe(self.manifest)}"
                f"{_differing(there, self.manifest)}"
            )
            raise FolderInUse(
                f"{self.path} holds {what}: give another --out, or --overwrite to replace it"
            )
        return {**(old or {}).get("files", {}), **(partial or {}).get("files", {})}

    def _same_run(self, other: dict[str, Any]) -> bool:
        mine = self.manifest
        return all(other.get(key) == mine[key] for key in ("kind", "arguments"))

    def _place(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or name in (MANIFEST, PARTIAL):
            raise ValueError(
                f"{name!r}: a run writes files inside its folder, and {MANIFEST} by finish()"
            )
        target = self.path.joinpath(*parts)
        own = name in self._files or name in self._before or self._overwrite
        if target.exists() and not own:
            raise FolderInUse(
                f"{target} is there and was not written by this run: move it away, give another "
                "--out, or --overwrite to replace it"
            )
        return target

    def _journal(self) -> None:
        """Note what this run owns; only until `finish`, which writes the real manifest."""
        if not self._finished:
            files = {**self._before, **self._files}
            write_whole(self.path / PARTIAL, {**self.manifest, "files": files})

    def _write_manifest(self) -> None:
        order = ("kind", "interp", "versions", "seed", "arguments", "fingerprints", "started",
                 "duration_seconds")  # fmt: skip
        self.manifest.setdefault("seed", self.manifest["arguments"].get("seed"))
        known = {key: self.manifest[key] for key in order if key in self.manifest}
        rest = {k: v for k, v in self.manifest.items() if k not in known and k != "files"}
        self.manifest = {**known, **rest, "files": self.manifest_files}
        write_whole(self.path / MANIFEST, self.manifest)


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Further arguments in which two runs of one kind differ, for the end of a message."""
    if there.get("kind") != here["kind"]:
        return ""
    old, new = there.get("arguments", {}), here["arguments"]
    keys = [key for key in new if key not in IDENTITY and old.get(key) != new[key]]
    return "".join(f"; {key} was {old.get(key)}, now {new[key]}" for key in keys)
