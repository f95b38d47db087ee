"""Settings state of themselves what they affect; resume and sweeps follow from it."""

from typing import get_args

import pytest
from pydantic import ValidationError

from samtune.cli.config_flags import DATA_KEYS
from samtune.config.run_config import Affects, RunConfig
from samtune.runs.resume import RUNTIME_ONLY
from samtune.sweep import plan, spec


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_every_setting_states_what_it_affects(key):
    about = RunConfig.metadata(key)
    assert about["affects"] in get_args(Affects)
    assert not (about["fixed"] and about["affects"] == "nothing")  # what affects nothing may always change


def test_a_setting_that_does_not_state_it_is_an_error():
    class WithOneMore(RunConfig):
        one_more: int = 1

    with pytest.raises(TypeError):
        WithOneMore.settings(affects="rows")


@pytest.mark.parametrize(
    ("key", "affects", "fixed"),
    [
        ("dataset", "rows", False),  # its folder may have moved
        ("val_split", "rows", True),
        ("img_size", "images", True),
        ("scale", "images", False),
        ("rho", "update", False),
        ("label_noise", "update", True),
        ("m", "results", False),
        ("seed", "results", True),
        ("workers", "nothing", False),
    ],
)
def test_resume_and_sweeps_follow_from_what_a_setting_affects(key, affects, fixed):
    assert key in RunConfig.settings(affects=affects, fixed=fixed)
    assert (key in RUNTIME_ONLY) == (affects == "nothing")
    assert (key in plan._step_settings({key: 1})) == (affects != "update")
    if affects == "rows":
        with pytest.raises(ValidationError, match=f"{key} cannot vary: the errors would be of different images"):
            spec.SweepSpec.model_validate({"grid": {key: [1, 2]}})


def test_the_settings_that_tell_how_a_data_set_is_read_affect_its_rows():
    assert set(DATA_KEYS) < RunConfig.settings(affects="rows")
