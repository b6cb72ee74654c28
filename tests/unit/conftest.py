"""Settings of the unit tests: Hypothesis has no deadline, since machines are slow at times."""

from hypothesis import settings

settings.register_profile("kvmring", deadline=None)
settings.load_profile("kvmring")
