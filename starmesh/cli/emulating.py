"""Options of an emulated local cluster, and what they mean for its services.

Owns which settings of the services are times of the hardware, and so pass faster with it. Imports nothing that takes
time: ``--help`` reads this.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from starmesh.cli.local_options import NO_PREDICTOR, ONLINE_PREDICTOR, Predicting, flags

if TYPE_CHECKING:
    from starmesh.cli.local_cluster import ClusterPlan

EngineName = Literal["torch", "emulated"]
LengthsName = Literal["chat", "reasoning"]

Engine = Annotated[
    EngineName,
    typer.Option(
        help="torch runs a model; emulated rehearses the hardware of --profile without one, which then also says what "
        "memory and batches there are."
    ),
]
ProfileName = Annotated[
    str,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        help="The instances' hardware and model (h100-7b): what rescheduling reckons with, and what is emulated.",
    ),
]
Speed = Annotated[float, typer.Option(min=0.001, help="Emulated: how many times faster than the hardware time passes.")]
KvTokens = Annotated[int, typer.Option(min=0, help="Emulated: tokens whose KV an instance holds. (0: the profile's)")]
OutputLengths = Annotated[LengthsName, typer.Option(help="Emulated: how long answers are to prompts that do not say.")]

_PREDICTORS: Final = ("", ONLINE_PREDICTOR, "measured", "paper", "oracle", NO_PREDICTOR)
"""Those that need no model: one that learns online, and the simulator's, which know each length and add an error."""

_NO_LAYERS: Final = "none"  # as the engines' setting says it
_ROUND_INTERVAL_S: Final = 1.0  # the rescheduler's default
_RELIEF_HORIZON_S: Final = 2.0  # the decode instances'
_REPORT_INTERVAL_S: Final = 0.25  # every service's
_VIEW_INTERVAL_S: Final = 0.2  # the router's
# Reports, views and rounds cost the laptop's time, not the hardware's.
_SHORTEST_INTERVAL_S: Final = 0.05
# However slowly time passes: several reports within a lease, and before dispatch takes one for stale.
_LONGEST_REPORT_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulating:
    """Whether and how a local cluster is emulated."""

    engine: EngineName = "torch"
    profile: str = ""
    speed: float = 1.0
    kv_tokens: int = 0
    output_lengths: LengthsName = "chat"

    @property
    def on(self) -> bool:
        """Whether it is."""
        return self.engine == "emulated"

    @property
    def description(self) -> str:
        """What people are told of it."""
        pace = "" if self.speed == 1 else f" at {self.speed:g} times its pace"
        return f"no model runs: this emulates {self.profile}{pace}"

    def check(self, predicting: Predicting) -> None:
        """Raise typer.BadParameter for options that do not go together."""
        from starmesh.profiles import ProfileError, load_profile, profile_names

        if self.on and predicting.predictor not in _PREDICTORS:
            raise typer.BadParameter(
                f"with --engine emulated it is one of {', '.join(_PREDICTORS[1:])}", param_hint="--predictor"
            )
        if self.on and predicting.collect is not None:
            raise typer.BadParameter("emulated instances have nothing to learn from", param_hint="--collect")
        if self.on and not self.profile:
            raise typer.BadParameter(
                f"is needed with --engine emulated: a TOML file, or one of {', '.join(profile_names())}",
                param_hint="--profile",
            )
        try:
            if self.profile:
                load_profile(self.profile)
        except ProfileError as error:
            raise typer.BadParameter(str(error), param_hint="--profile") from None

    def interval_s(self, seconds: float) -> float:
        """An interval of the hardware's time on the wall clock, as far as this machine can afford it."""
        return max(min(seconds, _SHORTEST_INTERVAL_S), seconds / self.speed) if self.on else seconds

    def _report_interval_s(self, seconds: float) -> float:
        return min(self.interval_s(seconds), _LONGEST_REPORT_INTERVAL_S)

    def apply(self, plan: ClusterPlan) -> ClusterPlan:
        """The plan with instances that emulate, where they are to; its other flags for them go. Where they are not, a
        profile is what costs are reckoned by."""
        from starmesh.lengths import LENGTH_MODELS
        from starmesh.policy.rescheduling import ReschedulingConfig

        profile = str(Path(self.profile).absolute()) if Path(self.profile).is_file() else self.profile
        if not self.on:
            reckoned = flags({"--profile": profile}) if profile else ()
            return dataclasses.replace(
                plan,
                decode_flags=(*plan.decode_flags, *reckoned),
                rescheduler_flags=(*plan.rescheduler_flags, *reckoned),
            )
        default, speed, longest = ReschedulingConfig(), self.speed, LENGTH_MODELS[self.output_lengths].cap_tokens
        own = flags(
            {"--engine": "emulated", "--profile": profile, "--speed": self.speed, "--kv-tokens": self.kv_tokens}
        )
        rounds = flags({"--round-interval-s": self.interval_s(_ROUND_INTERVAL_S)})
        rests = flags(
            {
                "--cool-down-s": default.cool_down_s / speed,
                "--failure-cool-down-s": default.failure_cool_down_s / speed,
                "--settle-s": default.settle_s / speed,
                "--stale-after-s": default.stale_after_s / min(speed, 1.0),
            }
        )
        return dataclasses.replace(
            plan,
            model=None,
            engine_flags=(*own, "--transfer", "stream", *(() if plan.predict else ("--hidden-layers", _NO_LAYERS))),
            decode_flags=flags({"--relief-horizon-s": _RELIEF_HORIZON_S / speed}),
            router_flags=(
                *(*plan.router_flags, *own),
                *flags(
                    {
                        "--output-lengths": self.output_lengths,
                        "--view-interval-s": self._report_interval_s(_VIEW_INTERVAL_S),
                    }
                ),
            ),
            rescheduler_flags=(
                *(*plan.rescheduler_flags, *own, *rests),
                *(() if "--round-interval-s" in plan.rescheduler_flags else rounds),
            ),
            predictor_flags=(*plan.predictor_flags, *own, "--longest-output-tokens", str(longest)),
            shared_flags=(
                *plan.shared_flags,
                *flags({"--report-interval-s": self._report_interval_s(_REPORT_INTERVAL_S)}),
            ),
        )
