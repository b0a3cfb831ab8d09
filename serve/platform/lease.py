"""Who works on a run: a file of the team that its holder renews while it is alive."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from requests.exceptions import HTTPError

from florence2.errors import FlorenceError, GenerationCancelledError
from serve.platform.patience import status_of
from serve.platform.team_files import read_text, write_text
from serve.provenance import now
from serve.sdk import sly

BEAT_S: Final = 20.0
LEASE_S: Final = 70.0
"""Who does not renew a lease for so long is gone."""
_SURELY_GONE_S: Final = 3600.0
CONFIRM_S: Final = 0.3
# Somebody else may take so many times as long to write as this process took.
_SLOWER: Final = 5.0
_LOOK_AFTER_S: Final = 2.0

# Of the runs of this process that go on.
_held_here: Final[set[str]] = set()


class RunHeldError(FlorenceError):
    """Somebody works on the run."""

    code = "run_held"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run, as its file says: renewed for the ``beat``-th time ``at`` a time in UTC.

    ``machine`` tells two machines apart, and two containers of one: only there ``pid`` means
    something.
    """

    token: str
    who: str
    machine: str
    pid: int
    beat: int = 0
    at: str = ""
    num_done: int = 0
    is_released: bool = False

    @classmethod
    def here(cls) -> Holder:
        """This process, with a token that no other holder has."""
        pid, host = os.getpid(), socket.gethostname()
        return cls(secrets.token_hex(8), f"{host}, process {pid}", _machine(host), pid)

    @classmethod
    def of_text(cls, text: str | None) -> Holder | None:
        """None for no file, and for one that no version of this app wrote."""
        try:
            stored: Any = json.loads(text or "")
            return cls(**{key: one for key, one in stored.items() if key in cls.__slots__})
        except (ValueError, TypeError, AttributeError):
            return None

    def is_gone(self) -> bool | None:
        """None where that cannot be told from here."""
        if self.is_released:
            return True
        if self.token in _held_here:
            return False
        if self.machine == _machine(socket.gethostname()):
            if self.pid == os.getpid() or not Path(f"/proc/{self.pid}").exists():
                return True
            if self._age_s() < LEASE_S:
                return False
        return True if self._age_s() > _SURELY_GONE_S else None

    def _age_s(self) -> float:
        """By two clocks, which may differ where two machines do."""
        try:
            heard = datetime.fromisoformat(self.at)
        except ValueError:
            return 0.0
        return (datetime.now(UTC) - heard).total_seconds()


def _machine(host: str) -> str:
    """Hosts may share a name, and containers of one host see other processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        # Nothing is known of processes there, so nobody is taken for gone by its number.
        return f"{host} {secrets.token_hex(4)}"
    return f"{host} {boot} {processes}"


class Lease:
    """A run that this process holds; ``what`` names the run in a sentence.

    ``start`` for one that nobody else can have, ``take`` for one that somebody may work on still;
    from then on a thread renews it until ``release``.
    """

    def __init__(
        self,
        api: sly.Api,
        team_id: int,
        path: str,
        what: str,
        num_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self._api = api
        self._team_id = team_id
        self._path = path
        self._what = what
        self._num_done = num_done
        self._holder = Holder.here()
        self._renewed_at = 0.0
        self._lost: RunHeldError | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def who(self) -> str:
        """The holder as people are told of it."""
        return self._holder.who

    def start(self) -> None:
        """Holds a new run from now on; raises what the SDK raises where the platform fails."""
        self._write()
        self._begin()

    def take(self, should_stop: Callable[[], bool]) -> None:
        """Holds a run that is there; waits until it is told whether its holder is alive.

        Raises RunHeldError where it is, GenerationCancelledError where the wait is stopped, and
        what the SDK raises where the platform fails.
        """
        before = self._read()
        if before is not None:
            self._wait_until_gone(before, should_stop)
        began_s = time.monotonic()
        self._write()
        # Somebody else may have seen that it is free, too.
        time.sleep(max(CONFIRM_S, _SLOWER * (time.monotonic() - began_s)))
        self._check_is_ours()
        self._begin()

    def check(self, *, is_fresh: bool = False) -> None:
        """RunHeldError where another process has taken the run over: this one was thought gone.

        ``is_fresh``: as it is now, and not as it was half a minute ago.
        """
        is_old = time.time() - self._renewed_at > LEASE_S / 2
        if self._lost is None and (is_fresh or is_old):
            self._renew()
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Nobody has to wait for the next one to hold it; a platform that fails is logged."""
        self._ended.set()
        _held_here.discard(self._holder.token)
        if self._lost is not None:
            return
        with self._lock:
            self._holder = replace(self._holder, is_released=True)
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - the SDK and its transport raise what they like
            sly.logger.warning(f"{self._what} is over and {self._path} does not say so: {error!r}")

    def _begin(self) -> None:
        _held_here.add(self._holder.token)
        threading.Thread(target=self._beat_on, name="lease", daemon=True).start()

    def _wait_until_gone(self, seen: Holder, should_stop: Callable[[], bool]) -> None:
        is_gone = seen.is_gone()
        if is_gone is False:
            raise self._held_by(seen)
        if is_gone:
            return
        # Who watches a terminal would see nothing happen for so long.
        sly.logger.warning(
            f"{self._what} was worked on by {seen.who}, heard of at {seen.at}; waiting up to "
            f"{LEASE_S:.0f} s for a sign that it still is."
        )
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            if should_stop():
                raise GenerationCancelledError("The run was stopped.")
            time.sleep(min(_LOOK_AFTER_S, LEASE_S / 4))
            latest = self._read()
            if latest is None or latest.is_released:
                return
            if (latest.token, latest.beat) != (seen.token, seen.beat):
                raise self._held_by(latest)

    def _held_by(self, holder: Holder) -> RunHeldError:
        return RunHeldError(
            f"{self._what} is worked on by {holder.who}, which was heard of at {holder.at} "
            f"({holder.num_done} images done); wait until it ends or stop it, or begin another "
            "run."
        )

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._renew()
            if self._lost is not None:
                return

    def _renew(self) -> None:
        """A platform that is away lets nobody else in either: what fails is logged."""
        try:
            self._check_is_ours()
            if not self._ended.is_set():
                self._write()
        except RunHeldError as error:
            self._lost = error
        except Exception as error:  # noqa: BLE001 - the SDK and its transport raise what they like
            sly.logger.warning(f"{self._path} is not renewed: {error!r}")

    def _check_is_ours(self) -> None:
        found = self._read()
        if found is not None and found.token != self._holder.token:
            raise self._held_by(found)

    def _read(self) -> Holder | None:
        return Holder.of_text(read_text(self._api, self._team_id, self._path))

    def _write(self) -> None:
        with self._lock:
            beat, num_done = self._holder.beat + 1, self._num_done()
            self._holder = replace(self._holder, beat=beat, at=now(), num_done=num_done)
            text = json.dumps(asdict(self._holder))
            write_text(self._api, self._team_id, self._path, text)
            self._renewed_at = time.time()


def taken(lease: Lease, should_stop: Callable[[], bool]) -> Lease | None:
    """The lease, as by its ``take``; None for who may not use the files of the team, which is
    logged: nobody else can see that this process works on it."""
    try:
        lease.take(should_stop)
    except HTTPError as error:
        if status_of(error) not in (401, 403):
            raise
        sly.logger.warning(f"Nobody else can see who works on it: {error!r}")
        return None
    return lease
