"""What each objective is worth on dSprites:

    python -m bench.vae_table [--seeds 3] [--only VAE] [--jobs 1] [--tiny] [key=value ...]

The plain VAE, and at two strengths each: beta-VAE, beta-TCVAE with the right estimate of q(z), beta-TCVAE with the
estimate as its authors' program has it, FactorVAE. All share images, network, optimizer and number of steps; only the
objective differs. Each cell is `python -m vae.train`, `python -m vae.eval` on test images, and the total correlation of
the trained code, in a folder of its own under --runs. A cell that is finished is kept as long as its config is the
same; one that was stopped goes on. Writes dsprites.json (one flat list, a record a cell and seed) and dsprites.md (mean
and standard deviation over the seeds) into --results after every cell.

Legend: N training images, D draws of z, Z latents.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cells import spread, train_and_evaluate
from common.checkpoint import read_weights
from common.config import resolve
from common.files import read_json, write_json, write_text
from common.images import MemoryImages
from common.provenance import config_hash
from common.runtime import use_threads
from vae.config import Config
from vae.data import load_images
from vae.images import prepare
from vae.load import build_model
from vae.model import VAE, Gaussian

RUNS = Path("runs/vae_table")
RESULTS = Path("docs/results/vae")
BETA, TC, FACTOR = (f"configs/{name}_dsprites.yaml" for name in ("betavae", "betatcvae", "factorvae"))
# what is evaluated is not up to the configs, for it must be the same in every cell
EVALUATION = ["eval.disentanglement=true", "eval.split=test", "eval.importance_samples=0", "eval.features=none"]
TINY = [
    "model.hidden=[16]",
    "data.max_images=64",
    "data.validation=0",
    "train.batch_size=16",
    "train.steps=4",
    "train.sample_every=0",
    "eval.num_images=200",
    "device=cpu",
    "compile=false",
]
DRAWS = 2000  # D, from which the total correlation is estimated
PAIRS_AT_ONCE = 200_000  # of a draw and an image: bounds the memory
COLUMNS = {
    "mig": "MIG",
    "dci": "DCI",
    "sap": "SAP",
    "factor_vae_score": "FactorVAE score",
    "elbo": "ELBO (nats)",
    "kl": "KL (nats)",
    "total_correlation": "total correlation (nats)",
    "active_units": "active units",
}
SCORES = ("mig", "dci", "sap", "factor_vae_score")  # fractions


@dataclass(frozen=True)
class Cell:
    """An objective at one strength."""

    label: str
    config: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A name for the disk: `beta-TCVAE, beta 3` -> `beta-tcvae_beta_3`."""
        return self.label.lower().replace(",", "").replace(" ", "_")


CELLS = (
    Cell("VAE", BETA, ("objective.beta=1",)),
    Cell("beta-VAE, beta 3", BETA, ("objective.beta=3",)),
    Cell("beta-VAE, beta 6", BETA, ("objective.beta=6",)),
    Cell("beta-TCVAE, beta 3", TC, ("objective.beta=3", "objective.estimator=stratified")),
    Cell("beta-TCVAE, beta 6", TC, ("objective.beta=6", "objective.estimator=stratified")),
    Cell("beta-TCVAE as published, beta 3", TC, ("objective.beta=3", "objective.estimator=published")),
    Cell("beta-TCVAE as published, beta 6", TC, ("objective.beta=6", "objective.estimator=published")),
    Cell("FactorVAE, gamma 10", FACTOR, ("objective.beta=10",)),
    Cell("FactorVAE, gamma 30", FACTOR, ("objective.beta=30",)),
)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(args.threads)
    extra = [*(TINY if args.tiny else []), *EVALUATION, *args.overrides]
    cells = [cell for cell in CELLS if not args.only or cell.label in args.only]
    # seed by seed, so that a table of few seeds is whole early
    tasks = [(cell, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for cell in cells]
    with ThreadPoolExecutor(args.jobs) as pool:
        in_turns = pool.map if args.jobs > 1 else map  # one job needs no thread of its own
        for record in in_turns(lambda task: run_cell(*task, args.runs, extra, args.threads), tasks):
            print(f"{record['cell']}, seed {record['seed']}: MIG {record['mig']:.3f}", flush=True)
            write(args.runs, args.results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vae_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[cell.label for cell in CELLS], help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--runs", type=Path, help=f"run folders (default: {RUNS})")
    parser.add_argument("--results", type=Path, help=f"the table (default: {RESULTS}, with --tiny the run folders)")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny network: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every cell")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.runs is None:
        args.runs = Path("runs/vae_table_tiny") if args.tiny else RUNS
    if args.results is None:
        args.results = args.runs if args.tiny else RESULTS
    return args


# -- one cell ----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, seed: int, runs: Path, extra: list[str], threads: int) -> dict[str, object]:
    """Train and evaluate, unless that was done with the same config; the record."""
    folder = runs / cell.folder / f"seed{seed}"
    kept = runs / cell.folder / f"seed{seed}.json"
    overrides = [f"seed={seed}", *extra, *cell.overrides]
    config = resolve(Config, Path(cell.config), [f"run_dir={folder}", *overrides])
    record = read_json(kept)
    if record.get("config_sha256") == config_hash(config):
        return record
    result, origin = train_and_evaluate("vae", Config, cell.config, overrides, folder, threads)
    record = {
        "cell": cell.label,
        "seed": seed,
        **result["metrics"],
        "total_correlation": total_correlation(config),
        "bins": config.eval.bins,
        "test_images": result["n"]["images"],
        "train_images": config.data.max_images,
        "images_seen": config.train.steps * config.train.batch_size,
        **origin,
    }
    write_json(kept, record)
    return record


@torch.no_grad()
def total_correlation(config: Config, draws: int = DRAWS) -> float:
    """KL(q(z) || product of q(z_j)) in nats, of the trained model in float32; q(z) is the mean over all training
    images, as in the objective.
    """
    images = load_images(config.data, config.data_root)
    assert isinstance(images, MemoryImages)
    model = build_model(config).eval()
    model.load_state_dict(read_weights(Path(config.run_dir) / "model.safetensors")[0])
    assert isinstance(model, VAE)
    rng = torch.Generator().manual_seed(config.seed)
    parts = [model.infer(prepare(pixels, config, rng)) for pixels in images.images.split(1000)]
    posterior = Gaussian(*(torch.cat(values) for values in zip(*parts, strict=True)))
    chosen = torch.randint(len(images), (draws,), generator=rng)
    own = Gaussian(posterior.mean[chosen], posterior.log_variance[chosen])
    return estimate_total_correlation(posterior, own.sample(torch.randn(own.mean.shape, generator=rng)))


def estimate_total_correlation(posterior: Gaussian, z: Tensor) -> float:
    """Mean over draws z (D, Z) from q(z) of log q(z) - sum_j log q(z_j); q(z) is the mean of q(z | x) over images.

    Args:
        posterior: of every image, (N, Z).
    """
    values = []
    precision = torch.exp(-posterior.log_variance)  # (N, Z)
    for some in z.split(max(1, PAIRS_AT_ONCE // len(precision))):
        log_q = torch.zeros(len(some), len(precision))  # log q(z | x) of each draw and image, latent by latent added up
        log_product = torch.zeros(len(some))
        for j in range(z.shape[1]):
            scaled = (some[:, j, None] - posterior.mean[:, j]) ** 2 * precision[:, j]
            pairs = -0.5 * (scaled + posterior.log_variance[:, j] + math.log(2 * math.pi))  # (d, N)
            log_q += pairs
            log_product += torch.logsumexp(pairs, 1) - math.log(len(precision))
        values.append(torch.logsumexp(log_q, 1) - math.log(len(precision)) - log_product)
    return float(torch.cat(values).mean())


# -- the table ---------------------------------------------------------------------------------------------------------


def write(runs: Path, results: Path) -> None:
    """dsprites.json and dsprites.md, of all that is finished."""
    folders = {cell.label: runs / cell.folder for cell in CELLS}
    records = [read_json(path) for folder in folders.values() for path in sorted(folder.glob("seed*.json"))]
    records = [record for record in records if record]
    text = "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"  # a record a line
    write_text(results / "dsprites.json", text)
    write_text(results / "dsprites.md", table(records))


def table(records: list[dict]) -> str:
    """The records in Markdown: mean ± standard deviation over the seeds, and what they were measured with."""
    lines = [
        f"| objective | seeds | {' | '.join(COLUMNS.values())} | training, CPU-s |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for cell in CELLS:
        rows = [record for record in records if record["cell"] == cell.label]
        if not rows:
            continue
        cells = [spread([row[name] for row in rows], 3 if name in SCORES else 1) for name in COLUMNS]
        timed = [row["train_cpu_seconds"] for row in rows if row["train_cpu_seconds"] is not None]
        cost = f"{statistics.mean(timed):.0f}" if timed else ""
        lines.append(f"| {cell.label} | {len(rows)} | {' | '.join(cells)} | {cost} |")
    return "\n".join([*lines, "", caption(records), ""])


def caption(records: list[dict]) -> str:
    """What the figures under the table were measured with."""

    def each(values: Iterable[object]) -> str:
        return ", ".join(str(value) for value in sorted(set(values), key=str))

    seeds, bins, test, train, seen = (
        each(record[key] for record in records)
        for key in ("seed", "bins", "test_images", "train_images", "images_seen")
    )
    return (
        f"Seeds {seeds}. Scores of posterior means of {test} test images, the shape counted as a factor; MIG with "
        f"{bins} bins. Trained on {train} images of the grid (0: all that are in no other split), {seen} seen in all. "
        f"ELBO: one draw an image. Total correlation: {DRAWS} draws, q(z) the mean over all training images."
    )


if __name__ == "__main__":
    main()
