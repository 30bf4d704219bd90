"""Runs of experiments: one config is one folder, and every experiment expands to valid runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.errors import ConfigError
from dst.methods.distributions import active_count
from dst.methods.schedules import events
from dst.methods.table import METHODS
from dst.training.log import headers, read
from experiments import layer_sparsity, memory, subset_size, sweep, table1, width
from experiments.cost import network_of
from experiments.runs import OPERATIONAL, Run, finished, folder_of, identity, logged, override
from experiments.scales import BASES, SCALES, run_of

DIGITS = "configs/digits_mlp.py"
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "runs"
EXPERIMENTS = [module.EXPERIMENT for module in (table1, subset_size, width, layer_sparsity, memory)]
# Values that differ from the defaults, and where a field matters.
FIELDS = {
    "sparsity": 0.5,
    "learning_rate": 0.01,
    "hidden": (7,),
    "epochs": 50,
    "subset_ratio": 3.0,
    "heuristic": "uniform",
    "rewire_every": 7,
    "init_gain": 1.0,
    "l1": 1e-5,
}


def expanded(experiment, *arguments):
    """The runs that a command line stands for."""
    return sweep.expand(experiment, sweep.parse(experiment, list(arguments)))


@settings(deadline=None)
@given(st.sampled_from([*METHODS]), st.lists(st.sampled_from(sorted(FIELDS)), unique=True))
def test_the_order_and_the_way_of_asking_do_not_matter(method, fields):
    """Overrides in any order, defaults said or not, 1 or 1.0, where the data lie: one folder."""
    some = [("method", method), *((f, FIELDS[f]) for f in fields if method != "granet")]
    run = Run(DIGITS, tuple(some), 3)
    said = [("momentum", 0.9), ("weight_decay", 2e-3), *reversed(some), ("data_dir", "/elsewhere")]
    said += [("checkpoint_every", 7), ("eval_every", 2)]
    assert Run(DIGITS, tuple(said), 3).folder == run.folder
    assert Run(DIGITS, tuple(some), 4).folder == run.folder.replace("seed3", "seed4")
    assert folder_of(logged({"config": run.config().to_dict()})) == run.folder


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_every_field_that_matters_changes_the_folder(field):
    """And None, which stands for the method's own value, is that value."""
    plain = Run(DIGITS, (("method", "gse"),), 0)
    assert Run(DIGITS, ((field, FIELDS[field]),), 0).folder != plain.folder
    own = Run(DIGITS, (("heuristic", "grabo"), ("subset_ratio", 10), ("sampling_rounds", None)), 0)
    assert own.folder == plain.folder


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("set", "heuristic", "uniform"),
        ("rigl", "subset_ratio", 3.0),
        ("random", "rewire_every", 7),
        ("dense", "sparsity", 0.5),
        ("gse", "score_batches", 3),
        ("snip", "grasp_temperature", 3.0),
        ("snip", "synflow_rounds", 3),
        ("pruning", "lottery_levels", (0.0, 0.2)),
        ("gse", "width", 2.0),
    ],
)
def test_what_a_run_never_reads_does_not_change_its_folder(method, field, value):
    """An MLP has no width factor, SET no heuristic."""
    one, two = (Run(DIGITS, (("method", method), *more), 0) for more in ((), ((field, value),)))
    assert one.folder == two.folder


def test_the_identity_holds_nothing_operational():
    """Nor the seed, which stands at the folder's end."""
    config = Run(DIGITS, (), 5).config()
    assert not {"seed", *OPERATIONAL} & identity(config).keys()


@pytest.mark.parametrize(
    ("experiment", "count"),
    # Table 1: 10 methods at 3 sparsities and dense. Figure 2: 18 points and 2 lines.
    [(table1, 31 * 4), (subset_size, 20 * 4), (width, 7 * 2), (layer_sparsity, 8 * 3 * 4)],
)
def test_the_paper_scale_is_the_papers(experiment, count, monkeypatch):
    """As many runs a seed as the paper made, all with its schedule, each folder once."""
    # Networks are counted below; here it is enough that wider ones have more connections.
    monkeypatch.setattr(width, "possible", lambda run: 1000 * run.config().width ** 2)
    runs = expanded(experiment.EXPERIMENT, "--scale=paper", "--seeds", "7")
    assert len(runs) == count
    assert Counter(run.folder for run in runs).most_common(1)[0][1] == 1
    configs = [run.config() for run in runs]
    assert {c.epochs for c in configs} == {200} and {c.seed for c in configs} == {7}


@pytest.mark.parametrize("base", BASES.values())
@pytest.mark.parametrize("scale", ["short", "smoke"])
def test_a_shorter_schedule_has_the_same_shape(base, scale):
    """The same number of rewires, the same learning rate at the same part of the run."""
    setting = next(s for s, path in BASES.items() if path == base)
    if (scale == "smoke") != (setting[0] == "digits"):
        return
    per_epoch = 44 if setting[0] == "digits" else 390
    long, short = (run_of(s, setting, 0).config() for s in ("paper", scale))
    divisor = SCALES[scale].divisor
    assert long.epochs == divisor * short.epochs
    rewires = [
        len(list(events(c.rewire_every, round(c.rewire_end_epoch * per_epoch))))
        for c in (long, short)
    ]
    assert rewires[0] == rewires[1]
    for a, b in zip(long.lr_drop_epochs, short.lr_drop_epochs, strict=True):
        assert a / long.epochs == pytest.approx(b / short.epochs)


@pytest.mark.parametrize(
    ("setting", "widths"),
    [("cifar100/vgg", ()), ("cifar100/resnet", ("--widths", "1", "1.5", "4"))],
)
def test_every_width_has_the_connections_of_width_one(setting, widths):
    """K = |W(1.0)| to the connection."""
    arguments = ["--scale=short", "--settings", setting, "--seeds", "0", *widths]
    dense, *wide = expanded(width.EXPERIMENT, *arguments)
    K = width.possible(dense)
    assert len(wide) == (len(widths) - 2 if widths else 6) and dense.config().method == "dense"
    assert K == network_of("cifar100", setting.split("/")[1], 56, 1.0, (1024, 1024)).possible
    for run in wide:
        assert active_count(width.possible(run), run.config().sparsity) == K


def test_figure_4_and_table_1_share_their_runs():
    """Nothing is run twice: Figure 4's runs are Table 1's, its SET and RigL lines Figure 2's."""
    folders = {
        e.name: {
            run.folder
            for run in expanded(e, "--scale=short", "--sparsities", "0.98", "--seeds", "0")
        }
        for e in EXPERIMENTS[:2] + EXPERIMENTS[3:4]
    }
    assert folders["layer_sparsity"] < folders["table1"]
    assert len(folders["subset_size"] & folders["table1"]) == 3 * 4  # and GraBo at 10


def test_committed_logs_are_finished_and_in_their_own_folder():
    """What the tables are made of."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    assert folders
    for folder in folders:
        header, lines = read(folder / "metrics.jsonl")
        assert folder_of(logged(header)) == folder.name
        assert lines[-1]["event"] == "end", folder
        assert lines[-1]["active"].keys() == lines[-1]["possible"].keys()
        for part in headers(header, lines):
            assert part["versions"]["jax"] and part["git_revision"]
            assert not part["git_revision"].endswith("+dirty"), folder


def test_a_log_in_another_runs_folder_is_refused(tmp_path):
    """A table must not show a number of another config."""
    log = next(RESULTS.glob("*gse*seed0/metrics.jsonl"))
    run = Run("configs/cifar100_vgg16.py", (("method", "set"),), 0)
    (tmp_path / run.folder).mkdir()
    (tmp_path / run.folder / "metrics.jsonl").write_bytes(log.read_bytes())
    with pytest.raises(ConfigError, match="must be the log of cifar100-vgg_dropout-set"):
        finished(run, tmp_path)


@pytest.mark.parametrize(
    ("argument", "pair"),
    [
        ("--config.learning_rate=0.05", ("learning_rate", 0.05)),
        ("--config.hidden=(8,8)", ("hidden", (8, 8))),
        ("--config.data_dir=/tmp/x", ("data_dir", "/tmp/x")),
    ],
)
def test_one_more_thing(argument, pair):
    """A field and its value, of the right type."""
    assert override(argument) == pair


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scale=long"], "argument --scale: invalid choice: 'long'"),
        (["--settings", "cifar/vgg"], "must be one of cifar10/resnet, cifar10/vgg"),
        (["--config.learning_rat=1"], 'did you mean "learning_rate"'),
        (["--config.sparsity=2"], r"sparsity must be a number in \[0, 1\), not 2"),
        (["--sparsities", "1.5"], r"sparsity must be a number in \[0, 1\), not 1.5"),
        (["--methods", "adam"], "argument --methods: invalid choice: 'adam'"),
        (["cifar"], "nothing but the options of --help and --config.FIELD=VALUE, not 'cifar'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys, tmp_path):
    """Exit code 2, before anything is run."""
    line = ["--sparsities", "0.5", "0.9", "--scale=smoke", f"--out={tmp_path / 'new'}", *arguments]
    assert sweep.main(table1.EXPERIMENT, line) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
