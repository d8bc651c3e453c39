"""The paper's results in the simulator, with what they depend on: regenerates the tables and plots of docs/results.md.

``experiments`` says what is run, ``page`` puts it into the page; ``python -m benchmarks.results`` does both.
"""
