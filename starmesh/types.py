"""The nouns that every process shares, as plain frozen values.

Owns the vocabulary of sequences, instances and the cluster view. Owns no behaviour beyond derived quantities,
no wire format (``starmesh.rpc.convert``) and no storage (``starmesh.ledger``). Times are seconds as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

MAX_REQUEST_ID_LENGTH = 128


class Role(Enum):
    """What an instance does."""

    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"
    RESCHEDULER = "rescheduler"
    PREDICTOR = "predictor"


class InstanceState(Enum):
    """Whether an instance takes new work."""

    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class TransferBackend(Enum):
    """A way to move KV blocks between instances."""

    STREAM = "stream"
    NIXL = "nixl"


class MigrationReason(Enum):
    """Why a sequence moves to another decode instance."""

    LOAD = "load"
    """To level the load as it is."""
    PREDICTED_LOAD = "predicted_load"
    """To level the load as it is predicted."""
    MEMORY = "memory"
    """Its instance is about to run out of blocks."""
    DRAIN = "drain"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends; every value decided (defaults applied by the router).

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps all tokens. ``seed`` and the position of a token in its sequence
    (prompt tokens included) are all that its random number depends on.
    """

    max_output_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """A sequence as any instance can continue it: carried by prefill, handoff, recovery and migration."""

    request_id: str
    epoch: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How KV blocks are laid out; two instances exchange blocks only when all fields agree.

    A block is one contiguous array [layers, 2, kv_heads, block_tokens, head_dim] (key then value) of ``dtype``.
    """

    model_revision: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int

    @property
    def token_bytes(self) -> int:
        """Bytes of KV that one token holds over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.token_bytes * self.block_tokens


@dataclass(frozen=True, slots=True)
class DeviceRange:
    """Registered memory: ``address`` of block 0, ``size`` in bytes, "DRAM" or "VRAM", device number."""

    address: int
    size: int
    memory: str
    device: int


@dataclass(frozen=True, slots=True)
class KvTicket:
    """Leased blocks that another instance may pull; ``block_ids`` in the sequence's order."""

    lease_id: str
    instance_id: str
    address: str
    layout: KvLayout
    block_ids: tuple[int, ...]
    resident_tokens: int
    lease_duration_s: float


@dataclass(frozen=True, slots=True)
class HiddenLayout:
    """What a hidden state [layers, width] is made of.

    ``layers`` ascend: n stands for the output of the first n layers, and the model's count of layers for its final
    hidden state, after the last norm. It travels and is stored as little-endian float16.
    """

    model_revision: str
    layers: tuple[int, ...]
    width: int

    @property
    def state_bytes(self) -> int:
        """Bytes of one hidden state."""
        return len(self.layers) * self.width * 2

    def within(self, other: HiddenLayout) -> bool:
        """Whether a hidden state of ``other`` contains one of this layout. One without layers is in every one of its
        model."""
        if self.model_revision != other.model_revision or not set(self.layers) <= set(other.layers):
            return False
        return not self.layers or self.width == other.width


@dataclass(frozen=True, slots=True)
class RemainingEstimate:
    """How many tokens a sequence still had to generate when it had ``output_tokens``: the median, and the 0.9 quantile,
    not below it."""

    output_tokens: int
    remaining_tokens: int
    remaining_tokens_upper: int


@dataclass(frozen=True, slots=True)
class SequenceLoad:
    """What one sequence weighs on its instance, and how many tokens it is predicted to generate still.

    ``remaining_tokens`` is the median and ``remaining_tokens_upper`` an upper quantile, both counted from now: the
    predictor's last answer minus the tokens since, at least 0. ``prediction_age_tokens`` says how many tokens were
    generated since that answer. All three are None where there is no prediction.
    """

    request_id: str
    epoch: int
    prompt_tokens: int
    output_tokens: int
    resident_tokens: int
    max_output_tokens: int
    remaining_tokens: int | None = None
    remaining_tokens_upper: int | None = None
    prediction_age_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What an instance reports of itself. ``free_blocks`` counts cached blocks that could be evicted.
    ``transfer_backend`` is the one that its last pull used. Migrations in and out are those under way;
    ``migrated_sequences`` counts those that have moved here since it started. ``sequences`` is a tuple, or the same in
    columns as ``SequenceLoads``: so the ledger hands it out."""

    total_blocks: int
    free_blocks: int
    running_sequences: int = 0
    waiting_sequences: int = 0
    resident_tokens: int = 0
    step_duration_s: float = 0.0
    output_tokens: int = 0
    preemptions: int = 0
    transfer_bytes: int = 0
    transfer_backend: TransferBackend | None = None
    incoming_migrations: int = 0
    outgoing_migrations: int = 0
    migrated_sequences: int = 0
    sequences: Sequence[SequenceLoad] = ()


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What an instance registers. ``incarnation`` is new at each start of its process."""

    instance_id: str
    incarnation: str
    role: Role
    address: str
    state: InstanceState = InstanceState.READY
    layout: KvLayout | None = None
    transfer_backends: tuple[TransferBackend, ...] = ()
    max_sequence_tokens: int = 0
    max_sequences: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room that a dispatcher has claimed on an instance until the instance's own report includes the request."""

    request_id: str
    instance_id: str
    tokens: int
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the ledger knows it. ``load`` is None until it has reported."""

    info: InstanceInfo
    load: InstanceLoad | None = None
    reported_at_s: float = 0.0
    reservations: tuple[Reservation, ...] = ()

    @property
    def reserved_tokens(self) -> int:
        """Tokens reserved there that its report does not include yet."""
        return sum(reservation.tokens for reservation in self.reservations)


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which instance owns a sequence, and under which epoch."""

    instance_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Leadership:
    """Which instance leads its role, and under which term: a number that rises with each change of leader."""

    instance_id: str
    term: int


@dataclass(frozen=True, slots=True)
class Migration:
    """A move of a sequence, owned by ``source`` under ``epoch``, to ``target``.

    ``gain_tokens`` is what it is expected to gain, above 0, in the measure of its reason: for load the drop of the
    spread of load over the instances, for memory the tokens that would not have fitted the source, for a drain the
    sequence's own tokens; 0 for an operator's.
    """

    request_id: str
    source: str
    target: str
    epoch: int
    reason: MigrationReason
    gain_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster at ``now_s`` (the ledger's clock), instances ordered by id."""

    now_s: float
    instances: tuple[InstanceView, ...] = field(default=())

    def of_role(self, role: Role) -> tuple[InstanceView, ...]:
        """The instances of one role, ordered by id."""
        return tuple(view for view in self.instances if view.info.role is role)
