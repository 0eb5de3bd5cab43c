"""Training: tensors to weights, by a loop that can be killed at any moment and resumed exactly."""
