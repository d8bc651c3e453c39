"""The rescheduler service: one leader observes, plans and commands migrations."""
