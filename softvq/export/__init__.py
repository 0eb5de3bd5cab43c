"""Models as files that run without softvq."""
