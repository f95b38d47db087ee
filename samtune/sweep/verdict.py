"""The sentences of a sweep's report: verdict, warnings, choices and notes. They claim no more than intervals allow."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from samtune.report.comparison import Report, count_seeds, format_interval
from samtune.sweep.budget import Budget


def verdict(report: Report) -> list[str]:
    """One or two sentences: does SAM help, as far as this sweep can tell?

    They are about the arm `sam` (else sam-late): taking the arm with the least test error would choose by test. Its
    baseline is the better plain arm, as in the paper.
    """
    arm = next((arm for arm in ("sam", "sam-late") if arm in report["asked"]["arms"]), None)
    if arm is None:
        return ["No arm of this sweep has SAM, so that it says nothing of it."]
    baselines = {entry["budget"]: entry["arm"] for entry in report["baselines"]}
    plain_arms = max((len(entry["mean_errors"]) for entry in report["baselines"]), default=1)
    pairs = [pair for pair in report["comparisons"] if pair["label"] == arm]
    pairs = [pair for pair in pairs if pair["baseline"] == baselines.get(pair["budget"])]
    if not pairs:
        return ["Nothing can be said of SAM yet: not both sides of any comparison have a final run that is done."]
    has_budgets = report["asked"]["budgets"] != [None]
    sentences = []
    for pair in _largest_budgets(pairs) if has_budgets else pairs:
        sentences += [_conclusion(pair, plain_arms), *_multiple_tests(pair, _count_tests(report))]
    if _count_left(report):
        sentences[0] = f"So far: {sentences[0]}"
    if not has_budgets:
        sentences.append(_cost(pairs[0]))
    return sentences + [break_even_line(entry) for entry in report["pays"] if entry["arm"] == arm]


def _conclusion(pair: Report, plain_arms: int) -> str:
    """plain_arms: number of plain arms; the baseline had the least test error of them, which is luck in part."""
    difference, arm, baseline = pair["difference"], pair["label"], pair["baseline"]
    error, baseline_error = difference["of_means"]
    at = f" at {pair['budget']}" if pair["budget"] else ""
    amount, more = abs(difference["mean"]), "less" if error < baseline_error else "more"
    had = f"{arm} had {amount:.2f} percentage points {more} test error than {baseline}"
    if error == baseline_error:
        had = f"{arm} had the same mean test error as {baseline}"
    numbers = f"{error:.2f} against {baseline_error:.2f} %"
    if difference["ci95"] is None:
        return (
            f"Whether {arm} differs from {baseline}{at} cannot be concluded: {had} ({numbers}), but there is no "
            f"interval; {difference['no_interval']}."
        )
    (low, high), p = difference["ci95"], difference["p"]
    numbers += f"; 95 % interval of the difference {format_interval((low, high), '+.2f')}; {count_seeds(difference)}"
    claim, reason = f"No difference between {arm} and {baseline}{at} is shown", "and the interval includes zero"
    if low > 0 and p * plain_arms >= 0.05:
        reason = f"but {baseline} is the better of {plain_arms} plain arms on test: {_p_above(0.05 / plain_arms, p)}"
    elif not low <= 0 <= high:
        claim = f"SAM {'lowered' if high < 0 else 'raised'} the error{at}"
        reason = "and the interval excludes zero"
    return f"{claim}: {had} ({numbers}), {reason}."


def _p_above(limit: float, p: float) -> str:
    return f"p would have to be below {limit:.2g}, and is {p:.2g}"


def _count_tests(report: Report) -> int:
    return sum(pair["difference"]["p"] is not None for pair in report["comparisons"])


def _multiple_tests(pair: Report, tests: int) -> list[str]:
    """The warning that a small p may be the smallest of many."""
    p = pair["difference"]["p"]
    if p is None or tests < 2 or not 0.05 / tests <= p < 0.05:
        return []
    return [f"That is one of {tests} comparisons: for all together, {_p_above(0.05 / tests, p)}."]


def _cost(pair: Report) -> str:
    ratios = {key: pair["cost"][key]["ratio"] for key in ("passes", "seconds")}
    times = " and ".join(f"{ratio:.2f} times the {key}" for key, ratio in ratios.items() if ratio)
    return f"A run of {pair['label']} took {times or 'an unknown cost'} of one of {pair['baseline']}."


def _largest_budgets(pairs: Sequence[Report]) -> list[Report]:
    """The pair with the largest budget of each unit."""
    largest: dict[str, tuple[float, Report]] = {}
    for budget, pair in ((Budget.parse(pair["budget"]), pair) for pair in pairs):
        if budget.unit not in largest or budget.amount > largest[budget.unit][0]:
            largest[budget.unit] = budget.amount, pair
    return [pair for _, pair in largest.values()]


def break_even_line(entry: Report) -> str:
    """From which budget on an arm has less error than sgd, and from which on its interval excludes zero."""
    tried, first, sure, arm = entry["tried"], entry["from"], entry["sure_from"], entry["arm"]
    over = f"Over {len(tried)} budgets, {tried[0]} to {tried[-1]}"
    if first is None:
        return f"{over}, there is none from which on the mean error of {arm} is below that of sgd."
    start = "at all of them" if first == tried[0] else f"from {first} on"
    certainty = "its interval excludes zero there, too"
    if sure is None:
        certainty = "the interval of the difference excludes zero at none from which on it does: this may be chance"
    elif sure != first:
        certainty = f"the interval of the difference excludes zero from {sure} on"
    return f"{over}, the mean error of {arm} is below that of sgd {start}; {certainty}."


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings(report: Report) -> list[str]:
    """Warnings about unfinished, uncertain and unequal parts of a sweep."""
    return [*_progress_warnings(report), *_choice_warnings(report), *_run_warnings(report)]


def _progress_warnings(report: Report) -> Iterator[str]:
    progress, left = report["progress"], _count_left(report)
    if left:
        failed = f" ({len(progress['failed'])} failed)" if progress["failed"] else ""
        yield (
            f"This sweep is not complete: of {progress['runs']} runs, {left} are left{failed}. What follows may "
            "change; the same command continues it."
        )
    for choice in _diverged_arms(report):
        yield f"{arm_name(choice)}: no point trained, as every loss was not finite; it has no final runs."
    for entry in report["final"]:
        if entry["unscored_seeds"]:
            yield f"{arm_name(entry)}: the final runs were scored on nothing, as the data set has no test images."
        if entry["lost_seeds"]:
            bias = ", and so it has no mean yet."
            if entry["n"]:
                bias = (
                    ", so that its mean is of the others. Where they failed by the settings, that makes this arm look "
                    "better than it is."
                )
            yield f"{arm_name(entry)}: final runs failed (seed {join(entry['lost_seeds'])}){bias}"


def _count_left(report: Report) -> int:
    """Number of runs that have still to be done."""
    progress = report["progress"]
    never = len(_diverged_arms(report)) * len(report["asked"]["seeds"])
    return max(0, int(progress["runs"] - progress["done"]) - len(progress["diverged"]) - never)


def _diverged_arms(report: Report) -> list[Report]:
    """Choices of arms whose points have all diverged."""
    return [choice for choice in report["choices"] if choice["points"] and choice["diverged"] == choice["points"]]


def _choice_warnings(report: Report) -> Iterator[str]:
    budgets_by_end: dict[str, list[str]] = {}
    for choice in report["choices"]:
        for end in choice["at_end"]:
            text = f"{choice['arm']}: the chosen {end['setting']} {end['value']} is at the {end['end']} end of the grid"
            budgets_by_end.setdefault(text, []).append(choice["budget"])
    for text, budgets in budgets_by_end.items():
        yield f"{text}{f' at {join(budgets)}' if budgets != [None] else ''}; a better one may lie beyond."
    uncertain = [choice for choice in report["choices"] if choice["uncertain"]]
    made = sum(choice["uncertain"] is not None for choice in report["choices"])
    if uncertain:
        which = f"{len(uncertain)} of {made} choices ({join(map(arm_name, uncertain))})"
        if len(uncertain) == made:
            which = {1: "the choice", 2: "both choices"}.get(made, f"all {made} choices")
        yield (
            f"The validation images are too few to be sure of {which}: the next best point lies within Wilson's "
            "interval of the chosen one."
        )


def _run_warnings(report: Report) -> Iterator[str]:
    if (made_of := report["made_of"]) is None:
        return
    finals = sum(entry["n"] for entry in report["final"])
    by_run = {run: _first_of_each_kind(texts) for run, texts in made_of["warnings"].items()}
    counts = Counter(text for texts in by_run.values() for text in texts)
    common = [text for text, count in counts.items() if count == finals]
    yield from (f"All final runs: {text}" for text in common)
    others = {run: first for run, texts in by_run.items() if (first := next((t for t in texts if t not in common), ""))}
    for run, text in list(others.items())[:1]:
        yield f"{len(others)} of {finals} final runs have warnings in their reports; the first is of {run}: {text}"
    several = [package for package, versions in made_of["versions"].items() if len(versions) > 1]
    if several:
        yield f"The runs were not made with the same version of {join(several)}."
    if len(made_of["machines"]) > 1 or len(made_of["devices"]) > 1:
        yield "The runs were not made on the same kind of machine or device, so that their seconds do not compare."


def _first_of_each_kind(warnings: Sequence[str]) -> list[str]:
    """The first of the warnings that differ only in the epoch."""
    kinds: dict[str, str] = {}
    for text in warnings:
        kinds.setdefault(re.sub(r"^epoch \d+: ", "", text), text)
    return list(kinds.values())


# ----------------------------------------------------------------------------------------------------- names and notes


def arm_name(entry: Report) -> str:
    """An arm with its budget."""
    return f"{entry['arm']} at {entry['budget']}" if entry["budget"] else str(entry["arm"])


def pair_title(pair: Report) -> str:
    """The arms of a comparison with their budget."""
    return f"{pair['label']} against {pair['baseline']}" + (f", {pair['budget']}" if pair["budget"] else "")


def join(values: Iterable[object]) -> str:
    """Values, separated by commas."""
    return ", ".join(map(str, values))


def choice_line(choice: Report) -> str | None:
    """The chosen point of an arm and the next best; None where nothing is chosen on validation."""
    second = choice["next"]
    if choice["mean_error"] is None:
        return None
    chosen = (
        f"{arm_name(choice)}: chosen is {choice['label']}, with {choice['mean_error']:.2f} % error on "
        f"{choice['images']} validation images (Wilson's interval {format_interval(choice['wilson_ci95'])})"
    )
    if second is None:
        return f"{chosen}; no other point came to an end."
    tie = {"loss": "; the lower loss decided", "order": "; the first of the grid was taken"}.get(choice["by"], "")
    return f"{chosen}; the next best, {second['label']}, has {second['mean_error']:.2f} %{tie}."


def notes(report: Report) -> list[str]:
    """How to read the numbers."""
    lines = [
        "an interval of a mean, or of a difference of means, is Student's over seeds, at 95 %, on these test images: "
        "where that of very many seeds may lie, if errors of seeds are normally distributed; from few seeds it may "
        "reach below 0 or above 100",
    ]
    tests = _count_tests(report)
    if tests > 1:
        lines.append(
            f"each interval and each p is of one comparison alone; for all {tests} together, look for p < "
            f"{0.05 / tests:.2g} (Bonferroni)"
        )
    if any(pair["mcnemar"] for pair in report["comparisons"]):
        lines.append(
            "McNemar's exact test tells, for one seed, whether the two models differ on these images. The seeds share "
            "the images, so that their counts must not be added up to one test"
        )
    for entry in report["baselines"]:
        means = entry["mean_errors"]
        if len(means) > 1:
            both = " and ".join(f"{arm} {mean:.2f} %" for arm, mean in means.items())
            lines.append(
                f"the better plain arm is {arm_name(entry)} ({both}); as in the paper, it is chosen by its error on "
                "test, which favours the baseline"
            )
    searched = {arm_name(choice): choice["points"] for choice in report["choices"]}
    if len(set(searched.values())) > 1:
        tried = ", ".join(f"{arm} {max(1, points)}" for arm, points in searched.items())
        took = sum(point["passes"] * len(point["seeds"]) for point in report["selection"] if point["passes"])
        lines.append(
            f"settings tried before the choice: {tried}. What that took ({took:.0f} passes) is in no cost of a run"
        )
    if not report["pays"]:
        lines.append("where SAM begins to pay cannot be told from one length of training: several budgets show it")
    if report["selection"]:
        lines.append("the validation error of a chosen point is too low, as it was chosen by it; test was scored once")
    return lines
