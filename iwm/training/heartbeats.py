"""Heartbeats of all processes of a run, in the process group's store.

Every process posts once a second what it is doing. Only a process that makes no progress itself reads what the others
posted, so the cost for training is two messages per second and process, from a thread.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from iwm.training.rank_progress import Phase, RankProgress

INTERVAL = 1.0
"""Time between two heartbeats (seconds)."""

_NOTICE = "notice"
_ORDER = tuple(Phase)


@dataclass
class Peer:
    """Newest heartbeat of a process, as seen from here. Clocks of different machines are never compared."""

    rank: int
    host: str
    phase: Phase
    step: int | None
    beat: int
    changed: float
    """Local time at which this heartbeat was first seen."""

    @property
    def position(self) -> tuple[int, int]:
        """Steps and phase, in the order in which a run passes through them."""
        return self.step or 0, _ORDER.index(self.phase)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on host {self.host}"

    @property
    def place(self) -> str:
        """Step and phase in words."""
        return self.phase if self.step is None else f"{self.phase}, after step {self.step:,}"


class Heartbeats:
    """This process's heartbeat and those of the others. All its messages come from one thread of its own.

    A host that vanishes leaves that thread waiting for an answer, and nothing else.
    """

    def __init__(self, store: Store, rank: int, size: int, progress: RankProgress) -> None:
        """Start the thread. store: the process group's; a connection of its own is opened to it."""
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self.peers: dict[int, Peer] = {}
        """Processes seen since `reading` was set, this one included."""
        self.reading = False
        """Read the others' heartbeats too. Clearing it forgets them."""
        self.notice: str | None = None
        """Why the run ends, as the first process that knew announced it."""
        self.answered = time.monotonic()
        """Local time of the store's last answer."""
        self.failed = False
        """True where the store's process is gone."""
        self._progress, self._beats = progress, 0
        self._store = PrefixStore("heartbeats", store.clone())
        self._store.set_timeout(timedelta(seconds=5))
        self._own_notice: str | None = None
        self._wake, self._announced, self._closed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def silent(self, seconds: float) -> list[Peer]:
        """Return the other processes without a new heartbeat for that long, except those that said they end."""
        now = time.monotonic()
        peers = [peer for rank, peer in sorted(self.peers.items()) if rank != self.rank]
        return [peer for peer in peers if now - peer.changed >= seconds and peer.phase is not Phase.ENDING]

    def hindmost(self) -> list[Peer]:
        """Return the processes that are least far, all if they are equally far."""
        peers = [peer for _, peer in sorted(self.peers.items()) if peer.phase is not Phase.ENDING]
        least = min((peer.position for peer in peers), default=(0, 0))
        return [peer for peer in peers if peer.position == least]

    def look(self) -> None:
        """Read the others' heartbeats at once, and from here on."""
        self.reading = True
        self._wake.set()

    def announce(self, text: str) -> bool:
        """Tell all processes why the run ends. Return False where another one has told before (`notice`)."""
        self._own_notice = text
        self._wake.set()
        self._announced.wait(3)
        return self.notice is None or self.notice == text

    def close(self) -> None:
        """Post a last heartbeat, with the present phase, and end the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join(3)

    def _run(self) -> None:
        try:
            while True:
                closed = self._closed
                self._exchange()
                if closed:
                    return
                self._wake.wait(INTERVAL)
                self._wake.clear()
        except torch.distributed.DistError:
            self.failed = True
            self._announced.set()

    def _exchange(self) -> None:
        self._beats += 1
        step, phase = self._progress.step, self._progress.phase
        self._store.set(str(self.rank), json.dumps([self.host, phase, step, self._beats]))
        if self._own_notice is not None and not self._announced.is_set():
            self.notice = self._store.compare_set(_NOTICE, "", self._own_notice).decode()
            self._announced.set()
        elif self.notice is None and self._store.check([_NOTICE]):
            self.notice = self._store.get(_NOTICE).decode()
        if self.reading:
            self._read()
        else:
            self.peers = {}
        self.answered = time.monotonic()

    def _read(self) -> None:
        # A process that has not joined yet has no heartbeat; asking for it would wait.
        ranks = [rank for rank in range(self.size) if rank in self.peers or self._store.check([str(rank)])]
        peers, now = dict(self.peers), time.monotonic()
        for rank, value in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            host, phase, step, beat = json.loads(value)
            before = peers.get(rank)
            changed = before.changed if before is not None and before.beat == beat else now
            peers[rank] = Peer(rank, host, Phase(phase), step, beat, changed)
        self.peers = peers
