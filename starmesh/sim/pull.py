"""KV on its way between simulated instances, as the side that needs it pulls it.

Owns a pull's messages and its transfer: the request, the bytes, and the holder's word at the end that the blocks were
still leased. Owns no lease and no block.
"""

from __future__ import annotations

from collections.abc import Callable

from starmesh.sim.network import Network, Transfer


class Pull:
    """Begins when it is made. ``confirm`` is asked at the holder once all has arrived: whether the lease has held, and
    to end it. ``done`` hears, once, whether the blocks are there; False too when the holder has died."""

    def __init__(
        self,
        network: Network,
        *,
        holder_id: str,
        puller_id: str,
        size_bytes: int,
        confirm: Callable[[], bool],
        done: Callable[[bool], None],
    ) -> None:
        self._network = network
        self._holder_id = holder_id
        self._puller_id = puller_id
        self._size_bytes = size_bytes
        self._confirm = confirm
        self._done: Callable[[bool], None] | None = done
        self._transfer: Transfer | None = None
        network.message(puller_id, holder_id, self._send, lost=self._fail)

    def cancel(self) -> None:
        """Break it off: ``done`` is not called any more, and nothing is written."""
        self._done = None
        if self._transfer is not None:
            self._transfer.cancel()

    def _send(self) -> None:
        if self._done is not None and self._puller_id in self._network:
            self._transfer = self._network.transfer(self._holder_id, self._puller_id, self._size_bytes, self._received)

    def _received(self, arrived: bool) -> None:
        if not arrived:
            self._fail()
        elif self._done is not None:
            self._network.message(self._puller_id, self._holder_id, self._release, lost=self._fail)

    def _release(self) -> None:
        held = self._confirm()
        self._network.message(self._holder_id, self._puller_id, lambda: self._end(held))

    def _fail(self) -> None:
        self._end(False)

    def _end(self, arrived: bool) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(arrived)
