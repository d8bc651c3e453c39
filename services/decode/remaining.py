"""How many tokens the sequences of a decode instance still have to generate, as far as anybody knows.

Owns the way of a sequence's samples to the predictor and of its estimates back, and fills them into load reports. An
estimate itself is kept with its sequence and goes where that goes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from services.decode import estimates
from services.decode.config import PredictorConfig
from services.decode.predictor_link import PredictorLink
from services.decode.running import RunningSequence
from services.decode.sample_queue import End, Sample, SampleQueue
from starmesh.engine.engine import SequenceOutput
from starmesh.instance.hidden_state import pack_hidden_state
from starmesh.instance.instance import Instance
from starmesh.types import FinishReason, HiddenLayout, InstanceState, RemainingEstimate, Role, SequenceLoad

log = logging.getLogger(__name__)


class RemainingTokens:
    """Of the sequences of ``running``. Without a ``config``, or where no hidden states are kept, nobody is asked; what
    is known without asking is reported all the same."""

    def __init__(
        self, instance: Instance, running: Mapping[str, RunningSequence], config: PredictorConfig | None
    ) -> None:
        self.queue = SampleQueue(config.queue_samples if config is not None else 0)
        self.link: PredictorLink | None = None
        self._instance = instance
        self._running = running
        self._told_of_layout = False
        if config is not None and instance.hidden_layout is not None:
            self.link = PredictorLink(
                self.queue,
                config,
                instance.credentials,
                instance_id=instance.instance_id,
                layout=instance.hidden_layout,
                find=self._find,
                on_estimate=self._answered,
            )
        instance.foresee = self.foresee

    def usable(self, hidden_state: bytes, layout: HiddenLayout | None) -> bytes:
        """A hidden state of a prefill, if it can be sent as one of this instance's own; else nothing, and the log says
        so once. Another layer's of the same size would be taken for the right one."""
        ours = self._instance.hidden_layout
        if self.link is None or ours is None or not hidden_state:
            return b""
        if layout == ours and len(hidden_state) == ours.state_bytes:
            return hidden_state
        if not self._told_of_layout:
            self._told_of_layout = True
            log.warning(
                "hidden states of prefills are not of layers %s like this instance's: they are not sent to the "
                "predictor; give prefill and decode instances the same --hidden-layers",
                ",".join(map(str, ours.layers)),
            )
        return b""

    def begun(self, running: RunningSequence, *, prefilled_tokens: int, hidden_state: bytes) -> None:
        """A sequence has come from a prefill of ``prefilled_tokens`` tokens that ended with ``hidden_state``; empty if
        there is none that is ``usable``."""
        output_tokens = prefilled_tokens - running.prompt_tokens
        if not hidden_state or output_tokens < 0:
            return
        # Of one whose estimate has come along, the predictor has had the sample from the router.
        if running.estimate is None or running.estimate.output_tokens < output_tokens:
            self._sampled(running, output_tokens, hidden_state)

    def made(self, running: RunningSequence, output: SequenceOutput) -> None:
        """A step made ``output`` of a sequence."""
        if self.link is not None and output.hidden_state is not None:
            self._sampled(running, output.offset, pack_hidden_state(output.hidden_state))

    def ended(self, running: RunningSequence, reason: FinishReason) -> None:
        """A sequence has ended for good, here."""
        if self.link is not None and not running.ignores_eos:
            self.queue.end(End(running.request_id, len(running.token_ids), reason))
            self.link.wake()

    def foresee(self, loads: Sequence[SequenceLoad]) -> tuple[SequenceLoad, ...]:
        """``loads`` with what is known of each."""
        return tuple(map(self._foreseen, loads))

    async def close(self) -> None:
        """Tell the predictor what it has not heard yet, if it answers."""
        if self.link is not None:
            await self.link.close()

    def _sampled(self, running: RunningSequence, output_tokens: int, hidden_state: bytes) -> None:
        if self.link is None or running.ignores_eos:
            return
        self.queue.add(
            Sample(
                request_id=running.request_id,
                prompt_tokens=running.prompt_tokens,
                output_tokens=output_tokens,
                hidden_state=hidden_state,
                previous=running.estimate,
                traceparent=running.traceparent,
            )
        )
        self.link.wake()

    def _answered(self, sample: Sample, estimate: RemainingEstimate) -> None:
        running = self._running.get(sample.request_id)
        # It may have ended or moved meanwhile, and another may have come under its name.
        if running is None or sample.output_tokens > len(running.token_ids):
            return
        if estimate.output_tokens == sample.output_tokens and estimates.is_sound(
            estimate, output_tokens=sample.output_tokens
        ):
            running.estimate = estimates.newer(running.estimate, estimate)

    def _foreseen(self, load: SequenceLoad) -> SequenceLoad:
        running = self._running.get(load.request_id)
        if running is None:
            return load
        if running.ignores_eos:
            limit = self._instance.membership.info.max_sequence_tokens
            return estimates.to_limit(load, max_sequence_tokens=limit)
        return load if running.estimate is None else estimates.aged(load, running.estimate)

    async def _find(self) -> str | None:
        """The first predictor: the same for all instances, so that samples and end of a sequence that moves meet."""
        for view in (await self._instance.ledger.view()).of_role(Role.PREDICTOR):
            if view.info.state is InstanceState.READY:
                return view.info.address
        return None
