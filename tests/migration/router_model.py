"""What the router does for one request, as docs/migration.md asks of it, with the real token stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from services.router.stream import TokenStream, Verdict
from starmesh.migration.terms import EPOCHS_PER_MIGRATION, LedgerSilent, OwnerIs
from starmesh.types import FinishReason, Ownership, SamplingParams, SequenceSpec
from tests.migration.wire_model import LedgerCall, Link, Output

if TYPE_CHECKING:
    from tests.migration.world import World

ROUTER_STEP: Final = EPOCHS_PER_MIGRATION + 1
OFFLINE_STEP: Final = 1 << 20


class Request:
    """One request as its router sees it: the real token stream, and the turns of its life."""

    def __init__(self, world: World, request_id: str, prompt_tokens: int, max_output_tokens: int) -> None:
        self.world = world
        self.id = request_id
        self.prompt = tuple(range(-prompt_tokens, 0))
        self.stream = TokenStream(max_output_tokens=max_output_tokens)
        self.mine: Ownership | None = None
        self.link: Link | None = None
        self.cancelled = False
        self.turn = ""  # what the router waits for: "", "asking" or "claiming"
        self.wanted = ""
        self.recoveries = 0

    @property
    def ended(self) -> bool:
        return self.stream.finish_reason is not None

    def hear(self, link: Link, output: Output) -> None:
        known = self.mine.epoch if self.mine else 0
        listening = link is self.link and not self.ended
        if not listening or (output.moved_to is not None and output.moved_to.epoch <= known):
            if output.moved_to is not None:
                # Nobody listens any more: the target need not wait for us to come.
                self.world.link_to(output.moved_to.instance_id).up.append(("cancel", (self.id, output.moved_to.epoch)))
            return
        if output.moved_to is not None:
            self.follow(output.moved_to)
            return
        before = len(self.stream.token_ids)
        reason = FinishReason.LENGTH if output.finished else None
        verdict = self.stream.accept(output.epoch, output.offset, output.token_ids, reason)
        assert verdict is not Verdict.GAP, f"{self.id}: {output} after {before} tokens"
        assert self.stream.token_ids == list(range(len(self.stream.token_ids)))
        if self.mine is not None and output.epoch > self.mine.epoch:
            self.mine = Ownership(link.instance.id, output.epoch)
        if verdict is Verdict.END:
            self.leave()
        elif output.failed and output.epoch == self.stream.epoch:
            self.recover()

    def leave(self) -> None:
        self.link = None

    def follow(self, owner: Ownership) -> None:
        """Go to where the sequence has moved."""
        self.mine = owner
        self.stream.begin(owner.epoch)
        self.link = self.world.link_to(owner.instance_id)
        self.link.up.append(("attach", (self.id, owner.epoch, len(self.stream.token_ids))))

    def lost(self, link: Link) -> None:
        if link is self.link and not self.ended:
            self.link = None
            self.turn = "asking"
            self.world.ledger_calls.append(LedgerCall(self.asked, self.id))

    def asked(self, event: OwnerIs | LedgerSilent) -> None:
        """Whether the sequence had moved when its link broke."""
        if self.turn != "asking" or self.ended:
            return
        owner = event.owner if isinstance(event, OwnerIs) else None
        if owner is not None and self.mine is not None:
            moved = owner.epoch == self.mine.epoch + 1 and owner.instance_id != self.mine.instance_id
            if moved:
                self.turn = ""
                self.follow(owner)
                return
        self.recover()

    def recover(self) -> None:
        """Begin again elsewhere, from the tokens that are here."""
        self.link = None
        self.recoveries += 1
        self.turn = "claiming"
        epoch = ROUTER_STEP + (self.mine.epoch if self.mine else 0)
        self.wanted = self.world.pick_instance()
        self.claim(self.mine, epoch)

    def claim(self, expected: Ownership | None, epoch: int) -> None:
        call = LedgerCall(self.claimed, self.id, Ownership(self.wanted, epoch), expected)
        self.world.ledger_calls.append(call)
        self.claiming = call

    def claimed(self, event: OwnerIs | LedgerSilent) -> None:
        if self.turn != "claiming" or self.ended:
            return
        wanted = self.claiming.new
        assert wanted is not None
        if isinstance(event, LedgerSilent):
            wanted = Ownership(wanted.instance_id, wanted.epoch + OFFLINE_STEP)
        elif event.owner != wanted:
            found = event.owner.epoch if event.owner else 0
            self.claim(event.owner, max(wanted.epoch, found + ROUTER_STEP))
            return
        self.turn = ""
        self.mine = wanted
        self.stream.begin(wanted.epoch)
        spec = SequenceSpec(
            request_id=self.id,
            epoch=wanted.epoch,
            prompt_token_ids=self.prompt,
            output_token_ids=tuple(self.stream.token_ids),
            sampling=SamplingParams(max_output_tokens=self.stream.max_output_tokens),
        )
        self.link = self.world.link_to(wanted.instance_id)
        self.link.up.append(("start", spec))

    def cancel(self) -> None:
        self.cancelled = True
        self.stream.end(FinishReason.CANCELLED)
        if self.link is not None:
            self.link.up.append(("cancel", (self.id, self.stream.epoch)))
            self.leave()
