"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Examples are not timed: on a busy machine any of them may take long.
settings.register_profile("starmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("starmesh")
