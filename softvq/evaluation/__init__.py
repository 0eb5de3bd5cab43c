"""Weights to figures: numbers, pictures and pages about what a tokenizer does to photographs."""
