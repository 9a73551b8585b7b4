"""What a remote job is doing, on one line of the terminal.

    ⠹ QUEUED  Position 2 of 3 in the queue.  12 s  job 5f0c  up 61 kB

The line is for people: it goes to stderr, and only to a terminal, unless `verbose` asks for one
line for each status. What the job itself prints on the server (LOG) is always shown: somebody wrote
a `print` to see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.status import Status as Spinner
from rich.text import Text


@dataclass(frozen=True)
class Update:
    """One step of a remote run.

    Attributes:
        job: its id, "" before there is one.
        status: as the server words it (QUEUED, RUNNING, ...), or what the client does meanwhile
            (SENDING, RECONNECTING, DOWNLOADING).
        description: the server's words, such as the position in the queue, or the trouble.
        seconds: since the run began.
        up, down: bytes of bodies so far.
    """

    job: str
    status: str
    description: str
    seconds: float
    up: int
    down: int

    def __str__(self) -> str:
        parts = [self.status]
        if self.description:
            parts.append(" ".join(self.description.split())[:120])
        parts.append(f"{self.seconds:.0f} s")
        if self.job:
            parts.append(f"job {self.job}")
        if self.up:
            parts.append(f"up {size(self.up)}")
        if self.down:
            parts.append(f"down {size(self.down)}")
        return "  ".join(parts)


class StatusLine:
    """Shows updates; give it to `Transport` as `progress`.

    >>> from io import StringIO
    >>> console = Console(file=StringIO())   # no terminal: silent
    >>> with StatusLine(console=console) as line:
    ...     line(Update("a1", "RUNNING", "", 2.0, 61_000, 0))
    >>> console.file.getvalue()
    ''
    """

    def __init__(self, *, verbose: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.verbose = verbose
        self._spinner: Spinner | None = None
        self._last = ("", "")

    def __call__(self, update: Update) -> None:
        """Show one update; the line goes away when the job is done."""
        if update.status == "LOG":
            self.console.print(Text(update.description), soft_wrap=True)
            return
        if self.verbose:
            if (update.status, update.description) != self._last:
                self.console.print(Text(str(update)), soft_wrap=True)
            self._last = (update.status, update.description)
        elif self.console.is_terminal:
            if self._spinner is None:
                self._spinner = self.console.status(Text(str(update)))
                self._spinner.start()
            else:
                self._spinner.update(Text(str(update)))
            if update.status in ("COMPLETED", "ERROR"):
                self.close()

    def close(self) -> None:
        """Take the line away; safe to call twice."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def size(n_bytes: int) -> str:
    """Bytes in words: decimal units, as file managers count.

    >>> [size(n) for n in (950, 61_400, 8_000_000_000)]
    ['950 bytes', '61.4 kB', '8 GB']
    """
    if n_bytes < 1000:
        return f"{n_bytes} bytes"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.3g} {unit}"
