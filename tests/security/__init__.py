"""Hostile files on purpose: what must be refused, each with its limits; see docs/reliability.md."""
