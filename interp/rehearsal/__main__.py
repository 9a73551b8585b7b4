"""Starting the rehearsal server, or its worker, in a process that does not have `interp`.

On NDIF the package `interp` is not installed, so a job that needs it there fails. To fail in the
same way here, this file does three things before anything else:

* it puts a finder in front of all others that answers every import of `interp` with
  ModuleNotFoundError, whether or not the package is installed or on the path;
* it takes its own folder, which Python put there, off the path;
* it registers that folder as a package named `rehearsal`, so that the files beside it import each
  other relatively, under this name when they run and under `interp.rehearsal` when they are read.

    python interp/rehearsal/__main__.py MODEL [options]
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class NoInterp(MetaPathFinder):
    """Answers imports of `interp` as a machine would on which it is not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Refuse `interp` and all in it; leave every other name to the next finder."""
        if fullname.partition(".")[0] == "interp":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main() -> int:
    """Run the worker if the arguments say so, else the server; the exit status."""
    if "interp" in sys.modules:
        sys.exit(f"the rehearsal server must not have `interp`: start it as python {__file__}")
    sys.meta_path.insert(0, NoInterp())
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    spec = importlib.util.spec_from_file_location(
        "rehearsal", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["rehearsal"] = package
    spec.loader.exec_module(package)
    if sys.argv[1:2] == ["--worker"]:
        worker = importlib.import_module("rehearsal.worker")
        return int(worker.main(int(sys.argv[2])))
    command = importlib.import_module("rehearsal.command")
    return int(command.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
