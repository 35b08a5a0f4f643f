"""One HTML page about any runs:  python -m common.report runs/demo/* --out runs/demo/report.html [--title "..."]

The page is a single file: curves and pictures are embedded, and it asks nothing of the network. Whatever is missing or
damaged in a run folder is named on the page instead of stopping it, so that a report can be made of a run that is still
going on, or has failed.
"""

from common.report.page import build
from common.report.reading import read_run

__all__ = ["build", "read_run"]
