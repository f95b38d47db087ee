"""`samtune doctor`: each check tells a machine that works from one that does not."""

import json
import os
import socket
import threading
import tomllib

import pytest
import torch

from samtune import hub
from samtune.doctor import checks, devices
from samtune.sam.perturbation import Perturbation
from tests.conftest import ROOT, samtune


def test_a_machine_that_works_is_told_so():
    """All of it, two real ranks among them; here the hub is switched off."""
    done = samtune("doctor", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = {check["name"]: check for check in result["checks"]}
    assert result["ok"] is True
    assert found["SAM step, cpu"]["details"]["difference"] < 1e-14
    assert found["gloo"]["status"] == "ok"
    assert found["hub"]["status"] == "skipped"
    assert found["CPU"]["details"]["cores"] == len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        assert found["GPU"]["status"] == found["nccl"]["status"] == "skipped"
    assert "checking collectives ..." in done.stderr
    assert all(check["hint"] for check in result["checks"] if check["status"] == "warning")


def test_what_is_broken_is_named_and_ends_with_8(monkeypatch, capsys):
    from samtune.cli.doctor import doctor as command
    from samtune.errors import MachineError

    def broken():
        raise OSError("no such library")

    def fine():
        yield devices.Finding("disks", "ok", "room enough")

    monkeypatch.setattr(checks, "CHECKS", {"GPU": broken, "disks": fine})
    with pytest.raises(MachineError, match="broken: GPU") as caught:
        command(as_json=True)
    assert caught.value.exit_code == 8
    assert "no such library" in caught.value.cause
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert [check["status"] for check in result["checks"]] == ["failed", "ok"]  # the others go on


def test_a_wrong_perturbation_is_noticed(monkeypatch):
    right = devices.sam_difference(torch.device("cpu"))
    add = Perturbation.add_
    monkeypatch.setattr(Perturbation, "add_", lambda self, grads, rho: add(self, grads, 1.001 * rho))
    wrong = devices.sam_difference(torch.device("cpu"))
    assert right < 1e-14 < 1e-6 < wrong
    assert next(finding.status for finding in devices.sam_step()) == "failed"


@pytest.mark.parametrize(("visible", "status"), [(None, "failed"), ("", "skipped")])
def test_a_driver_whose_gpus_torch_does_not_see_is_broken(monkeypatch, visible, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_driver", lambda: "570.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = devices.gpus()
    assert finding.status == status


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described_and_computes_sam_exactly():
    finding = next(devices.gpus())
    assert finding.status == "ok"
    assert finding.details["memory_bytes"] > 1 << 30
    assert devices.sam_difference(torch.device("cuda")) < 1e-12


def test_ranks_that_do_not_add_are_noticed(monkeypatch):
    monkeypatch.setattr(devices, "_RANK", "raise SystemExit('no route to host')")
    finding = devices._sum_over_ranks("gloo", "cpu")
    assert finding.status == "failed"
    assert "no route to host" in finding.value


def test_ranks_that_say_nothing_are_given_up_and_ended(monkeypatch):
    started = []
    popen = devices.subprocess.Popen
    monkeypatch.setattr(devices.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(devices, "_RANK", "import signal; signal.pause()")
    monkeypatch.setattr(devices, "_RANKS_TIMEOUT", 0.2)
    assert devices._sum_over_ranks("gloo", "cpu").status == "failed"
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize(("free", "status"), [(100 << 30, "ok"), (1 << 30, "warning"), (1 << 20, "failed")])
def test_a_disk_is_judged_by_its_room(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    finding = checks._disk("cache", tmp_path / "not" / "yet", "set CACHE")
    assert finding.status == status
    assert ("set CACHE" in finding.hint) == (status != "ok")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.cache_folders, "is_writable", lambda folder: False)  # root may write everywhere
    finding = checks._disk("cache", tmp_path, "set CACHE")
    assert (finding.status, finding.hint) == ("warning", "set CACHE")


def test_little_shared_memory_has_a_way_out(monkeypatch):
    usage = type("Usage", (), {"free": 64 << 20, "total": 64 << 20})  # docker's
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    (finding,) = checks._shared_memory()
    assert finding.status == "warning"
    assert "--shm-size" in finding.hint


def test_a_hub_that_answers_refuses_or_keeps_silent(monkeypatch):
    monkeypatch.setattr(checks, "_HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert checks._connection_problem(address)  # connected, and no answer

        def answer():
            for status in ("200 OK", "404 Not Found", "503 Service Unavailable"):
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(f"HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n".encode())

        monkeypatch.setattr(checks, "_HUB_TIMEOUT", 5.0)
        server.accept()[0].close()  # the one that waited
        thread = threading.Thread(target=answer)
        thread.start()
        assert checks._connection_problem(address) == ""
        assert checks._connection_problem(address) == ""
        assert "503" in checks._connection_problem(address)
        thread.join()
    assert "cannot be reached" in checks._connection_problem(address)


def test_what_the_cache_holds_is_listed_with_sizes(tmp_path, monkeypatch):
    assert hub.cached() == [] or isinstance(hub.cached()[0]["bytes"], int)
    repository = tmp_path / "models--timm--tiny"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    (repository / "snapshots" / "0" / "model.safetensors").write_bytes(b"x" * 1000)
    scan = hub.scan_cache_dir
    monkeypatch.setattr(hub, "scan_cache_dir", lambda: scan(tmp_path))
    assert hub.cached() == [{"kind": "model", "id": "timm/tiny", "bytes": 1000}]
    held = next(finding for finding in checks._hub() if finding.name == "hub's cache holds")
    assert "1 models" in held.value
    assert "timm/tiny" in held.value


def test_a_package_that_is_missing_or_old_is_broken_and_an_extra_is_not(monkeypatch):
    from packaging.requirements import Requirement

    wanted = [(None, Requirement("torch>=999")), (None, Requirement("timm>=1")), ("ray", Requirement("nowhere>=1"))]
    monkeypatch.setattr(checks, "_requirements", lambda: iter(wanted))
    _, packages = checks._versions()
    assert packages.status == "failed"
    assert "torch>=999" in packages.value
    assert "timm" not in packages.value
    (extra,) = checks._extras()
    assert (extra.status, extra.hint) == ("skipped", "pip install 'samtune[ray]'")
    assert checks.EXTRAS["ray"] in extra.value


def test_every_extra_says_what_it_adds():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert checks.EXTRAS.keys() == extras.keys()
