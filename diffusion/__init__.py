"""Denoising diffusion from scratch: DDPM, EDM and flow matching on small images."""
