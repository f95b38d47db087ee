"""--sam-schedule: one notation for the steps in which SAM is on."""

import pytest

from samtune.config import loading, sam_schedule
from samtune.config.duration import Duration
from samtune.errors import UsageError

BASE = {"model": "test_resnet", "dataset": "cifar10", "epochs": 8}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("always", {}),
        ("late 25%", {"sam_start": "75%"}),
        ("late 2", {"sam_start": "6 epochs"}),
        ("late 2.5 epochs", {"sam_start": "5.5 epochs"}),
        ("early 50%", {"sam_end": "50%"}),
        ("early 100 steps", {"sam_end": "100 steps"}),
        ("every 5", {"sam_every": 5}),
        ("late 25% every 2", {"sam_start": "75%", "sam_every": 2}),
        (" every 2,  late 25 % ", {"sam_start": "75%", "sam_every": 2}),
        ("late 60% early 60%", {"sam_start": "40%", "sam_end": "60%"}),
    ],
)
def test_a_schedule_is_short_for_the_three_settings(text, flags):
    config = loading.load(None, BASE | {"sam_schedule": text})
    assert config.model_dump() == loading.load(None, BASE | flags).model_dump()
    assert config.origins["sam_start"] == f"flag (sam_schedule {text})"


@pytest.mark.parametrize(
    "text", ["", "late", "25%", "late 25% late 50%", "every 0", "every 2.5", "every x", "sometimes", "always every 2"]
)
def test_what_is_no_schedule_is_refused_with_the_forms(text):
    with pytest.raises(UsageError, match="late 25% every 2"):
        loading.load(None, BASE | {"sam_schedule": text})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("late 100 steps", 'unit of the run\'s length, which is "8 epochs", or in %'),
        ("late 9 epochs", "at most the run's length"),
        ("late 101%", "at most the run's length"),
    ],
)
def test_a_late_part_is_counted_back_from_the_end(text, said):
    with pytest.raises(UsageError) as error:
        loading.load(None, BASE | {"sam_schedule": text})
    assert said in str(error.value)
    assert sam_schedule.parse("late 100 steps", Duration(500, "steps"))["sam_start"] == Duration(400, "steps")


def test_beside_one_of_the_three_it_is_refused_and_a_flag_goes_before_that_of_a_recipe(tmp_path):
    with pytest.raises(UsageError, match="--sam-schedule late 25% and --sam-every contradict"):
        loading.load(None, BASE | {"sam_schedule": "late 25%", "sam_every": 2})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('sam_schedule = "late 2 epochs every 3"\nepochs = 10\n')
    config = loading.load(recipe, BASE | {"sam_start": "10%"})
    assert (str(config.sam_start), config.sam_every) == ("10%", 3)
    assert str(loading.load(recipe, BASE).sam_start) == "6 epochs"  # of the flag's 8
    recipe.write_text('sam_every = 3\nsam_start = "10%"\n')
    config = loading.load(recipe, BASE | {"sam_schedule": "early 50%"})
    assert (str(config.sam_start), str(config.sam_end), config.sam_every) == ("0%", "50%", 1)


def test_a_schedule_is_known_before_the_length_of_the_run_is():
    assert loading.given_settings(None, {"sam_schedule": "late 100 steps", "output": "r"})["output"] == "r"


def test_a_resumed_run_may_have_another_one():
    before = loading.load(None, BASE | {"sam_schedule": "late 25%"})
    stored, origins = before.model_dump(mode="json"), before.origins
    assert loading.load_over(stored, origins, None, {})[0] == before
    now, _, changed = loading.load_over(stored, origins, None, {"sam_schedule": "late 4 epochs"})
    assert str(now.sam_start) == "4 epochs"
    assert changed == {"sam_start"}
