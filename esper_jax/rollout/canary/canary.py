"""A canary: a rollout that advances, holds or rolls back a flag by itself.

`Canary` joins what `decisions.decide` says with a flag and a `journal`. It first writes
down what it will do, then turns the flag, then writes down that it did. So whenever it
is stopped, the journal explains the percentage that the flag has: that of the last
entry, or that of the entry before if the flag was not turned yet.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_jax.rollout.canary.decisions import (
    Action,
    State,
    begin,
    decide,
    from_json,
    to_json,
)
from esper_jax.rollout.canary.dial import Dial
from esper_jax.rollout.canary.journal import Journal, read_journal
from esper_jax.rollout.canary.observations import batch_of, end_of, read_from
from esper_jax.rollout.canary.plan import CanaryError, Plan

__all__ = ["BlindError", "Canary", "Report", "report"]

_JOURNAL = "journal.jsonl"


class BlindError(CanaryError):
    """A trigger has nothing to watch; the flag stays where it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Where a canary stands, as its journal says.

    Args:
      where: the flag is that it turns; see `Dial`.
      state: of the rollout.
      percent: that the flag shall have.
      before: percentage that it had before the canary.
      turned: whether the journal says that the flag has it.
      action: the last decision.
      reason: for it.
      observations: file that they are read from.
      offset: bytes of it that were read.
      looks: decisions so far.
    """

    where: Mapping[str, str]
    state: State
    percent: int
    before: int
    turned: bool
    action: str
    reason: str
    observations: Path
    offset: int
    looks: int

    @property
    def flag(self) -> str:
        """Name of the flag."""
        return self.where["flag"]


def report(folder: Path) -> Report:
    """Where the canary of a folder stands; changes nothing.

    Raises:
      CanaryError: if there is none, or its journal is damaged.
    """
    path = folder.expanduser() / _JOURNAL
    if not path.exists():
        raise _none(folder)
    return _report(path, read_journal(path))


def _none(folder: Path) -> CanaryError:
    return CanaryError(
        f"{folder}: holds no canary; begin one with esper-jax canary start, or name "
        "its folder"
    )


def _another(folder: Path) -> CanaryError:
    return CanaryError(
        f"{folder}: holds a canary already; go on with it (step, status, abort), or "
        "name another folder"
    )


def _report(path: Path, entries: list[dict[str, Any]]) -> Report:
    if not entries:
        raise _none(path.parent)
    try:
        first = entries[0]
        plan = Plan(**first["plan"])
        last = next(e for e in reversed(entries) if "state" in e)
        return Report(
            where=first["where"],
            state=from_json(plan, last["state"]),
            percent=last["percent"],
            before=first["before"],
            turned=entries[-1]["kind"] == "turned" or last["action"] == "hold",
            action=last["action"],
            reason=last["reason"],
            observations=Path(first["observations"]),
            offset=last["offset"],
            looks=sum(e["kind"] == "look" for e in entries),
        )
    except (KeyError, TypeError, StopIteration, CanaryError) as error:
        raise CanaryError(
            f"{path}: is no journal of a canary of this version "
            f"({type(error).__name__}: {error})"
        ) from None


class Canary:
    """A canary of a folder, held by one process at a time.

    Opening it finishes what a crash has left half done: the flag is turned to what the
    journal says. Use it as a context manager, or call `close`.

    Args:
      folder: of the canary.
      dial: of its flag.

    Attributes:
      mended: what was finished, in words; empty if nothing was.

    Raises:
      CanaryError: if the folder has no canary, or one of another flag; if another
        process holds it.
    """

    def __init__(self, folder: Path, dial: Dial) -> None:
        path = folder.expanduser().resolve() / _JOURNAL
        if not path.exists():
            raise _none(folder)
        self._dial = dial
        self._journal = Journal(path)
        self.mended = ""
        try:
            found = self.report()
            if dict(found.where) != dict(dial.where):
                raise CanaryError(
                    f"{folder}: is a canary of {dict(found.where)}, not of "
                    f"{dict(dial.where)}"
                )
            if not found.turned:
                self._settled()
                self.mended = f"{found.flag} was turned to {found.percent}%"
        except BaseException:
            self.close()
            raise

    @classmethod
    def start(
        cls,
        folder: Path,
        dial: Dial,
        plan: Plan,
        *,
        observations: Path | None = None,
        now: float | None = None,
    ) -> "Canary":
        """Begins a canary: turns the flag to the first percentage.

        Args:
          folder: for the journal; made if it is not there.
          dial: of the flag.
          plan: of the rollout.
          observations: file that they will come in; what it has already is not looked
            at. By default ``observations.jsonl`` in the folder.
          now: seconds since 1970; by default the system's clock.

        Raises:
          CanaryError: if the folder has a canary, or the flag's percentage is not below
            the first one; nothing is changed then.
        """
        folder = folder.expanduser().resolve()
        path = folder / _JOURNAL
        if path.exists() and read_journal(path):
            raise _another(folder)
        before = dial.percentage()
        if before >= plan.percents[0]:
            raise CanaryError(
                f"{dial.where['flag']} is at {before}%: expected less than the first "
                f"stage, {plan.percents[0]}%; turn it down (esper-jax flags rollout "
                f"{dial.where['flag']} 0), or leave stages out"
            )
        file = (observations or folder / "observations.jsonl").expanduser().resolve()
        state = begin(plan, time.time() if now is None else now)
        offset = end_of(file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CanaryError(
                f"{folder}: cannot be made: {error.strerror}; name another folder"
            ) from None
        journal = Journal(path)
        try:
            if journal.entries:
                raise _another(folder)
            journal.append(
                "start",
                time=state.clock,
                action="start",
                percent=plan.percents[0],
                reason="the first stage begins",
                where=dict(dial.where),
                before=before,
                plan=dataclasses.asdict(plan),
                observations=str(file),
                offset=offset,
                state=to_json(state),
            )
        finally:
            journal.close()
        canary = cls(folder, dial)
        canary.mended = ""
        return canary

    def report(self) -> Report:
        """Where it stands."""
        return _report(self._journal.path, self._journal.entries)

    def step(self, now: float | None = None) -> Action:
        """Looks at what was observed since the last step, decides, and turns the flag.

        Args:
          now: seconds since 1970; by default the system's clock.

        Returns:
          What was decided, and why.

        Raises:
          CanaryError: if the canary is over, the clock ran backwards, somebody else
            turned the flag, or the observations cannot be read: nothing is changed
            then.
          BlindError: if a trigger has seen nothing in a whole stage; that is a hold.
        """
        found = self._settled()
        if found.state.status == "watching":
            self._check(found)
        new, offset = read_from(found.observations, found.offset)
        clock = time.time() if now is None else now
        state, action = decide(found.state, batch_of(new), clock)
        percent = found.before if action.kind == "roll back" else state.percent
        self._note("look", action.kind, percent, action.reason, offset, state)
        if percent != found.percent:
            self._settled()
        elif action.kind != "hold":
            self._journal.append("turned", time=clock, percent=percent)
        if action.blind:
            raise BlindError(f"{found.flag} stays at {percent}%: {action.reason}")
        return action

    def resume(self) -> str:
        """Turns the flag to what the journal says, if somebody else turned it.

        What a crash left half done is finished when the canary is opened.

        Returns:
          What was done, in words; empty if nothing was.
        """
        found = self._settled()
        if found.state.status != "watching" or self._dial_says(found.percent):
            return self.mended
        self._turn(found)
        return f"{found.flag} was turned back to {found.percent}%"

    def _dial_says(self, percent: int) -> bool:
        try:
            return self._dial.percentage() == percent
        except CanaryError:  # gone from the file
            return False

    def abort(self, reason: str = "by hand", now: float | None = None) -> None:
        """Ends the rollout, and turns the flag back to what it was before.

        Args:
          reason: for the journal.
          now: seconds since 1970; by default the system's clock.

        Raises:
          CanaryError: if it is over.
        """
        found = self._settled()
        if found.state.status != "watching":
            raise CanaryError(f"this canary is over ({found.state.status}) already")
        clock = max(time.time() if now is None else now, found.state.clock)
        state = dataclasses.replace(found.state, status="aborted", clock=clock)
        self._note("abort", "abort", found.before, reason, found.offset, state)
        self._settled()

    def _note(
        self,
        kind: str,
        action: str,
        percent: int,
        reason: str,
        offset: int,
        state: State,
    ) -> None:
        """Writes a decision down."""
        self._journal.append(
            kind,
            time=state.clock,
            action=action,
            percent=percent,
            reason=reason,
            offset=offset,
            state=to_json(state),
        )

    def _settled(self) -> Report:
        """Where it stands, after turning the flag if that was left undone."""
        found = self.report()
        if found.turned:
            return found
        self._turn(found)
        return self.report()

    def _check(self, found: Report) -> None:
        """Refuses to go on if somebody else turned the flag."""
        now = self._dial.percentage()
        if now != found.percent:
            raise CanaryError(
                f"{found.flag} is at {now}%, but its canary left it at "
                f"{found.percent}%: somebody else turned it. esper-jax canary resume "
                "turns it back, and abort ends the canary"
            )

    def _turn(self, found: Report) -> None:
        """Turns the flag to what the journal says, and writes that down."""
        self._dial.turn(found.percent)
        self._journal.append("turned", time=found.state.clock, percent=found.percent)

    def close(self) -> None:
        """Lets another process go on with it."""
        self._journal.close()

    def __enter__(self) -> "Canary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
