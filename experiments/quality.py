"""How good the heuristics are along one real run, of which the paper shows the accuracy only.

    python -m experiments.quality RUN_FOLDER [--out FILE.jsonl] [--png FILE.png]

RUN_FOLDER is that of a masked run of gse, rigl or set that kept many checkpoints, such as one made
with --config.checkpoints_kept=50 --config.checkpoint_every=39. At each of them the gradient G of
every possible connection is computed on the step's own batch, beside f and g of every heuristic:

  rank correlation   Spearman's, of |G| with the density that connections are drawn with, f g n_l
                     (f and g sum to 1; |S_l| is in proportion to n_l, the connections of layer l),
                     over the inactive connections of the network, and the mean of the layers'. A
                     constant density orders nothing: uniform has none (null, "–").
  recall             the share of the |P| inactive connections of the largest |G| that are in S
  gradient mass      the sum of the |P| largest |G| in S, over that of all that are inactive

S is drawn by the library's sampler, |P| is the plan's for the last rewire that drops any up to this
step; both numbers are means of a few draws. What is saved at the step of a rewire was rewired on
this very batch: its best connections are active already, so let checkpoint_every avoid that. For
recall |P| matters, which the cosine anneals: means over a whole run hang on its schedule, and those
over one part are had from its rows, `table([row for row in rows if row["rewires_follow"]])`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dst import hosts
from dst.errors import ConfigError
from dst.main import complain
from dst.methods.grow import by_dense_gradient
from dst.methods.heuristics import HEURISTICS, marginals_of
from dst.methods.plan import due, plan
from dst.methods.subset import drawing
from dst.state import SparseState, stream
from dst.training import checkpoint, figures, log
from dst.training.steps import Resident, classification, make_fetch, residents
from dst.training.train import Built, build
from dst.update import parallel
from experiments.recall import ByLayer, Marginals, caught, correlations, largest_gradients, mean
from experiments.runs import logged
from experiments.subset_size import HEURISTICS as NAMES
from experiments.subset_size import RATIOS
from experiments.tables import COLORS, markdown

DRAWS = 3  # of S, that are averaged
DRAW_STREAM = 4  # their randomness, beside the streams of `dst.update` and `dst.methods.heuristics`
METHODS = ("gse", "rigl", "set")  # whose plan says |P|


# ------------------------------------------------------------------------------------- a checkpoint
class Tools(NamedTuple):
    """The compiled programs, the same for every checkpoint."""

    look: Callable[[SparseState, Resident], tuple[ByLayer, dict[str, Marginals]]]  # |G|, f and g
    draw: dict[int, Callable[..., tuple]]  # of each |S| / |P|
    resident: Callable[[int], Resident]
    dropped: Callable[[int], tuple[int, int]]  # the event that tells |P| at a step, and |P|


def tools(config: ConfigDict, built: Built) -> Tools:
    """Raises: `ConfigError` if the run never rewires."""
    net, rule, devices = built.net, built.method, built.devices
    planned = plan(net, rule)
    rewires = np.flatnonzero(planned.grown)  # the last ones may be too small to drop any
    if not rewires.size:
        raise ConfigError(
            f"rewire_every must be below {rule.end}, the step of rewire_end_epoch, in a run to "
            f"measure, and drop a connection; it is {rule.every}."
        )

    def dropped(step: int) -> tuple[int, int]:
        event = min(int(planned.event(np.int32(step))), int(rewires[-1]))
        return event, int(planned.grown[event])

    return Tools(
        look=looking(config, built),
        draw={c: jax.jit(drawing(net, rule._replace(subset_ratio=float(c)))) for c in RATIOS},
        resident=residents(built.dataset, built.state.key, devices),
        dropped=dropped,
    )


def looking(config: ConfigDict, built: Built) -> Callable[[SparseState, Resident], tuple]:
    """`look(state, resident)`: |G| of all connections, (n,) a layer, and f, g of each heuristic."""
    net, devices = built.net, built.devices
    fetch = make_fetch(config, built.dataset, len(devices))
    dense = by_dense_gradient(net, classification)
    measures = {name: marginals_of(net, classification, HEURISTICS[name]) for name in NAMES}
    outside = [name for name in NAMES if HEURISTICS[name].on_host]

    def body(state: SparseState, resident: Resident, device: jax.Array):
        batch = fetch(state, resident, device)
        G = state.masks.split_by_layer(dense(state, batch))
        fg = {name: f(state, batch) for name, f in measures.items() if name not in outside}
        return {path: g.ravel() for path, g in G.items()}, fg

    program, index = parallel(body, (None, None, 0), devices), hosts.local_indices(devices)

    def look(state: SparseState, resident: Resident) -> tuple[ByLayer, dict[str, Marginals]]:
        G, fg = program(state, resident, index)
        return G, fg | {name: measures[name](state, None) for name in outside}

    return look


def rows_of(built: Built, use: Tools, state: SparseState) -> Iterator[dict[str, Any]]:
    """A row a heuristic. Raises: FloatingPointError for a gradient that is NaN or infinite."""
    step = int(state.step)
    event, k = use.dropped(step)
    G_on_device, fg = use.look(state, use.resident(step // built.per_epoch))
    G = {path: np.asarray(G_on_device[path]) for path in built.net.layers}
    inactive = {path: ~np.asarray(state.masks[path]).ravel() for path in G}
    flat, free = np.concatenate([*G.values()]), np.concatenate([*inactive.values()])
    if not np.isfinite(flat).all():
        raise FloatingPointError(f"a gradient is NaN or infinite at step {step}.")
    best = largest_gradients(flat, free, k)
    keys = [jax.random.fold_in(stream(state, DRAW_STREAM), n) for n in range(DRAWS)]
    for name in NAMES:
        network, layers = correlations(built.net, G, inactive, fg[name])
        recall, mass, size = [], [], []
        for c in RATIOS:
            S = [subset(built.net, use.draw[c], key, state, fg[name], event) for key in keys]
            each = [caught(flat, best, s) for s in S]
            recall.append(mean(r for r, _ in each))
            mass.append(mean(m for _, m in each))
            size.append(mean(float(len(s)) for s in S))
        yield {
            "step": step,
            "heuristic": name,
            "dropped": k,
            "inactive": int(free.sum()),
            "correlation": network,
            "layer_correlation": layers,
            "ratios": list(RATIOS),
            "recall": recall,
            "mass": mass,
            "subset": size,
        }


def subset(net, draw, key, state: SparseState, fg: Marginals, event: int) -> np.ndarray:
    """S of the whole network: flat positions."""
    S = jax.device_get(draw(key, state.masks, fg, np.int32(event)))
    starts = np.cumsum([0, *(layer.size for layer in net.layers.values())])
    return np.concatenate([s[:n] + i for (s, n), i in zip(S.values(), starts, strict=False)])


# -------------------------------------------------------------------------------------------- a run
def opened(folder: Path) -> tuple[dict[str, Any], list[dict], ConfigDict]:
    """Header, events and config of a run. Raises: `ConfigError` if it is none to measure."""
    try:
        header, events = log.read(folder / "metrics.jsonl")
        config = logged(log.headers(header, events)[-1])  # where its data are now
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"RUN_FOLDER must be the workdir of a run, with its metrics.jsonl, not {folder}."
        ) from error
    for field, allowed in (("execution", ("masked",)), ("method", METHODS)):
        if config[field] not in allowed:
            raise ConfigError(
                f"{field} must be {' or '.join(map(repr, allowed))} in a run to measure, not "
                f"{config[field]!r}."
            )
    return header, events, config


def measure(folder: str | Path) -> list[dict[str, Any]]:
    """A row for every checkpoint of the run and every heuristic, by step.

    Damaged checkpoints are said and left out. Raises: `ConfigError` if there is nothing to measure.
    """
    folder = Path(folder)
    header, events, config = opened(folder)
    manager = checkpoint.open_manager(folder, None)
    steps = sorted(manager.all_steps())
    if not steps:
        raise ConfigError(f"RUN_FOLDER must hold checkpoints; there are none in {folder}.")
    built = build(config, None)
    use, rows = tools(config, built), []
    said = {field: config[field] for field in ("dataset", "model", "method", "sparsity", "seed")}
    said["git_revision"] = header.get("git_revision")
    with log.progress(len(steps), 0, "checkpoint") as bar:
        for n, step in enumerate(steps, 1):
            found = checkpoint.restore_step(manager, step, built.state, config.to_dict())
            if found is None:
                log.say(f"The checkpoint of step {step} is damaged; left out.")
            else:
                when = phase(built, events, step)
                rows += [{**said, **row, **when} for row in rows_of(built, use, found[0])]
            bar.show(n)
    if late := sorted({row["step"] for row in rows if row["just_rewired"]}):
        log.say(
            f"{len(late)} of {len(steps)} checkpoints were saved right after a rewire on the same "
            "batch, when the best connections have just been grown."
        )
    return rows


def phase(built: Built, events: list[dict], step: int) -> dict[str, Any]:
    """Where in training a step is."""
    losses = [e["loss"] for e in events if e["event"] == "train" and e["step"] <= step]
    return {
        "epoch": step / built.per_epoch,
        "learning_rate": float(built.rate(step)),
        "training_loss": losses[-1] if losses else None,  # of the last whole epoch
        "rewires_follow": step < built.method.end,
        "just_rewired": due(built.method, step),
    }


# ----------------------------------------------------------------------------- what is made of rows
def by_heuristic(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each heuristic."""
    return {name: [row for row in rows if row["heuristic"] == name] for name in NAMES}


def table(rows: list[dict]) -> str:
    """Markdown: means over the checkpoints."""

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    first, *others = rows[0]["ratios"]
    head = ["heuristic", "rank correlation", "within layers"]
    head += [f"recall (gradient mass), S = {first:g} P", *(f"{c:g} P" for c in others)]
    body = []
    for name, own in by_heuristic(rows).items():
        ranks = (mean(row[f"{of}correlation"] for row in own) for of in ("", "layer_"))
        line = [name, *map(text, ranks)]
        for i in range(len(head) - len(line)):
            recall, mass = (text(mean(row[of][i] for row in own)) for of in ("recall", "mass"))
            line.append(f"{recall} ({mass})")
        body.append(line)
    return markdown(head, body)


def figure(rows: list[dict]) -> Any:
    """Matplotlib's: recall against |S| / |P| with its range over checkpoints; ranks over steps."""
    drawn = figures.figure(12, 4.5)
    left, right = drawn.subplots(1, 2)
    ratios = rows[0]["ratios"]
    for name, own in by_heuristic(rows).items():
        each = np.array([row["recall"] for row in own])
        left.plot(ratios, each.mean(0), label=name, color=COLORS[name], marker=".")
        left.fill_between(ratios, each.min(0), each.max(0), color=COLORS[name], alpha=0.15)
        steps = [row["step"] for row in own]
        for of, style, what in (("", ".-", "network"), ("layer_", ".--", "mean of the layers")):
            values = np.array([row[f"{of}correlation"] for row in own], float)  # None: NaN, a gap
            if not np.isnan(values).all():
                right.plot(steps, values, style, label=f"{name}, {what}", color=COLORS[name])
    left.set(xlabel="|S| / |P|", xticks=ratios, ylim=(0, None))
    left.set_title("share of the |P| largest gradients in S", loc="left", weight="bold")
    right.set(xlabel="step")
    right.set_title("rank correlation with |G|", loc="left", weight="bold")
    right.axhline(0, color="0.35", linewidth=1)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none", fontsize=9)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, draws, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, help="default: RUN_FOLDER/quality.jsonl")
    parser.add_argument("--png", type=Path, help="default: RUN_FOLDER/quality.png")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "quality.jsonl"
    png = options.png or options.run / "quality.png"
    try:
        for path in (out, png):
            if not path.parent.is_dir():
                raise ConfigError(f"{path} must be in a folder that exists.")
        rows = measure(options.run)
    except ConfigError as error:
        return complain(error, 2)
    except FloatingPointError as error:
        return complain(error, 1)
    out.write_text("".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))
    png.write_bytes(figures.png(figure(rows)))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
