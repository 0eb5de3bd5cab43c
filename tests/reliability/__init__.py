"""Faults on purpose: what a run has to survive, each fault with its figure; see docs/reliability.md."""
