"""Settings: one limit of migrations away for all who ask for them."""

from __future__ import annotations

import pytest

from services.decode.config import MAX_MIGRATIONS, DecodeSettings, EvacuationConfig, PredictorConfig
from starmesh.profiles import load_profile

pytestmark = pytest.mark.fast


def settings(*flags: str) -> DecodeSettings:
    return DecodeSettings(_cli_parse_args=list(flags))


def test_an_evacuation_moves_as_many_at_a_time_as_the_instance_may() -> None:
    assert settings().evacuation == EvacuationConfig()
    assert settings().evacuation.rescheduling.max_in_flight_per_source == MAX_MIGRATIONS
    decided = settings("--max-outgoing-migrations", "7")
    assert decided.evacuation.rescheduling.max_in_flight_per_source == decided.migrator.max_outgoing == 7


def test_an_evacuation_reckons_with_the_profile() -> None:
    assert settings("--profile", "h100-7b").evacuation.rescheduling.cost == load_profile("h100-7b").cost


def test_an_instance_that_asks_no_predictor_keeps_no_hidden_states() -> None:
    assert settings().predictor == PredictorConfig()
    assert settings().kept_layers is None
    asked = settings("--predictor-timeout-s", "2", "--predictor-queue", "7", "--hidden-layers", "4,8").predictor
    assert asked == PredictorConfig(timeout_s=2.0, queue_samples=7)
    alone = settings("--no-predict", "--hidden-layers", "4,8")
    assert (alone.predictor, alone.kept_layers) == (None, ())


def test_an_instance_that_may_move_nothing_away_still_starts() -> None:
    assert settings("--max-outgoing-migrations", "0").migrator.max_outgoing == 0
    assert settings("--max-outgoing-migrations", "0").evacuation.rescheduling.max_in_flight_per_source == 1
