"""Classification of whole graphs by stratified cross-validation.

A trial is one fold: trial t holds out fold t mod `graph.folds` of a division that is drawn anew for each of
`train.seeds` repetitions. There are two protocols, and their figures must not stand in one column.

honest  A part of the training folds chooses the weights; the held-out fold is looked at once, by gnn.eval:
        `test_accuracy`. This is the risk assessment of Errica et al. 2020, with hyper-parameters fixed beforehand
        instead of a search in each fold.
gin     No part is kept back. The accuracy on the held-out fold is logged at every validation, and the step with the
        highest mean over the folds is reported: `cv_accuracy_best_epoch`, as Xu et al. 2019, section 7. The step is
        chosen on what it is judged by, so this is optimistic. `cv_accuracy_last_epoch`, of the final weights, involves
        no choice.

Legend: G graphs, B graphs of a batch, K classes.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from common.logging import read_metrics
from common.runtime import indexed_seed, mix_seed
from gnn.config import Config
from gnn.core.outputs import write_table
from gnn.core.scores import accuracy, macro_f1
from gnn.task import Task
from gnn.whole_graph.data import load_graphs, stratified_folds
from gnn.whole_graph.model import GraphNet

# keep the generators of batches and of inner splits apart from others
BATCH_STREAM, INNER_STREAM = 7_000_011, 7_000_013


class GraphTask(Task):
    """A class for each graph of a collection; a trial is a fold of a repetition."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.folds = config.graph.folds
        self.gin = config.graph.protocol == "gin"
        self.num_trials = config.train.seeds * self.folds
        check_protocol(config)
        self.whole = load_graphs(config)
        self.graphs = self.whole.to(device)
        rarest = int(torch.bincount(self.whole.labels).min())
        require(
            rarest >= self.folds,
            "graph.folds",
            f"{self.whole.name} has a class of only {rarest} graphs: not one for each fold",
        )
        self.tested: dict[int, float] = {}  # trial -> accuracy, for the picture
        self.said: dict[int, Tensor] = {}  # trial -> probabilities (held-out graphs, K)

    # -- splits and batches --------------------------------------------------------------------------------------------

    def split(self, trial: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of training, validation and held-out graphs, int64, disjoint and complete. gin: no validation graphs."""
        labels = self.whole.labels
        repetition = trial // self.folds
        held_out = stratified_folds(labels, self.folds, self.config.seed + repetition) == trial % self.folds
        rest = (~held_out).nonzero().flatten()
        test = held_out.nonzero().flatten()
        if self.gin:
            return rest, rest[:0], test
        one_in = round(1 / self.config.graph.validation)
        inner = stratified_folds(
            labels[rest], one_in, indexed_seed(self.config.seed + repetition, INNER_STREAM, trial % self.folds)
        )
        return rest[inner > 0], rest[inner == 0], test

    def build(self, trial: int) -> nn.Module:
        """A network; the fold's graphs, and what is measured again and again as one ready batch."""
        self.trial = trial
        train, val, test = (ids.to(self.device) for ids in self.split(trial))
        self.train_ids = train
        self.test_ids = test
        # what `validate` measures; under `honest` never the held-out fold
        self.held = self.graphs.batch(test if self.gin else val)
        config = self.config
        return GraphNet(config.model, config.graph, self.graphs.features.shape[1], self.graphs.num_classes).to(
            self.device
        )

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Cross-entropy, the mean over a random batch of the training graphs."""
        self.step = step
        rng = torch.Generator().manual_seed(mix_seed(self.seed_of(self.trial), BATCH_STREAM, step))
        drawn = torch.randperm(len(self.train_ids), generator=rng)[: self.config.train.batch_size].to(self.device)
        batch = self.graphs.batch(self.train_ids[self.shard(drawn)])
        return F.cross_entropy(net(batch), batch.labels)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the validation part; gin: on the held-out fold, and the last weights are the ones
        kept.
        """
        logits = model(self.held)
        loss = F.cross_entropy(logits, self.held.labels).item()
        share = accuracy(logits, self.held.labels)
        return {"criterion": self.criterion(loss, share), "val_loss": loss, "val_accuracy": share}

    def criterion(self, loss: float, share: float) -> float:
        """What chooses the weights, lower is better, from the loss and the accuracy of the validation part."""
        if self.gin:
            return -float(self.step)  # always the latest ones
        if self.config.graph.choose_by == "loss":
            return loss
        # the accuracy; between equal ones the loss, squeezed so that it weighs less than half a graph
        squeezed = loss / (1 + loss)  # in [0, 1)
        return -share + squeezed / (2 * len(self.held))

    def test(self, model: nn.Module) -> dict[str, float]:
        """honest: accuracy and macro-F1 on the held-out fold, accuracy on the validation part. gin: see the head of
        this module.
        """
        batch = self.graphs.batch(self.test_ids)
        logits = model(batch)
        self.said[self.trial] = logits.softmax(dim=1).cpu()
        measured = accuracy(logits, batch.labels)
        if self.gin:
            best = best_common_epoch(
                curves(Path(self.config.run_dir), self.config.train.steps), self.trial // self.folds, self.folds
            )
            self.tested[self.trial] = best[self.trial]
            return {"cv_accuracy_best_epoch": best[self.trial], "cv_accuracy_last_epoch": measured}
        self.tested[self.trial] = measured
        chosen = accuracy(model(self.held), self.held.labels)
        return {"test_accuracy": measured, "test_macro_f1": macro_f1(logits, batch.labels), "val_accuracy": chosen}

    def tables(self, model: nn.Module) -> dict[str, float]:
        """What the most frequent class, and a logistic regression on counts of the nodes' labels, reach without any
        edges.

        Trained on all folds but the held-out one of the first repetition; mean and, as `_std`, standard deviation over
        its folds.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        whole = self.whole
        owner = torch.repeat_interleave(torch.arange(len(whole)), whole.first.diff())
        counts = (
            torch.zeros(len(whole), whole.features.shape[1], dtype=whole.features.dtype)
            .index_add(0, owner, whole.features)
            .numpy()
        )
        labels = whole.labels.numpy()
        right = {"majority": [], "label_counts": []}
        for trial in range(self.folds):
            train, val, test = (ids.numpy() for ids in self.split(trial))
            rest = [*train, *val]
            usual = torch.bincount(whole.labels[rest]).argmax().item()
            right["majority"].append(float((labels[test] == usual).mean()))
            fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(counts[rest], labels[rest])
            right["label_counts"].append(float(fitted.score(counts[test], labels[test])))
        name = "cv_accuracy" if self.gin else "test_accuracy"
        rows = {f"{name}_{method}": values for method, values in right.items()}
        return {key: statistics.fmean(values) for key, values in rows.items()} | {
            f"{key}_std": statistics.stdev(values) for key, values in rows.items()
        }

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """predictions.csv: each graph (its place in the files, from 0) in the fold that held it out, by that fold's
        network.
        """
        trials = [trial for trial in sorted(self.said) if trial < self.folds]  # the first repetition
        graphs = torch.cat([self.split(trial)[2] for trial in trials])
        probability, predicted = torch.cat([self.said[trial] for trial in trials]).max(dim=1)
        columns = {
            "graph": graphs.numpy(),
            "fold": np.repeat(trials, [len(self.said[trial]) for trial in trials]),
            "label": self.whole.labels[graphs].numpy(),
            "predicted": predicted.numpy(),
            "probability": probability.numpy(),
        }
        write_table(folder / "predictions.csv", columns)

    # -- pictures and words --------------------------------------------------------------------------------------------

    def figures(self, model: nn.Module, folder: Path) -> None:
        """Accuracy of each fold, the readouts of all graphs coloured by class, and the errors on the first held-out
        fold.
        """
        from gnn.core import pictures

        graphs = self.graphs
        if self.tested:
            what = (
                "best common epoch of the held-out folds (optimistic)"
                if self.gin
                else "held-out fold, weights chosen without it"
            )
            usual = torch.bincount(self.whole.labels).max().item() / len(self.whole)
            draw_folds(folder / "folds.png", self.tested, usual, f"{self.whole.name}: {what}")
        hidden = model.hidden(graphs.batch(torch.arange(len(graphs), device=self.device)))
        # sums over nodes: else size is all one sees
        hidden = (hidden - hidden.mean(dim=0)) / hidden.std(dim=0).clamp(min=1e-6)
        pictures.draw_embedding(
            folder / "embedding.png", hidden, graphs.labels, f"readouts of all graphs of {graphs.name}, fold 0, t-SNE"
        )
        batch = graphs.batch(self.test_ids)
        pictures.draw_confusion(folder / "confusion.png", model(batch).argmax(dim=1), batch.labels, graphs.num_classes)

    def describe(self) -> list[str]:
        """Sizes, and what the figures will mean."""
        g = self.whole
        train, val, test = self.split(0)
        shares = torch.bincount(g.labels).tolist()
        return [
            f"{g.name}: {len(g):,} graphs, {len(g.features) / len(g):.1f} nodes and {len(g.indices) / 2 / len(g):.1f} "
            "edges each, "
            f"{g.features.shape[1]} features, classes of {', '.join(map(str, shares))} graphs",
            f"{self.folds}-fold cross-validation, protocol {self.config.graph.protocol}: {len(train)} training, "
            f"{len(val)} validation, {len(test)} held-out graphs in the first fold",
        ]


def check_protocol(config: Config) -> None:
    """`ConfigError` where protocol gin would find no common steps in the log."""
    if config.graph.protocol == "gin":
        train = config.train
        require(
            train.log_every == train.validate_every,
            "train.log_every",
            f"must equal train.validate_every={train.validate_every} when graph.protocol=gin: each fold's curve is "
            "read from the log",
        )
        require(
            train.steps % train.validate_every == 0,
            "train.steps",
            f"must be a multiple of train.validate_every={train.validate_every} when graph.protocol=gin, so that folds "
            "share epochs",
        )
        require(train.patience == 0, "train.patience", "must be 0 when graph.protocol=gin: every fold runs to the end")


def curves(folder: Path, steps: int) -> dict[int, dict[int, float]]:
    """Trial -> step within the trial -> accuracy on its held-out fold, from the run's log."""
    found: dict[int, dict[int, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        trial, step = divmod(line["step"] - 1, steps)
        if "val_accuracy" in line:
            found.setdefault(trial, {})[step + 1] = line["val_accuracy"]
    return found


def best_common_epoch(logged: dict[int, dict[int, float]], repetition: int, folds: int) -> dict[int, float]:
    """Each trial's accuracy at the step at which the mean over this repetition's folds is highest; the earliest of
    equals.

    Raises:
        ProjectError: the log has no step that all of the trials share.
    """
    trials = [t for t in sorted(logged) if t // folds == repetition]
    shared = set.intersection(*(set(logged[t]) for t in trials)) if trials else set()
    if not shared:
        raise ProjectError(
            "metrics.jsonl has no validation step that all folds share; protocol gin needs the log of the whole "
            "training"
        )
    best = max(sorted(shared), key=lambda step: math.fsum(logged[t][step] for t in trials))
    return {t: logged[t][best] for t in trials}


def draw_folds(path: Path, values: dict[int, float], usual: float, title: str) -> None:
    """A bar for each trial's accuracy, their mean, and the share of the most frequent class."""
    from gnn.core.pictures import COLOURS, INK, canvas

    trials = sorted(values)
    mean = statistics.fmean(values.values())
    low = max(0.0, min(0.4, usual, *values.values()) - 0.06)
    with canvas(path, 4.6) as figure:
        axes = figure.subplots()
        axes.bar(range(len(trials)), [values[t] for t in trials], color=COLOURS[4], width=0.75)
        axes.axhline(mean, color=COLOURS[0], linewidth=1.8, label=f"mean {mean:.1%}")
        axes.axhline(usual, color=INK, linewidth=1.2, linestyle="--", label=f"most frequent class {usual:.1%}")
        if len(trials) <= 20:
            axes.set_xticks(range(len(trials)), [str(t) for t in trials])
        # at the foot of the bar, where no line crosses them
        for place, t in enumerate(trials if len(trials) <= 12 else []):
            axes.text(place, low + 0.015, f"{values[t]:.1%}", ha="center", fontsize=9, color="black")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set(xlabel="fold", ylabel="accuracy", ylim=(low, 1.02), title=title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
