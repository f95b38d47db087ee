"""The report of a sweep as tables, and as a page of markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from samtune.report.compare import markdown_table, number_words, p_words
from samtune.sweep.verdict import choice_words, listed, notes, pair_lines, pair_title, pays_words

_Report = Mapping[str, Any]
_Rows = list[dict[str, str | float | None]]


def table(report: _Report) -> _Rows:
    """One row for each budget and arm: what people look at first."""
    other = baseline(report)
    pairs = {
        (pair["budget"], pair["label"]): pair["difference"]
        for pair in report["comparisons"]
        if pair["baseline"] == other
    }
    return [
        _budget(report, entry)
        | {
            "arm": entry["arm"],
            "chosen": entry["label"],
            "n": entry["n"],
            "test error %": _with_interval(entry["mean_error"], entry["mean_error_ci95"], ".2f"),
            "passes": _cost(entry["passes"]),
            "seconds": _cost(entry["seconds"]),
            f"minus {other}": _difference(pairs.get((entry["budget"], entry["arm"]))),
        }
        for entry in report["final"]
    ]


def baseline(report: _Report) -> str:
    """The arm that the table compares with: sgd, where it is there."""
    there = [pair["baseline"] for pair in report["comparisons"]]
    return next((arm for arm in ("sgd", "sgd-2x") if arm in there), "sgd")


def _budget(report: _Report, entry: _Report) -> dict[str, str | float | None]:
    return {"budget": entry["budget"]} if report["asked"]["budgets"] != [None] else {}


def _cost(value: float | None) -> str | None:
    return None if value is None else number_words(value)


def _with_interval(mean: float | None, ci95: Sequence[float] | None, form: str) -> str | None:
    if mean is None:
        return None
    return format(mean, form) + (f" ({ci95[0]:{form}} to {ci95[1]:{form}})" if ci95 else "")


def _difference(found: _Report | None) -> str | None:
    return None if found is None else _with_interval(found["mean"], found["ci95"], "+.2f")


def selection_rows(report: _Report) -> _Rows:
    """What each point had on validation."""
    return [
        _budget(report, point)
        | {
            "arm": point["arm"],
            "point": point["label"],
            "": "chosen" if point["chosen"] else "" if point["state"] == "done" else point["state"],
            "validation error %": _with_interval(point["mean_error"], point["mean_error_ci95"], ".2f"),
            "by seed": " ".join(f"{error:.2f}" for error in point["val_errors"]) or None,
            "loss": None if point["mean_loss"] is None else f"{point['mean_loss']:.4f}",
            "passes": _cost(point["passes"]),
            "seconds": _cost(point["seconds"]),
        }
        for point in report["selection"]
    ]


def seed_rows(report: _Report) -> _Rows:
    """The last fits, one by one."""
    return [
        _budget(report, entry)
        | {"arm": entry["arm"], "seed": seed, "test error %": error, "wrong": f"{wrong} of {entry['images']}"}
        for entry in report["final"]
        for seed, error, wrong in zip(entry["seeds"], entry["test_errors"], entry["wrong"], strict=True)
    ]


def image_rows(report: _Report) -> _Rows:
    """McNemar's tests, seed by seed."""
    return [
        _budget(report, pair)
        | {
            "arm": pair["label"],
            "against": pair["baseline"],
            "seed": test["seed"],
            "wrong by it alone": test["only_wrong"],
            "by the other alone": test["baseline_only_wrong"],
            "p": p_words(test["p"]).removeprefix("p = ").removeprefix("p "),
        }
        for pair in report["comparisons"]
        for test in pair["mcnemar"]
    ]


def markdown(report: _Report) -> str:
    """The report as a page of markdown."""
    asked, made, progress = report["asked"], report["made_of"], report["progress"]
    page = [f"# {title(report)}", "", " ".join(report["verdict"]), ""]
    page += [f"**Warning:** {warning}\n" for warning in report["warnings"]]
    tables = {
        "Arms": table(report),
        "Validation": selection_rows(report),
        "Seeds": seed_rows(report),
        "Images that one arm alone has wrong": image_rows(report),
        "Runs that failed": [{"run": run["run"], "why": run["why"], "log": run["log"]} for run in progress["failed"]],
        "Runs that are missing": [dict(run) for run in progress["missing"]],
    }
    for name, rows in tables.items():
        page += [f"## {name}", "", *markdown_table(rows)] if rows else []
        if name == "Validation":
            page += [f"- {words}" for choice in report["choices"] if (words := choice_words(choice))] + [""]
    for pair in report["comparisons"]:
        page += [f"## {pair_title(pair)}", "", *(f"- {line}" for line in pair_lines(pair)), ""]
    if report["pays"]:
        page += ["## Where SAM begins to pay", "", *(f"- {pays_words(entry)}" for entry in report["pays"]), ""]
    page += ["## How to read this", "", *(f"- {note}" for note in notes(report)), ""]
    page += ["## Made of", "", f"- asked: {asked_words(asked)}", f"- {progress_words(progress)}"]
    page += [f"- {name}: {value}" for name, value in made_of_words(made).items()] if made else []
    return "\n".join(page) + "\n"


def title(report: _Report) -> str:
    """Model and data, as the runs resolved them."""
    made, asked = report["made_of"], report["asked"]
    model, data = (made["model"]["resolved"], made["dataset"]["name"]) if made else (asked["model"], asked["dataset"])
    return f"Sweep of {model} on {data}"


def asked_words(asked: _Report) -> str:
    """What was to be compared."""
    budgets = "" if asked["budgets"] == [None] else f"; budgets {listed(asked['budgets'])}"
    grids = "; ".join(
        f"grid{'' if name == 'grid' else f' of {name}'}: " + ", ".join(f"{key} {listed(v)}" for key, v in grid.items())
        for name, grid in asked["grid"].items()
        if grid
    )
    seeds = f"seeds {listed(asked['seeds'])} (choice: {listed(asked['selection_seeds'])})"
    return f"Arms {listed(asked['arms'])}; {seeds}{budgets}{'; ' + grids if grids else ''}"


def progress_words(progress: _Report) -> str:
    """How much of the sweep is done, and what it took."""
    diverged = f", {len(progress['diverged'])} diverged (their points are out)" if progress["diverged"] else ""
    return (
        f"{progress['done']} of {progress['runs']} runs are done{diverged}, {len(progress['failed'])} failed: "
        f"{progress['passes']:.0f} passes, {progress['train_seconds']:.0f} s of training"
    )


def made_of_words(made: _Report) -> dict[str, str]:
    """Model, data and places."""
    model, data = made["model"], made["dataset"]
    found = {
        "model": f"{model['requested']} -> {model['resolved']}, {model['img_size']} px, weights {model['weights']}, "
        f"pretrained on {model['pretraining']}",
        "data": f"{data['name']} ({data['source']}), {data['classes']} classes",
    }
    if data["selection"]:
        found["to choose"] = "train {train}, validation {val} images; split {split_hash}".format(**data["selection"])
    if data["final"]:
        found["last fits"] = "train {train}, test {test} images; split {split_hash}".format(**data["final"])
    found["machine"] = "; ".join(made["machines"] + made["devices"] + made["precision"])
    found["versions"] = ", ".join(f"{package} {'/'.join(all_)}" for package, all_ in made["versions"].items())
    return found | {"started": made["started"]}
