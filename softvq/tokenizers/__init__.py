"""Images to latent tokens and back."""
