"""A rehearsal: a cluster of simulated instances on virtual time, placed and rescheduled by the code that runs live.

Each instance is the live engine core (scheduler, block pool, preemption) over an executor that knows only how long a
step takes; dispatch, admission, ``plan`` and both ends of a migration are the live ones too. Stand-ins: the forward
(``engine.emulated``), the network (``network``), the predictor (``predictors``), and lengths and arrivals of requests
(``workload``). docs/simulator.md says what that leaves out.
"""
