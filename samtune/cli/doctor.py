"""`samtune doctor`: look at this machine, and say what is broken."""

from dataclasses import asdict

from samtune.cli.help import Json
from samtune.errors import MachineError


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, SAM's arithmetic, ranks, shared memory, disks, caches, the hub, extras.

    Example: samtune doctor --json

    Exit code 0, or 8 if something is broken; what is missing and could be done without is a warning. It takes about 20
    seconds, and writes nothing.
    """
    from samtune import console
    from samtune.doctor import checks

    findings = list(checks.run_all(lambda name: console.info(f"checking {name} ...")))
    broken = [finding for finding in findings if finding.status == "failed"]
    if as_json:
        console.print_json({"ok": not broken, "checks": [asdict(finding) for finding in findings]})
    else:
        console.print_rows("This machine", [{"check": f.name, "is": f.status, "found": f.value} for f in findings])
        console.print_prose(f"{f.name}: {f.hint}" for f in findings if f.hint)
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise MachineError(f"broken: {names}", broken[0].value, broken[0].hint or "see the table")
