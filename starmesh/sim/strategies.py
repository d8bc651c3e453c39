"""The combinations of policies that are compared, by name.

Owns the names. The policies are the live ones; what each predictor knows is ``predictors``'. The first six place a
request once and leave it there: what is full preempts and recomputes. ``vllm_round_robin`` and ``vllm_least_tokens`` do
so as vLLM's P/D set-ups do, without regard to memory; the others wait in the router for room, as all do live. Those
after them move running requests, and then instances also relieve themselves before they would preempt, as they do live.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starmesh.sim.config import Strategy

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (
            Strategy(name="vllm_round_robin", dispatch="round_robin", admit_all=True),
            Strategy(name="vllm_least_tokens", dispatch="least_tokens", admit_all=True),
            Strategy(name="round_robin", dispatch="round_robin"),
            Strategy(name="least_requests", dispatch="least_requests"),
            Strategy(name="least_tokens", dispatch="least_tokens"),
            Strategy(name="power_of_two", dispatch="power_of_two"),
            Strategy(name="llumnix", rescheduling="llumnix"),
            Strategy(name="current_load", rescheduling="current_load"),
            Strategy(name="star_unpredicted", rescheduling="star"),
            Strategy(name="star", dispatch="predicted_load", rescheduling="star", predictor="measured"),
            Strategy(name="star_oracle", dispatch="predicted_load", rescheduling="star", predictor="oracle"),
            Strategy(name="star_plus_unpredicted", rescheduling="star_plus"),
            Strategy(name="star_plus", dispatch="predicted_load", rescheduling="star_plus", predictor="measured"),
            Strategy(name="star_plus_oracle", dispatch="predicted_load", rescheduling="star_plus", predictor="oracle"),
            Strategy(name="star_peak", dispatch="predicted_peak", rescheduling="star_plus", predictor="measured"),
            Strategy(name="star_peak_oracle", dispatch="predicted_peak", rescheduling="star_plus", predictor="oracle"),
            Strategy(name="held_peak", dispatch="held_peak", rescheduling="star_plus", predictor="measured"),
            Strategy(name="perfect_balance", perfect_balance=True),
        )
    }
)
"""By name, in the order in which they are shown."""
