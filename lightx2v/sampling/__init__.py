"""Schedules and the denoising loop: from noise to latents, with no knowledge of models or files."""
