"""Settings of the predictor."""

from starmesh.process import ServiceSettings


class PredictorSettings(ServiceSettings):
    """Nothing yet beyond what every service has."""
