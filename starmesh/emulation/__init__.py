"""Instances without a model, on the real clock: a cluster's hardware rehearsed on a laptop.

Steps take the time that a profile says, prompts say how long their answers will be, KV blocks are small but real, and
transfers last as long as the profile's link would take. Everything around them is what runs with a model: router,
ledger, engine core, handoffs, migrations, rescheduler. ``emulation`` says what is emulated, ``tokens`` and
``tokenizer`` how a prompt holds its answer's length, ``requests`` how to ask for one, ``executor``, ``pace``, ``marks``
and ``link`` are the instance's parts; ``starmesh.instance.emulated`` puts them together. Imports no torch.
"""
