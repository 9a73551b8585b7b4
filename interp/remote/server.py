"""What a server says about itself, as data and as a table: models, versions, key, problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from interp.remote.versions import Problem, Versions

VISION = "image-text-to-text"
"""The task under which a server hosts a model with its vision tower."""

LEVELS = ("HOT", "WARM", "COLD")
STATES = ("RUNNING", "DEPLOYING", "NOT_STARTED", "UNHEALTHY")


@dataclass(frozen=True)
class HostedModel:
    """A model that a server has.

    Attributes:
        repo_id: its name on the hub, or the name it was given.
        task: what it is loaded for; "image-text-to-text" has a vision tower.
        revision: of its weights.
        state: RUNNING, DEPLOYING, NOT_STARTED or UNHEALTHY.
        level: HOT (in memory), WARM, or COLD (on disk, not up).
        model_key: what requests name it by.
    """

    repo_id: str
    task: str
    revision: str
    state: str
    level: str
    model_key: str

    @property
    def vision(self) -> bool:
        """It has a vision tower."""
        return self.task == VISION

    @property
    def up(self) -> bool:
        """It answers now."""
        return self.state == "RUNNING" and self.level != "COLD"


@dataclass(frozen=True)
class ServerStatus:
    """What a server says about itself, and what is in the way. Print it for a table.

    Attributes:
        url: of the server.
        reachable: it answered, and as such a server does.
        models: what it has, those with a vision tower first.
        here, there: versions; "" where the server does not tell.
        key: a key was found.
        accepted: the server knows the key; None if it does not say.
        problems: what does not fit, the blocking ones first, each with what would do.
    """

    url: str
    reachable: bool
    models: tuple[HostedModel, ...]
    here: Versions
    there: Versions
    key: bool
    accepted: bool | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing blocks a request for a model that is up."""
        return self.reachable and not any(problem.blocks for problem in self.problems)

    def model(self, repo_id: str) -> HostedModel | None:
        """The model of that name, if the server has it."""
        found = [m for m in self.models if m.repo_id.casefold() == repo_id.casefold()]
        return found[0] if found else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._text()

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _text(self) -> Iterator[Text | Table]:
        state = "answers" if self.reachable else "does not answer"
        yield Text.assemble((self.url, "bold"), f" {state}")
        if self.reachable:
            table = Table(box=None, pad_edge=False)
            for title in ("model", "task", "revision", "state", "level"):
                table.add_column(title, overflow="fold")
            for m in self.models:
                mark = "* " if m.vision else "  "
                table.add_row(mark + m.repo_id, m.task or "?", m.revision, m.state, m.level)
            yield table if self.models else Text("no models")
            if any(m.vision for m in self.models):
                yield Text("* has a vision tower")
            yield Text()
            versions = Table(box=None, pad_edge=False)
            for title in ("", "here", "there"):
                versions.add_column(title)
            for name in ("python", "nnsight", "transformers", "torch"):
                there = getattr(self.there, name) or "unknown"
                versions.add_row(name, getattr(self.here, name), there)
            yield versions
        known = {True: "accepted", False: "not accepted", None: "not checked by the server"}
        yield Text(f"key: {'set, ' + known[self.accepted] if self.key else 'none'}")
        for problem in self.problems:
            yield Text(f"{'!' if problem.blocks else '-'} {problem}")


def hosted(deployments: dict[str, Any]) -> tuple[HostedModel, ...]:
    """The models in a /status answer: replicas folded into the healthiest, vision models first."""
    found: dict[str, HostedModel] = {}
    for name, entry in deployments.items():
        if not isinstance(entry, dict):
            continue
        key = str(entry.get("model_key") or name)
        model = HostedModel(
            repo_id=str(entry.get("repo_id") or name),
            task=str(entry.get("task") or ""),
            revision=str(entry.get("revision") or "main"),
            state=str(entry.get("application_state") or "UNHEALTHY"),
            level=str(entry.get("deployment_level") or "COLD"),
            model_key=key,
        )
        if key not in found or _health(model) < _health(found[key]):
            found[key] = model
    order = sorted(found.values(), key=lambda m: (not m.vision, _health(m), m.repo_id))
    return tuple(order)


def _health(model: HostedModel) -> tuple[int, int]:
    """Small is good."""
    level = LEVELS.index(model.level) if model.level in LEVELS else len(LEVELS)
    state = STATES.index(model.state) if model.state in STATES else len(STATES)
    return level, state
