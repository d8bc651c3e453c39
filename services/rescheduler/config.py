"""Settings of the rescheduler."""

from starmesh.process import ServiceSettings


class ReschedulerSettings(ServiceSettings):
    """Nothing yet beyond what every service has."""
