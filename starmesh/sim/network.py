"""The network between simulated instances: messages that take their time, and transfers that share links.

Owns bandwidth and latency. A transfer's rate is the smaller of its equal share of the sender's outgoing and of the
receiver's incoming link, and changes as transfers begin and end. What one end leaves unused is not given to others
(max-min fairness would), which errs on the slow side where ends are unequally busy. Messages take no bandwidth. Knows
nothing of what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from starmesh.profiles import Link
from starmesh.sim.events import Event, EventLoop

ROUTER: Final = "router"
"""Stands for the routers: always there, with no latency beyond that of the other end."""


class _End:
    """One instance's link and the transfers on it, in the order in which they began."""

    __slots__ = ("incoming", "link", "outgoing")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.outgoing: dict[Transfer, None] = {}
        self.incoming: dict[Transfer, None] = {}


class Transfer:
    """Bytes on their way."""

    __slots__ = ("_done", "_event", "_network", "_rate", "_remaining_bytes", "_since_s", "receiver", "sender")

    def __init__(
        self, network: Network, sender: _End, receiver: _End, size_bytes: int, done: Callable[[bool], None]
    ) -> None:
        self.sender = sender
        self.receiver = receiver
        self._network = network
        self._remaining_bytes = float(size_bytes)
        self._done: Callable[[bool], None] | None = done
        self._rate = 0.0
        self._since_s = 0.0
        self._event: Event | None = None

    @property
    def bytes_per_s(self) -> float:
        """Its rate now; 0 once it is over."""
        return self._rate

    def cancel(self) -> None:
        """Break it off: nobody hears of it any more. Too late is as good as never."""
        if self._done is not None:
            self._done = None
            self._network.leave((self,))

    def share(self, loop: EventLoop) -> None:
        """Go on at the rate that there is for it now."""
        sender, receiver = self.sender, self.receiver
        rate = min(sender.link.bytes_per_s / len(sender.outgoing), receiver.link.bytes_per_s / len(receiver.incoming))
        if rate == self._rate:
            return
        self._remaining_bytes = max(0.0, self._remaining_bytes - self._rate * (loop.now_s - self._since_s))
        self._since_s, self._rate = loop.now_s, rate
        if self._event is not None:
            self._event.cancel()
        self._event = loop.after(self._remaining_bytes / rate, self._arrive)

    def stop(self) -> None:
        """It takes no bandwidth any more."""
        self._rate = 0.0
        if self._event is not None:
            self._event.cancel()

    def end(self, arrived: bool) -> None:
        """Tell whoever waits, once."""
        done, self._done = self._done, None
        if done is not None:
            done(arrived)

    def _arrive(self) -> None:
        self._network.leave((self,))
        self.end(True)


class Network:
    """Links of instances by their id."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._ends = {ROUTER: _End(Link(float("inf"), 0.0))}

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._ends

    def add(self, instance_id: str, link: Link) -> None:
        """Connect an instance. Raises ValueError for an id that is taken."""
        if instance_id in self._ends:
            raise ValueError(f"{instance_id} is connected already")
        self._ends[instance_id] = _End(link)

    def remove(self, instance_id: str) -> None:
        """An instance is gone: its transfers end, and what is on its way to it is lost. What it has sent arrives."""
        end = self._ends.pop(instance_id)
        broken = (*end.outgoing, *end.incoming)
        self.leave(broken)
        for transfer in broken:
            transfer.end(False)

    def transfer(self, sender_id: str, receiver_id: str, size_bytes: int, done: Callable[[bool], None]) -> Transfer:
        """Send ``size_bytes`` from now on. ``done`` hears whether they have arrived; False when an end has died. Raises
        KeyError for an end that is not there."""
        sender, receiver = self._ends[sender_id], self._ends[receiver_id]
        transfer = Transfer(self, sender, receiver, size_bytes, done)
        sender.outgoing[transfer] = receiver.incoming[transfer] = None
        self._share((sender, receiver))
        return transfer

    def message(
        self,
        sender_id: str,
        receiver_id: str,
        do: Callable[[], None],
        *,
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Have ``do`` happen at the receiver after the slower end's latency; messages between two ends keep their
        order. ``lost`` happens instead when the receiver is not there by then, as a connection would be refused. A
        message of a sender that is not there is never sent."""
        sender, receiver = self._ends.get(sender_id), self._ends.get(receiver_id)
        if sender is None:
            return

        def arrive() -> None:
            if receiver is not None and self._ends.get(receiver_id) is receiver:
                do()
            elif lost is not None:
                lost()

        there_s = 0.0 if receiver is None else receiver.link.latency_s
        self._loop.after(max(sender.link.latency_s, there_s), arrive)

    def leave(self, transfers: Iterable[Transfer]) -> None:
        """These take no bandwidth any more; the others on their links go on faster."""
        ends: dict[_End, None] = {}
        for transfer in transfers:
            del transfer.sender.outgoing[transfer], transfer.receiver.incoming[transfer]
            transfer.stop()
            ends[transfer.sender] = ends[transfer.receiver] = None
        self._share(ends)

    def _share(self, ends: Iterable[_End]) -> None:
        for end in ends:
            for transfer in (*end.outgoing, *end.incoming):
                transfer.share(self._loop)
