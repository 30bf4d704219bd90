"""What is measured on a GPU can be measured: tiny, on the CPU."""

import pytest

from experiments.benchmarks import gpu


def test_all_of_a_model_is_measured_in_both_precisions():
    cases = [*gpu.cases(["mlp4096"], small=True)]
    assert len(cases) == len({*cases}) == 2 * len((*gpu.DST, *gpu.TORCH))


@pytest.mark.parametrize("variant", gpu.DST)
def test_a_case_tells_steps_a_second(variant):
    told = gpu.measured(gpu.Case("mlp4096", variant, small=True), 0.01)
    assert told["steps_a_second"] > 0 and told["first_seconds"] > 0


def test_no_rounds_are_refused(capsys):
    """They would end in an IndexError, after minutes."""
    with pytest.raises(SystemExit):
        gpu.main(["--rounds", "0"])
    assert "--rounds must be at least 1, not 0." in capsys.readouterr().err
