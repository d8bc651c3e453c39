"""Tests of the ledger: one conformance suite, two implementations."""
