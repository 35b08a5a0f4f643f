"""Denoising diffusion from scratch: DDPM, EDM and flow matching on small images."""

from common.projects import Demo, Metric

METRICS = {
    "fid": Metric("FID", "lower", leads=True),
    "fd_floor": Metric("Fréchet distance of held-out images", "floor"),
    "fd_reconstruction_floor": Metric("Fréchet distance of decoded held-out images", "floor"),
    "fd_*_floor": Metric("Fréchet distance of held-out images, {}", "floor"),
    "fd_*": Metric("Fréchet distance, {}", "lower", leads=True),
    "sfid": Metric("sFID", "lower"),
    "sfid_floor": Metric("sFID of held-out images", "floor"),
    "conditional_accuracy": Metric("Accuracy of the requested class", "higher", "percent", leads=True),
    "classifier_test_accuracy": Metric("Test accuracy of the judging classifier", "", "percent"),
    "inception_score": Metric("Inception score", "higher"),
    "classifier_score": Metric("Classifier score", "higher"),
    "precision": Metric("Precision", "higher"),
    "recall": Metric("Recall", "higher"),
    "density": Metric("Density", "higher"),
    "coverage": Metric("Coverage", "higher"),
    "nearest_train_rms": Metric("Distance to the nearest training image"),
    "nearest_train_rms_test_images": Metric("The same distance for held-out images"),
}
DEMO = Demo("diffusion", "configs/ddpm_digits.yaml", seconds=90)
