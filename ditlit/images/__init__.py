"""From images, wherever they lie, to latents: reading, labels, the VAE, encoding."""
