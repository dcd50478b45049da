"""Hypothesis profiles: a short one on every run, a long one for the night.

`HYPOTHESIS_PROFILE=nightly make test` takes the long one.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "short", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", parent=settings.get_profile("short"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
