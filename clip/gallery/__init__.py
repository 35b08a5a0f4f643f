"""A person's folder of images, embedded once and searched often: what `clip.search` is made of."""
