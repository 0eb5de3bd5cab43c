"""What the `softvq` program does, one function per command; each takes the parsed arguments and prints its result."""
