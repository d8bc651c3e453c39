"""Live migration: both ends of the protocol that moves a running sequence, as transition tables.

``source`` is the end that has the sequence and drives; ``target`` is the end that pulls its KV and claims it. ``terms``
holds what both speak of and ``table`` what a transition is. docs/migration.md tells the protocol as a whole: who sends
what to whom by which call, and what each end does at each failure.

Pure: nothing here sends, waits or looks at a clock. Each end is a frozen record; ``advance(record, event, now_s)``
returns the next record and the effects that the shell (a decode instance's migrator) carries out, in their order.
"""
