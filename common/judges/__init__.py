"""What generated images are judged by, in every project that makes some: networks that are nobody's subject here, and
the distances between what they see. The name of a Fréchet distance says which network it was measured on.
"""

CACHE = "judges"  # below data_root: trained classifiers and statistics of reference images
