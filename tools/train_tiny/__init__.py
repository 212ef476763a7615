"""Trains `tiny-wan`, the embedded model: VAE, then T2V with its text encoder, then I2V with its image encoder."""
