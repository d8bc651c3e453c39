"""The handoff of a prefilled sequence to a simulated decode instance.

Owns one handoff's messages and transfer: blocks are reserved at the decode instance, the prefill instance's KV is
pulled into them and freed there, and the sequence starts. As live, an instance without room for it refuses it: it
queues nothing that comes with KV, nor computes the prompt itself. Whether the next try is there or elsewhere is the
router's to say, and so is when the prefill instance stops to keep the KV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starmesh.engine.engine import EngineCore
from starmesh.profiles import Profile
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.network import ROUTER, Network
from starmesh.sim.pull import Pull
from starmesh.types import InstanceState, SequenceSpec


class Handoff:
    """``begin`` begins it. ``done`` hears, once, whether the sequence decodes: False when the decode instance is not
    there or has no room.

    It hears nothing when either instance dies later: whoever asked learns that by itself, and cancels.
    """

    def __init__(
        self,
        handoffs: Handoffs,
        prefill_id: str,
        decode_id: str,
        spec: SequenceSpec,
        done: Callable[[bool], None],
    ) -> None:
        self._handoffs = handoffs
        self._network = handoffs.network
        self._prefill_id = prefill_id
        self._decode_id = decode_id
        self._spec = spec
        self._resident_tokens = spec.tokens - 1  # the token that was sampled last has no KV yet
        self._done: Callable[[bool], None] | None = done
        self._pull: Pull | None = None

    def begin(self) -> None:
        """The router's start message goes out."""
        self._network.message(ROUTER, self._decode_id, self._reserve, lost=self._refuse)

    def cancel(self) -> None:
        """Give it up, and free what is reserved; ``done`` hears nothing more. Too late is as good as never."""
        if self._done is None:
            return
        self._done = None
        if self._pull is not None:
            self._pull.cancel()
        request_id, epoch = self._spec.request_id, self._spec.epoch
        self._decode_call(lambda core: core.cancel(request_id, epoch))

    def _reserve(self) -> None:
        decode = self._handoffs.instances.get(self._decode_id)
        if decode is not None and decode.info.state is not InstanceState.READY:
            self._reserved(None)  # it drains
        elif self._done is not None:
            spec = self._spec
            self._decode_call(lambda core: core.reserve(spec.request_id, spec.epoch, spec.tokens), self._reserved)

    def _reserved(self, found: object) -> None:
        if self._done is None:
            return
        if found is None or isinstance(found, Exception):
            # No room for now or never, or it takes nothing: the router asks another.
            self._network.message(self._decode_id, ROUTER, self._refuse)
            return
        layout = self._handoffs.profile.layout
        blocks = -(-self._resident_tokens // layout.block_tokens)
        self._pull = Pull(
            self._network,
            holder_id=self._prefill_id,
            puller_id=self._decode_id,
            size_bytes=blocks * layout.block_bytes,
            confirm=self._release,
            done=self._pulled,
        )

    def _release(self) -> bool:
        prefill = self._handoffs.instances[self._prefill_id]
        request_id, epoch = self._spec.request_id, self._spec.epoch
        prefill.call(lambda core: core.release(request_id, epoch))
        return self._done is not None

    def _pulled(self, arrived: bool) -> None:
        if arrived:
            spec, resident_tokens = self._spec, self._resident_tokens
            self._decode_call(lambda core: core.start(spec, resident_tokens), self._started)

    def _started(self, result: object) -> None:
        if self._done is None:
            return
        if isinstance(result, Exception):
            raise result
        self._end(True)

    def _refuse(self) -> None:
        self._end(False)

    def _end(self, decodes: bool) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(decodes)

    def _decode_call(self, do: Callable[[EngineCore], object], done: Callable[[object], None] | None = None) -> None:
        decode = self._handoffs.instances.get(self._decode_id)
        if decode is not None:
            decode.call(do, done)


class Handoffs:
    """Hands sequences from one of ``instances``, which are of ``profile``, to another."""

    def __init__(self, network: Network, instances: Mapping[str, SimulatedInstance], *, profile: Profile) -> None:
        self.network = network
        self.instances = instances
        self.profile = profile

    def start(self, prefill_id: str, decode_id: str, spec: SequenceSpec, done: Callable[[bool], None]) -> Handoff:
        """Have ``spec``, which ``prefill_id`` holds with the KV of all but its last token, go on at ``decode_id``."""
        handoff = Handoff(self, prefill_id, decode_id, spec, done)
        handoff.begin()
        return handoff
