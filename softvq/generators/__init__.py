"""Generators: SiT, DiT and MAR on latents `[batch, token, dim]`, with their processes and samplers."""
