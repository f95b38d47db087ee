"""What a sweep found, in sentences. Nothing here claims more than the intervals allow."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from samtune.report.compare import cost_words, difference_lines, interval_words, pairs_words, signed

_Report = Mapping[str, Any]


def verdict(report: _Report) -> list[str]:
    """A sentence or two: does SAM help, as far as this sweep can tell?

    It is about the arm `sam` (else sam-late) alone: the arm that did best on test would be chosen by test. Its baseline
    is the better plain arm, as in the paper.
    """
    mine = next((arm for arm in ("sam", "sam-late") if arm in report["asked"]["arms"]), None)
    if mine is None:
        return ["No arm of this sweep has SAM, so that it says nothing of it."]
    better = {entry["budget"]: entry["arm"] for entry in report["baselines"]}
    plain = max((len(entry["mean_errors"]) for entry in report["baselines"]), default=1)
    pairs = [
        pair
        for pair in report["comparisons"]
        if pair["label"] == mine and pair["baseline"] == better.get(pair["budget"])
    ]
    if not pairs:
        return ["Nothing can be said of SAM yet: not both sides of any comparison have a last fit that is done."]
    tests = _tests(report)
    largest = pairs if report["asked"]["budgets"] == [None] else _largest(pairs)
    said = [words for pair in largest for words in (_conclusion(pair, plain), *_among(pair, tests))]
    if _left(report):
        said[0] = f"So far: {said[0]}"
    if report["asked"]["budgets"] == [None]:
        said.append(_price(pairs[0]))
    return said + [pays_words(entry) for entry in report["pays"] if entry["arm"] == mine]


def _tests(report: _Report) -> int:
    return sum(pair["difference"]["p"] is not None for pair in report["comparisons"])


def _among(pair: _Report, tests: int) -> list[str]:
    """That a small p may be the smallest of many."""
    p = pair["difference"]["p"]
    if p is None or tests < 2 or not 0.05 / tests <= p < 0.05:
        return []
    limit = 0.05 / tests
    return [
        f"That is one of {tests} comparisons: for all together, p would have to be below {limit:.2g}, and is {p:.2g}."
    ]


def _price(pair: _Report) -> str:
    known = {key: both["ratio"] for key, both in pair["cost"].items() if both["ratio"] and key in ("passes", "seconds")}
    ratios = " and ".join(f"{ratio:.2f} times the {key}" for key, ratio in known.items())
    return f"A run of {pair['label']} took {ratios or 'an unknown cost'} of one of {pair['baseline']}."


def _largest(pairs: Sequence[_Report]) -> list[_Report]:
    """The pair of the largest budget of each unit."""
    found: dict[str, list[_Report]] = {}
    for pair in pairs:
        found.setdefault(pair["budget"].partition(" ")[2], []).append(pair)
    return [max(among, key=lambda pair: float(pair["budget"].partition(" ")[0])) for among in found.values()]


def _conclusion(pair: _Report, plain: int) -> str:
    """plain: how many plain arms there are, of which the baseline did best on test: against SAM, that is luck, too."""
    found, mine, other = pair["difference"], pair["label"], pair["baseline"]
    a, b = found["of_means"]
    amount = f"{abs(found['mean']):.2f} percentage points {'less' if a < b else 'more'} test error than {other}"
    if a == b:
        amount = f"the same mean test error as {other}"
    means = f"{a:.2f} against {b:.2f} %"
    at = f" at {pair['budget']}" if pair["budget"] else ""
    if found["ci95"] is None:
        return (
            f"Whether {mine} differs from {other}{at} cannot be concluded: {mine} had {amount} ({means}), but there is "
            f"no interval; {found['no_interval']}."
        )
    about = f"{means}; 95 % interval of the difference {signed(found['ci95'])}; {pairs_words(found)}"
    low, high = found["ci95"]
    if low <= 0 <= high:
        return (
            f"No difference between {mine} and {other}{at} is shown: {mine} had {amount} ({about}), and the interval "
            "includes zero."
        )
    if low > 0 and found["p"] * plain >= 0.05:
        return (
            f"No difference between {mine} and {other}{at} is shown: {mine} had {amount} ({about}), but {other} is the "
            f"better of {plain} plain arms on test: p would have to be below {0.05 / plain:.2g}, and is "
            f"{found['p']:.2g}."
        )
    verb = "lowered" if high < 0 else "raised"
    return f"SAM {verb} the error{at}: {mine} had {amount} ({about}), and the interval excludes zero."


def pays_words(entry: _Report) -> str:
    """From which budget on an arm has less error than sgd, and how surely."""
    tried, first, sure, arm = entry["tried"], entry["from"], entry["sure_from"], entry["arm"]
    over = f"Over {len(tried)} budgets, {tried[0]} to {tried[-1]}"
    if first is None:
        return f"{over}, there is none from which on the mean error of {arm} is below that of sgd."
    start = "at all of them" if first == tried[0] else f"from {first} on"
    how = "its interval excludes zero there, too"
    if sure is None:
        how = "the interval of the difference excludes zero at none from which on it does: this may be chance"
    elif sure != first:
        how = f"the interval of the difference excludes zero from {sure} on"
    return f"{over}, the mean error of {arm} is below that of sgd {start}; {how}."


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings(report: _Report) -> list[str]:
    """What a reader must not overlook."""
    return [*_progress_warnings(report), *_choice_warnings(report), *_run_warnings(report)]


def _progress_warnings(report: _Report) -> Iterator[str]:
    progress = report["progress"]
    left = _left(report)
    if left:
        failed = f" ({len(progress['failed'])} failed)" if progress["failed"] else ""
        yield (
            f"This sweep is not complete: of {progress['runs']} runs, {left} are left{failed}. What follows may "
            "change; the same command goes on with it."
        )
    for choice in _hopeless(report):
        yield f"{where(choice)}: no point trained, as every loss was not finite; it has no last fits."
    for entry in report["final"]:
        if entry["unscored_seeds"]:
            yield f"{where(entry)}: the last fits were scored on nothing, as the data set has no test images."
        if entry["lost_seeds"]:
            failed = f"{where(entry)}: last fits failed (seed {listed(entry['lost_seeds'])})"
            yield failed + (
                ", so that its mean is of the others. Where they failed by the settings, that makes this arm look "
                "better than it is."
                if entry["n"]
                else ", and so it has no mean yet."
            )


def _left(report: _Report) -> int:
    """How many runs are still to come."""
    progress = report["progress"]
    never = len(_hopeless(report)) * len(report["asked"]["seeds"])
    return max(0, int(progress["runs"] - progress["done"]) - len(progress["diverged"]) - never)


def _hopeless(report: _Report) -> list[_Report]:
    """Arms whose points have all diverged."""
    return [choice for choice in report["choices"] if choice["points"] and choice["diverged"] == choice["points"]]


def _choice_warnings(report: _Report) -> Iterator[str]:
    ends: dict[str, list[str]] = {}
    for choice in report["choices"]:
        for end in choice["at_end"]:
            what = f"{choice['arm']}: the chosen {end['setting']} {end['value']} is at the {end['end']} end of the grid"
            ends.setdefault(what, []).append(choice["budget"])
    for what, budgets in ends.items():
        yield f"{what}{f' at {listed(budgets)}' if budgets != [None] else ''}; a better one may lie beyond."
    unsure = [choice for choice in report["choices"] if choice["uncertain"]]
    made = sum(choice["uncertain"] is not None for choice in report["choices"])
    if unsure:
        which = f"{len(unsure)} of {made} choices ({listed([where(choice) for choice in unsure])})"
        if len(unsure) == made:
            which = {1: "the choice", 2: "both choices"}.get(made, f"all {made} choices")
        yield (
            f"The validation images are too few to be sure of {which}: the next best point lies within Wilson's "
            "interval of the chosen one."
        )


def choice_words(choice: _Report) -> str | None:
    """What was chosen for an arm, and how surely; None where there is nothing to choose, or nothing is chosen yet."""
    second = choice["next"]
    if choice["mean_error"] is None:
        return None
    said = (
        f"{where(choice)}: chosen is {choice['label']}, with {choice['mean_error']:.2f} % error on {choice['images']} "
        f"validation images (Wilson's interval {interval_words(choice['wilson_ci95'])})"
    )
    if second is None:
        return f"{said}; no other point came to an end."
    tie = {"loss": "; the lower loss decided", "order": "; the first of the grid was taken"}.get(choice["by"], "")
    return f"{said}; the next best, {second['label']}, has {second['mean_error']:.2f} %{tie}."


def _run_warnings(report: _Report) -> Iterator[str]:
    made = report["made_of"]
    if made is None:
        return
    finals = sum(entry["n"] for entry in report["final"])
    first_of_kind = {run: _each_kind(said) for run, said in made["warnings"].items()}
    texts = Counter(text for own in first_of_kind.values() for text in own)
    of_all = [text for text, count in texts.items() if count == finals]
    yield from (f"All last fits: {text}" for text in of_all)
    own = {run: [text for text in said if text not in of_all] for run, said in first_of_kind.items()}
    first = next(((run, said[0]) for run, said in own.items() if said), None)
    if first:
        count = sum(map(bool, own.values()))
        yield f"{count} of {finals} last fits have warnings in their reports; the first is of {first[0]}: {first[1]}"
    several = [package for package, versions in made["versions"].items() if len(versions) > 1]
    if several:
        yield f"The runs were not made with the same version of {listed(several)}."
    if len(made["machines"]) > 1 or len(made["devices"]) > 1:
        yield "The runs were not made on the same kind of machine or device, so that their seconds do not compare."


def _each_kind(warnings: Sequence[str]) -> list[str]:
    """Of warnings that differ in the epoch alone, the first."""
    kinds: dict[str, str] = {}
    for text in warnings:
        kinds.setdefault(re.sub(r"^epoch \d+: ", "", text), text)
    return list(kinds.values())


def where(entry: _Report) -> str:
    """An arm, with its budget."""
    return f"{entry['arm']} at {entry['budget']}" if entry["budget"] else str(entry["arm"])


def listed(values: Sequence[object]) -> str:
    """Values, one after the other."""
    return ", ".join(map(str, values))


# --------------------------------------------------------------------------------------------------------------- prose


def pair_lines(pair: _Report) -> list[str]:
    """A comparison in sentences: what was found, at what cost, and what it does not say."""
    return [*difference_lines(pair), cost_words(pair["cost"]), *pair["limits"]]


def pair_title(pair: _Report) -> str:
    """Which arms a comparison is of, and at which budget."""
    return f"{pair['label']} against {pair['baseline']}" + (f", {pair['budget']}" if pair["budget"] else "")


def notes(report: _Report) -> list[str]:
    """How the numbers are to be read."""
    said = [
        "an interval of a mean, or of a difference of means, is Student's over seeds, at 95 %, on these test images: "
        "where that of very many seeds may lie, if errors of seeds are normally distributed; from few seeds it may "
        "reach below 0 or above 100",
    ]
    tests = _tests(report)
    if tests > 1:
        said.append(
            f"each interval and each p is of one comparison alone; for all {tests} together, look for p < "
            f"{0.05 / tests:.2g} (Bonferroni)"
        )
    if any(pair["mcnemar"] for pair in report["comparisons"]):
        said.append(
            "McNemar's exact test tells, for one seed, whether the two models differ on these images. The seeds share "
            "the images, so that their counts must not be added up to one test"
        )
    for entry in report["baselines"]:
        means = entry["mean_errors"]
        if len(means) > 1:
            both = " and ".join(f"{arm} {mean:.2f} %" for arm, mean in means.items())
            said.append(
                f"the better plain arm is {where(entry)} ({both}); as in the paper, it is chosen by its error on test, "
                "which favours the baseline"
            )
    searched = {where(choice): choice["points"] for choice in report["choices"]}
    if len(set(searched.values())) > 1:
        tried = ", ".join(f"{arm} {max(1, points)}" for arm, points in searched.items())
        took = sum(point["passes"] * len(point["seeds"]) for point in report["selection"] if point["passes"])
        said.append(
            f"settings tried before the choice: {tried}. What that took ({took:.0f} passes) is in no cost of a run"
        )
    if not report["pays"]:
        said.append("where SAM begins to pay cannot be told from one length of training: several budgets show it")
    if report["selection"]:
        said.append("the validation error of a chosen point is too low, as it was chosen by it; test was scored once")
    return said
