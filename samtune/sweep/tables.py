"""The tables of a sweep's report, and the report as Markdown."""

from collections.abc import Sequence
from typing import Any

from samtune.report import html
from samtune.report.comparison import Report, Rows, format_cost, format_interval, format_p, pair_lines
from samtune.sweep.verdict import break_even_line, choice_line, join, notes, pair_title


def arm_rows(report: Report) -> Rows:
    """One row for each budget and arm: the main results."""
    baseline = baseline_arm(report)
    pairs = [pair for pair in report["comparisons"] if pair["baseline"] == baseline]
    differences = {(pair["budget"], pair["label"]): pair["difference"] for pair in pairs}
    rows = []
    for entry in report["final"]:
        difference = differences.get((entry["budget"], entry["arm"])) or {"mean": None, "ci95": None}
        row = _budget_cell(report, entry) | {"arm": entry["arm"], "chosen": entry["label"], "n": entry["n"]}
        row["test error %"] = _format_mean(entry["mean_error"], entry["mean_error_ci95"])
        if has_checkpoints(report):
            row |= {
                f"{name} epoch %": _format_mean(entry["by_checkpoint"].get(name), None) for name in ("last", "best")
            }
        row |= {"passes": format_cost(entry["passes"]), "seconds": format_cost(entry["seconds"])}
        row[f"minus {baseline}"] = _format_mean(difference["mean"], difference["ci95"], "+.2f")
        rows.append(row)
    return rows


def has_checkpoints(report: Report) -> bool:
    """Whether there are test errors of the last and the best checkpoint of some arm."""
    return any(entry["by_checkpoint"] for entry in report["final"])


def baseline_arm(report: Report) -> str:
    """The arm that tables compare with: sgd if it has results."""
    baselines = [pair["baseline"] for pair in report["comparisons"]]
    return next((arm for arm in ("sgd", "sgd-2x") if arm in baselines), "sgd")


def _budget_cell(report: Report, entry: Report) -> dict[str, str | float | None]:
    return {"budget": entry["budget"]} if report["asked"]["budgets"] != [None] else {}


def _format_mean(mean: float | None, ci95: Sequence[float] | None, form: str = ".2f") -> str | None:
    if mean is None:
        return None
    return format(mean, form) + (f" ({format_interval(ci95, form)})" if ci95 else "")


def point_rows(report: Report) -> Rows:
    """Validation results of each point."""
    return [
        _budget_cell(report, point)
        | {
            "arm": point["arm"],
            "point": point["label"],
            "": "chosen" if point["chosen"] else "" if point["state"] == "done" else point["state"],
            "validation error %": _format_mean(point["mean_error"], point["mean_error_ci95"]),
            "by seed": " ".join(f"{error:.2f}" for error in point["val_errors"]) or None,
            "loss": None if point["mean_loss"] is None else f"{point['mean_loss']:.4f}",
            "passes": format_cost(point["passes"]),
            "seconds": format_cost(point["seconds"]),
        }
        for point in report["selection"]
    ]


def seed_rows(report: Report) -> Rows:
    """Test error of each final run."""
    return [
        _budget_cell(report, entry)
        | {"arm": entry["arm"], "seed": seed, "test error %": error, "wrong": f"{wrong} of {entry['images']}"}
        for entry in report["final"]
        for seed, error, wrong in zip(entry["seeds"], entry["test_errors"], entry["wrong"], strict=True)
    ]


def image_rows(report: Report) -> Rows:
    """McNemar's test of each pair and seed."""
    return [
        _budget_cell(report, pair)
        | {
            "arm": pair["label"],
            "against": pair["baseline"],
            "seed": test["seed"],
            "wrong by it alone": test["only_wrong"],
            "by the other alone": test["baseline_only_wrong"],
            "p": format_p(test["p"]).removeprefix("p = ").removeprefix("p "),
        }
        for pair in report["comparisons"]
        for test in pair["mcnemar"]
    ]


def markdown(report: Report) -> str:
    """The report as Markdown."""
    return html.render("sweep.md", content(report))


def content(report: Report) -> dict[str, Any]:
    """Title, tables and sentences, for report.md and report.html."""
    progress = report["progress"]
    return {
        "report": report,
        "title": title(report),
        "arms": arm_rows(report),
        "points": point_rows(report),
        "choices": [line for choice in report["choices"] if (line := choice_line(choice))],
        "seeds": seed_rows(report),
        "images": image_rows(report),
        "failed": [{key: run[key] for key in ("run", "why", "log")} for run in progress["failed"]],
        "missing": progress["missing"],
        "pairs": {pair_title(pair): pair_lines(pair) for pair in report["comparisons"]},
        "break_even": [break_even_line(entry) for entry in report["pays"]],
        "notes": notes(report),
        "asked": describe_comparison(report["asked"]),
        "progress": describe_progress(progress),
        "made_of": describe_provenance(report["made_of"]) if report["made_of"] else {},
    }


def title(report: Report) -> str:
    """Model and data, by the names that the runs resolved."""
    made, asked = report["made_of"], report["asked"]
    model, data = (made["model"]["resolved"], made["dataset"]["name"]) if made else (asked["model"], asked["dataset"])
    return f"Sweep of {model} on {data}"


def describe_comparison(asked: Report) -> str:
    """Arms, seeds, budgets and grids that are compared."""
    budgets = "" if asked["budgets"] == [None] else f"; budgets {join(asked['budgets'])}"
    grids = "; ".join(
        f"grid{'' if name == 'grid' else f' of {name}'}: " + ", ".join(f"{key} {join(v)}" for key, v in grid.items())
        for name, grid in asked["grid"].items()
        if grid
    )
    seeds = f"seeds {join(asked['seeds'])} (choice: {join(asked['selection_seeds'])})"
    return f"Arms {join(asked['arms'])}; {seeds}{budgets}{'; ' + grids if grids else ''}"


def describe_progress(progress: Report) -> str:
    """How much of the sweep is done, and its cost."""
    diverged = f", {len(progress['diverged'])} diverged (their points are out)" if progress["diverged"] else ""
    return (
        f"{progress['done']} of {progress['runs']} runs are done{diverged}, {len(progress['failed'])} failed: "
        f"{progress['passes']:.0f} passes, {progress['train_seconds']:.0f} s of training"
    )


def describe_provenance(made: Report) -> dict[str, str]:
    """Model, data, machines and versions, by name."""
    model, data = made["model"], made["dataset"]
    about = {
        "model": f"{model['requested']} -> {model['resolved']}, {model['img_size']} px, weights {model['weights']}, "
        f"pretrained on {model['pretraining']}",
        "data": f"{data['name']} ({data['source']}), {data['classes']} classes",
    }
    if data["selection"]:
        about["to choose"] = "train {train}, validation {val} images; split {split_hash}".format(**data["selection"])
    if data["final"]:
        about["final runs"] = "train {train}, test {test} images; split {split_hash}".format(**data["final"])
    about["machine"] = "; ".join(made["machines"] + made["devices"] + made["precision"])
    about["versions"] = ", ".join(f"{package} {'/'.join(all_)}" for package, all_ in made["versions"].items())
    return about | {"started": made["started"]}
