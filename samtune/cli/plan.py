"""`samtune plan`: what a run will do and cost, before it starts."""

from typing import Any

from samtune.cli.arguments import Recipe
from samtune.cli.config_flags import with_config_flags
from samtune.cli.help import Json
from samtune.distributed import signals


@with_config_flags
def plan(recipe: Recipe = None, *, as_json: Json = False, flags: dict[str, Any]) -> None:
    """Tell what a run will do and take before it does: steps, memory, time, disk, and the cost of SAM.

    Example: samtune plan --model tf_efficientnet_lite0 --dataset mnist5k --img-size 64 --epochs 2 --rho 0.05

    Takes the recipe and the flags of `samtune run`. A few real steps with and without SAM, an evaluation and a
    checkpoint are measured on the device that is there; of the images a few are decoded. Nothing is kept: no run
    folder, no decoded images, no weights.
    """
    from samtune.config import loading, shipped_recipes

    recipe = recipe and shipped_recipes.find(recipe)
    settings = loading.load(recipe, flags)

    from samtune.train.preflight import check_before_slow_work

    with signals.listening():
        check_before_slow_work(settings, None)

        from samtune import console
        from samtune.plan.plan import plan as make_plan
        from samtune.plan.tables import tables

        result = make_plan(settings)
        if as_json:
            console.print_json(result)
            return
        for title, rows in tables(result).items():
            console.print_table(title, rows)
        for warning in result["warnings"]:
            console.warn(warning)
