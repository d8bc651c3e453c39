"""The predictor service: how many tokens each running request still has to generate."""

import os

# Read when numpy is imported. A forward is small: more threads would make it little faster, and spin meanwhile on cores
# that decode instances may need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
