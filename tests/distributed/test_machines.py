"""Machines as they are: disks without links, jobs that start together, left-over variables, no home."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from samtune.config import cache_folders, loading, run_config
from samtune.distributed import collectives, environment, launch
from samtune.errors import MachineError, UsageError
from samtune.runs import checkpoint
from tests.conftest import ROOT, SMALL_MODEL, samtune
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run, status

SMALL = (*SMALL_MODEL, "--epochs", 1, "--batch-size", 8)


@pytest.fixture(autouse=True)
def _rank_info_is_read_again():
    yield
    environment.rank_info.cache_clear()


# --------------------------------------------------------------------------------------------------- copies of a run


def test_a_run_that_was_copied_with_its_links_followed_goes_on_to_the_same_end(stopped, uninterrupted, tmp_path):
    """As `cp -rL` copies it, and every object store."""
    shutil.copytree(stopped, tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoints" / "last").is_symlink()
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert (tmp_path / "r" / "checkpoints" / "last").is_symlink()


def test_where_last_alone_was_copied_the_run_goes_on_from_it(stopped, uninterrupted, tmp_path):
    shutil.copytree(stopped, tmp_path / "r", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(stopped / "checkpoints" / "last", tmp_path / "r" / "checkpoints" / "last")
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "resume  step-000007" in done.stderr
    # The best checkpoint was not copied, so that another one is scored beside the last.
    copied, whole = fingerprint(tmp_path / "r"), fingerprint(uninterrupted)
    assert copied.keys() == whole.keys()
    assert {key for key in whole if copied[key] != whole[key]} <= {"metrics"}
    assert report_of(tmp_path / "r")["test"] == report_of(uninterrupted)["test"]


def report_of(run):
    return json.loads((run / "report.json").read_text())


def test_a_copy_of_a_checkpoint_is_all_that_eval_needs(uninterrupted, tmp_path):
    scores = json.loads((uninterrupted / "report.json").read_text())["test"]
    shutil.copytree(uninterrupted / "checkpoints" / "last", tmp_path / "copy")
    result = json.loads(samtune("eval", tmp_path / "copy", "--json").stdout)
    assert {key: result[key] for key in ("n", "wrong", "loss")} == {key: scores[key] for key in ("n", "wrong", "loss")}


def test_a_damaged_copy_under_last_is_named_and_the_one_before_is_taken(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    checkpoints = tmp_path / "r" / "checkpoints"
    shutil.rmtree(checkpoints / "step-000007")
    (checkpoints / "last" / "model.safetensors").write_bytes(b"")
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert re.search("step-000007 is damaged .*going on from step-000006", done.stderr)


# ----------------------------------------------------------------------------------------------- disks without links


NO_LINKS = {"at": "make symlink", "call": 1, "do": "EPERM", "again": True}


def test_on_a_disk_without_links_files_name_the_checkpoints(photos, uninterrupted, tmp_path):
    stop = {"at": "perturb", "call": 7, "do": "SIGTERM"}
    assert run(photos, tmp_path / "r", faults=[NO_LINKS, stop]).returncode == 75
    last = tmp_path / "r" / "checkpoints" / "last"
    assert last.read_text() == "step-000007\n"
    done = resume(tmp_path / "r", faults=[NO_LINKS])
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    checkpoints = {path.name for path in (tmp_path / "r" / "checkpoints").iterdir()}
    assert checkpoints == {path.name for path in (uninterrupted / "checkpoints").iterdir()}
    scores = json.loads((tmp_path / "r" / "report.json").read_text())["test"]
    for target in (tmp_path / "r", last):
        result = json.loads(samtune("eval", target, "--json").stdout)
        assert (result["n"], result["loss"]) == (scores["n"], scores["loss"])
    for command in (("report", tmp_path / "r"), ("runs", tmp_path)):
        assert samtune(*command).returncode == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_error_and_a_disk_that_fails_is(number, tmp_path, monkeypatch):
    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    checkpoint._sync(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        checkpoint._sync(tmp_path)


# ------------------------------------------------------------------------------------------------------- run folders


def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_config.time, "strftime", lambda _: "20260102-030405")
    settings = [loading.load(None, {"model": "test_resnet", "dataset": "a/b:c", "seed": seed}) for seed in (0, 0, 0, 1)]
    start = threading.Barrier(len(settings))

    def named(settings):
        start.wait()
        return settings.with_output().output

    with ThreadPoolExecutor(len(settings)) as pool:
        folders = [str(folder) for folder in pool.map(named, settings)]
    name = "runs/20260102-030405-test_resnet-b-c-rho0.05-seed"
    assert Counter(folders) == Counter([f"{name}0", f"{name}0-2", f"{name}0-3", f"{name}1"])
    assert all((tmp_path / folder).is_dir() for folder in folders)
    monkeypatch.undo()


def test_names_of_models_and_data_make_no_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = loading.load(None, {"model": "hf-hub:timm/test_resnet", "dataset": "photos"})
    assert re.fullmatch(r"runs/[\d-]+-hf-hub-timm-test_resnet-photos-rho0.05-seed0", str(settings.with_output().output))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "runs").write_text("a file")
    with pytest.raises(MachineError, match="cannot be made") as error:
        settings.with_output()
    assert "--output" in error.value.hint


def test_a_run_that_cannot_begin_leaves_no_empty_folder(photos, tmp_path):
    arguments = ("run", *SMALL, "--dataset", photos, "--model", "vit_giant_patch14_224.nothing")
    assert samtune(*arguments, cwd=tmp_path).returncode == 4
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_files_of_others_in_a_folder_are_no_run(flags, photos, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    for name in ("slurm-1.out", "job.sh", "log.txt"):
        (folder / name).write_text("somebody's\n")
    (folder / "logs").mkdir()
    done = samtune("run", *SMALL, "--dataset", photos, "--output", folder, *flags)
    assert done.returncode == 0, done.stderr
    assert status(folder)["state"] == "done"
    assert (folder / "slurm-1.out").read_text() == "somebody's\n"
    again = samtune("run", *SMALL, "--dataset", photos, "--output", folder)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert "config.toml of another run" in again.stderr


def test_the_folder_of_the_data_is_no_run_folder(photos):
    done = samtune("run", *SMALL, "--dataset", photos, "--output", photos)
    assert done.returncode == 2
    assert "is the folder of the data set" in done.stderr


# ------------------------------------------------------------------------------------------------ left-over variables


def test_a_shell_that_was_once_the_only_rank_launches_the_processes_that_are_asked_for(photos, tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    arguments = ("run", *SMALL, "--dataset", photos, "--output", tmp_path / "r", "--processes", 2, "--json")
    done = samtune(*arguments, env=alone)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


def test_processes_in_a_rank_of_another_launcher_are_refused(monkeypatch):
    info = environment.RankInfo(rank=0, world_size=4, local_rank=0, local_world_size=4, machine=0)
    monkeypatch.setattr(environment, "rank_info", lambda: info)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    environment.check_processes(None)
    environment.check_processes(4)
    with pytest.raises(UsageError, match="--processes 2 in one of 4 ranks") as error:
        environment.check_processes(2)
    assert "RANK=0 WORLD_SIZE=4" in error.value.cause
    assert "env -u RANK -u WORLD_SIZE samtune" in error.value.hint
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert (environment.launcher_variables(), environment.command_without_launcher()) == (
        "SLURM_STEP_NUM_TASKS=4",
        "env -u SLURM_STEP_NUM_TASKS samtune ...",
    )


RANK_VARIABLES = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc"}, "RANK=abc in the environment"),
        ({"RANK": ""}, "RANK= in the environment"),
        ({"RANK": "2"}, "from 0 to 1"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 in the environment"),
        ({"GROUP_RANK": "1.5"}, "GROUP_RANK=1.5 in the environment"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc in the environment"),
        ({"MASTER_PORT": "65536"}, "from 0 to 65535"),
    ],
)
def test_an_invalid_variable_is_named(variables, message, monkeypatch):
    for key, value in (RANK_VARIABLES | variables).items():
        monkeypatch.setenv(key, value)
    environment.rank_info.cache_clear()
    with pytest.raises(UsageError) as error:
        environment.rank_info()
    assert message in str(error.value)
    assert "env -u RANK -u WORLD_SIZE samtune" in error.value.hint
    assert environment.is_rank0()  # it speaks for itself


@pytest.mark.parametrize(
    "variables", [{"SLURM_STEP_NUM_TASKS": "x"}, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "y"}]
)
def test_an_invalid_variable_of_slurm_is_named(variables, monkeypatch):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    environment.rank_info.cache_clear()
    with pytest.raises(UsageError, match=r"SLURM_.*=[xy] in the environment") as error:
        environment.rank_info()
    assert "env -u SLURM_STEP_NUM_TASKS samtune" in error.value.hint


def test_every_command_names_an_invalid_variable(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "samtune", "runs", tmp_path],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)} | os.environ | RANK_VARIABLES | {"RANK": "abc"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: RANK=abc in the environment")


@pytest.mark.parametrize("command", ["runs", "--help", "eval r"])
def test_without_a_working_folder_every_command_says_so(command, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'rmdir "$PWD" && exec {sys.executable} -m samtune {command}'
    env = {"PYTHONPATH": str(ROOT)} | os.environ
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=gone, env=env, check=False)
    assert done.returncode == 8, done.stderr
    assert done.stderr.startswith("error: the working folder is not there any more")


def test_the_host_where_ranks_meet_must_have_a_name_that_is_known(monkeypatch):
    monkeypatch.setattr(environment, "_DNS_SECONDS", 0.01)
    for key, value in (RANK_VARIABLES | {"MASTER_ADDR": "no-such-host.invalid"}).items():
        monkeypatch.setenv(key, value)
    environment.rank_info.cache_clear()
    with pytest.raises(MachineError, match=r"MASTER_ADDR=no-such-host.invalid: there is no host of that name") as error:
        collectives.init(torch.device("cpu"))
    assert "env -u RANK -u WORLD_SIZE samtune" in error.value.hint
    environment.rank_info.cache_clear()
    spec = launch.LaunchSpec(1, 2, 1, "no-such-host.invalid:29500")
    with pytest.raises(MachineError, match=r"--rdzv-endpoint no-such-host.invalid: there is no host of that name"):
        launch.launch([], spec, None)


WAITING = """
import sys
from samtune.distributed import collectives
collectives._WARN_AFTER = 0.5
sys.argv = ["samtune", *sys.argv[1:]]
from samtune.cli.main import main
main()
"""

# Left-over variables -> the message about missing ranks, and how to run without them.
NOBODY = {
    "rank 0 of two": ({"RANK": "0", "WORLD_SIZE": "2"}, "rank 0 of 2 waits for rank 1", "env -u RANK -u WORLD_SIZE"),
    "rank 1 of two": ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 of 2 waits for rank 0", "env -u RANK -u WORLD_SIZE"),
    "Slurm's, in an interactive shell": (
        {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "71"},
        "rank 0 of 3 waits for ranks 1, 2",
        "env -u SLURM_STEP_NUM_TASKS",
    ),
}


@pytest.mark.parametrize("name", NOBODY)
def test_waiting_for_ranks_that_nobody_started_says_for_whom_and_how_to_run_alone(name, photos, tmp_path):
    variables, message, alone = NOBODY[name]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29600 + len(name))} if "RANK" in variables else {}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "run", *map(str, SMALL), "--dataset", photos, "--output", tmp_path / "r"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables | place,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(3)]
    process.terminate()
    lines.append(process.communicate(timeout=30)[1])
    assert message in lines[0]
    assert alone in lines[2]
    assert process.returncode == 143  # it hears the signal while it waits
    assert "stopped by SIGTERM" in lines[3]


# --------------------------------------------------------------------------------------------------------- no home


@pytest.fixture
def a_user(monkeypatch, tmp_path):
    """As if the variables were those of a user whose home is tmp_path/home."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "SAMTUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_folders.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "home").mkdir()
    return tmp_path


def test_with_a_home_that_can_be_written_nothing_changes(a_user):
    before = dict(os.environ)
    assert cache_folders.prepare() is None
    assert dict(os.environ) == before
    assert cache_folders.user_cache() == a_user / "home" / ".cache"


@pytest.mark.parametrize("home", ["~", "read-only"])
def test_without_a_home_that_can_be_written_caches_are_temporary_and_a_message_says_so(home, a_user, monkeypatch):
    if home == "~":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and a user without a name
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(a_user / "home")))
    message = cache_folders.prepare()
    temporary = a_user / "tmp" / f"samtune-{os.getuid()}"
    assert message is not None
    assert str(temporary) in message
    assert cache_folders.user_cache() == temporary
    assert os.environ["HF_DATASETS_CACHE"].startswith(str(temporary))
    assert os.environ["MPLCONFIGDIR"].startswith(str(temporary))


def test_a_cache_of_the_hub_that_is_read_only_is_still_read(a_user, monkeypatch):
    shared = a_user / "shared"
    shared.mkdir()
    monkeypatch.setenv("HF_HOME", str(shared))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(shared)))
    assert str(shared / "datasets") in (cache_folders.prepare() or "")
    assert os.environ["HF_HOME"] == str(shared)
    assert os.environ["HF_DATASETS_CACHE"].startswith(str(a_user / "tmp"))


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can be somebody else")
def test_a_user_without_home_and_name_runs(photos, tmp_path):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and folder != folder.parent and not folder.stat().st_mode & 0o001:
            pytest.skip(f"{folder} cannot be entered by others")
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", sys.executable, "-m", "samtune"]
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME", "SAMTUNE_CACHE", "TMPDIR")}
    done = subprocess.run(
        [*command, "run", *map(str, SMALL), "--dataset", photos, "--output", tmp_path / "r"],
        env=variables | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "caches lie in" in done.stderr


# ------------------------------------------------------------------------------------------------------ another length


def test_a_run_that_is_done_goes_on_longer_along_a_longer_cosine_without_its_warm_up(uninterrupted, tmp_path):
    """The rate at the seam: that of the longer cosine in this step, not 0, not the peak, and not a warm-up again."""
    folder = tmp_path / "r"
    shutil.copytree(uninterrupted, folder, symlinks=True)
    longer = ("--epochs", 6, "--allow-change", "epochs", "--eval-every", "1 steps", "--allow-change", "eval_every")
    done = resume(folder, *longer)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if row["split"] == "train"}
    for step in (16, 17, 29, 30):
        assert rates[step] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 30)))
    assert "a cosine over 30 steps in place of 15" in done.stderr
    assert f"{rates[16]:.3g} in step 16" in done.stderr
    assert "is not repeated" in done.stderr
    stored = (folder / "config.toml").read_text()
    assert 'warmup_epochs = "1 steps"' in stored
