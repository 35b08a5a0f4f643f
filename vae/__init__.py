"""Variational autoencoders from scratch: likelihoods in nats that can be compared, and codes whose parts have
a meaning.
"""

from common.projects import Demo, Metric

METRICS = {
    "log_likelihood": Metric("Log-likelihood (nats)", "higher", leads=True),
    "log_likelihood_error": Metric("Standard error of that over the images"),
    "elbo": Metric("ELBO (nats)", "higher", leads=True),
    "bits_per_dim": Metric("Bits per dimension", "lower", leads=True),
    "kl": Metric("KL divergence (nats)"),
    "active_units": Metric("Latents in use"),
    "active_layers": Metric("Layers in use"),
    "psnr": Metric("PSNR of reconstructions (dB)", "higher"),
    "ssim": Metric("SSIM of reconstructions", "higher"),
    "fd_floor": Metric("Fréchet distance of held-out images", "floor"),
    "fd_*_reconstructions": Metric("Fréchet distance of reconstructions, {}", "lower"),
    "fd_*": Metric("Fréchet distance of samples, {}", "lower"),
    "mig": Metric("Mutual information gap", "higher", leads=True),
    "dci": Metric("DCI disentanglement", "higher", leads=True),
    "dci_completeness": Metric("DCI completeness", "higher"),
    "dci_informativeness": Metric("DCI informativeness", "higher"),
    "factor_vae_score": Metric("FactorVAE score", "higher"),
    "sap": Metric("SAP", "higher"),
}
DEMO = Demo("vae", "configs/vae_digits.yaml", seconds=45)
