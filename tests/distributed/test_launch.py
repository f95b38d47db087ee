"""One command on several ranks: launched by itself, by torchrun, by Slurm, and on two machines that meet."""

import json
import os
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from samtune.config import loading
from samtune.distributed import device, environment, launch, rank_status
from samtune.distributed.rank_status import RankStatus
from samtune.errors import MachineError, SamtuneError, Stopped, UsageError
from tests.conftest import ROOT, samtune, write_image_folder
from tests.support.fault_matrix import row

SETTINGS = (
    *("--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--epochs", "2", "--lr", "0.01", "--drop", "0"),
    *("--workers", "0", "--freeze-bn"),  # two ranks have other statistics than one with all images
)


def run(data, folder, *more, **options):
    return samtune("run", *SETTINGS, "--dataset", data, "--output", folder, *more, **options)


def weights(folder):
    return safetensors.torch.load_file(folder / "checkpoints" / "last" / "model.safetensors")


def farthest(a, b):
    a, b = weights(a), weights(b)
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def two(photos, tmp_path_factory):
    """A run of two ranks with 4 images each."""
    folder = tmp_path_factory.mktemp("ranks") / "two"
    done = run(photos, folder, "--processes", "2", "--batch-size", "4", "--json")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_on_two_ranks_reports_once_for_both(two):
    folder, done = two
    report = json.loads(done.stdout)
    assert report == {"folder": str(folder), **json.loads((folder / "report.json").read_text())}
    assert report["world_size"] == len(report["devices"]) == 2
    assert report["optimizer"]["batch"] == {"per_device": 4, "devices": 2, "micro_batches": 1}
    assert report["sam"]["m_images"] == 4
    assert "steps   10 of 8 images (4 per device x 2 devices = 8)" in done.stderr
    assert done.stderr.count("reading data set") == 1
    assert "epoch   2" in (folder / "log-rank1.txt").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["n"] for row in rows if row["split"] == "train") == 80
    assert timm.create_model(f"local-dir:{folder}/checkpoints/last", pretrained=True).num_classes == 2
    assert "Traceback" not in done.stderr


def test_two_ranks_are_one_rank_that_computes_their_parts_one_after_the_other(two, photos, tmp_path):
    """The perturbation is each device's own: --m 4 on one device with 8 images is 4 images on each of two."""
    assert run(photos, tmp_path / "one", "--batch-size", "8", "--m", "4").returncode == 0
    assert farthest(two[0], tmp_path / "one") < 1e-6
    assert run(photos, tmp_path / "shared", "--batch-size", "8").returncode == 0
    assert farthest(two[0], tmp_path / "shared") > 1e-5


@pytest.mark.slow
def test_a_global_perturbation_of_two_ranks_is_that_of_one_with_all_images(photos, tmp_path):
    several = ("--processes", "2", "--batch-size", "4", "--m", "global")
    assert run(photos, tmp_path / "two", *several).returncode == 0
    assert run(photos, tmp_path / "one", "--batch-size", "8", "--m", "global").returncode == 0
    assert farthest(tmp_path / "two", tmp_path / "one") < 1e-6
    group = ("--processes", "2", "--batch-size", "4", "--m", "group:2")
    assert run(photos, tmp_path / "group", *group).returncode == 0
    assert farthest(tmp_path / "two", tmp_path / "group") == 0


@pytest.mark.slow
def test_a_fixed_global_batch_is_the_same_algorithm_on_one_rank_and_on_two(two, photos, tmp_path):
    fixed = ("--global-batch-size", "8", "--batch-size", "4")
    done = run(photos, tmp_path / "one", *fixed)
    assert done.returncode == 0
    assert "8 images (4 per device x 1 device x 2 micro-batches = 8)" in done.stderr
    assert farthest(two[0], tmp_path / "one") < 1e-6


@pytest.mark.slow
def test_a_sharded_run_is_a_global_one_and_goes_on_unharmed(photos, tmp_path):
    several = ("--processes", "2", "--batch-size", "4", "--model-ema")
    assert run(photos, tmp_path / "whole", *several, "--m", "global").returncode == 0
    begun = run(photos, tmp_path / "sharded", *several, "--shard", "--epochs", "1")
    assert begun.returncode == 0, begun.stderr
    assert "m global" in begun.stderr
    whole = run(photos, tmp_path / "two", *several, "--shard", "--save-every", "3 steps")
    assert whole.returncode == 0, whole.stderr
    assert farthest(tmp_path / "whole", tmp_path / "two") < 1e-6
    assert timm.create_model(f"local-dir:{tmp_path}/two/checkpoints/last", pretrained=True).num_classes == 2


@pytest.mark.slow
def test_twenty_steps_of_a_real_model_on_two_ranks_are_those_of_one_in_two_pieces(lite0_package, tmp_path):
    def go(name, *more):
        done = samtune(
            *("run", "--model", "tf_efficientnet_lite0", "--dataset", "mnist5k", "--img-size", "64", "--drop", "0"),
            *("--epochs", "20 steps", "--max-eval", "50", "--no-test", "--output", tmp_path / name, *more),
            env={"OMP_NUM_THREADS": "1"},  # two threads round otherwise than one, which grows to 0.002 in 20 steps
        )
        assert done.returncode == 0, done.stderr

    go("two", "--processes", "2", "--batch-size", "8")
    go("one", "--batch-size", "16", "--m", "8")
    assert farthest(tmp_path / "two", tmp_path / "one") < 1e-6
    # 16 at once round otherwise than 8, too; and at the default rates a last bit of the norm grows to 0.002.
    calm = ("--m", "global", "--lr", "0.001", "--head-lr-factor", "1")
    go("together", "--processes", "2", "--batch-size", "8", *calm)
    go("whole", "--batch-size", "16", "--micro-batch", "8", *calm)
    assert farthest(tmp_path / "together", tmp_path / "whole") < 1e-6


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_evaluation_says_the_same_on_any_number_of_ranks(two, processes):
    folder, done = two
    scored = samtune("eval", folder, "--processes", processes, "--json")
    assert scored.returncode == 0, scored.stderr
    expected, seen = json.loads(done.stdout)["test"], json.loads(scored.stdout)
    # A kernel rounds by its number of threads: of all the numbers, only the loss is a sum of rounded ones.
    assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    apart = ("epoch", "loss")
    assert {key: seen[key] for key in expected if key not in apart} == {
        key: value for key, value in expected.items() if key not in apart
    }


def test_a_process_that_has_ended_is_not_alive_before_its_parent_has_asked():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not launch._is_alive(child.pid)
    child.wait()
    assert not launch._is_alive(child.pid)
    assert launch._is_alive(os.getpid())


def test_under_torchrun_the_same_command_joins(two, photos, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", "--no-python", sys.executable, "-m", "samtune"]
    command = ["run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r", "--batch-size", "4", "--json"]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2
    assert farthest(tmp_path / "r", two[0]) == 0


def start(arguments, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "samtune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env,
    )


def ended(processes):
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_under_slurm_the_tasks_of_a_step_join(two, photos, tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
    command = ["run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r", "--batch-size", "4", "--json"]
    tasks = [start(command, **step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    (code, out, err), (other_code, other_out, _) = ended(tasks)
    assert (code, other_code) == (0, 0), err
    assert json.loads(out)["world_size"] == 2
    assert other_out == ""
    assert farthest(tmp_path / "r", two[0]) == 0


def test_two_machines_meet_and_the_first_one_has_the_result(two, photos, tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    command = ["run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r", "--batch-size", "4", "--json"]
    command += ["--processes", "1", "--nnodes", "2", "--rdzv-endpoint", endpoint]
    results = ended([start([*command, "--node-rank", i]) for i in range(2)])
    assert [code for code, _, _ in results] == [0, 0], results
    (result,) = [out for _, out, _ in results if out]
    assert json.loads(result)["world_size"] == 2
    assert farthest(tmp_path / "r", two[0]) == 0


@pytest.mark.slow
def test_two_jobs_run_beside_each_other(photos, tmp_path):
    command = ["run", *SETTINGS, "--dataset", photos, "--processes", "2", "--batch-size", "4"]
    results = ended([start([*command, "--output", tmp_path / name]) for name in ("a", "b")])
    assert [code for code, _, _ in results] == [0, 0], results
    assert farthest(tmp_path / "a", tmp_path / "b") == 0


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2", "--gpus", "1"], "contradict"),
        (["--gpus", "some"], "--gpus some: must be"),
        (["--nnodes", "2"], "--rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "here"], "host:port"),
        (["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "a:1"], "numbered from 0"),
        (["--sync-bn"], "--no-freeze-bn"),
        (["--lr-base-batch", "32"], "--lr"),
        (["--m", "group:0"], "--m group:0"),
        (["--shard", "--m", "device"], "no device has a whole model"),
        (["--shard", "--m", "4"], "no device has a whole model"),
        (["--shard", "--l2-in-loss"], "contradict"),
    ],
)
def test_contradicting_device_flags_are_refused_before_anything_starts(flags, message, photos, tmp_path):
    done = samtune("run", "--model", "test_resnet", "--dataset", photos, "--output", tmp_path / "r", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--processes", "2", "--global-batch-size", "9"], 2, "evenly"),
        (["--processes", "3", "--m", "group:2"], 2, "3 devices"),
        (["--processes", "2", "--perturb", "nothing_of_that_name"], 2, "matches none"),
        (["--shard"], 2, "one device"),
        (["--processes", "2", "--no-freeze-bn", "--sync-bn"], 8, "only on GPUs"),
    ],
)
def test_an_error_that_all_ranks_find_is_reported_once(flags, code, message, photos, tmp_path):
    done = run(photos, tmp_path / "r", *flags)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error:") == 1
    assert message in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_rate_for_another_batch_is_scaled_and_says_so(photos, tmp_path):
    done = run(photos, tmp_path / "r", "--lr-base-batch", "4", "--batch-size", "16")
    assert done.returncode == 0, done.stderr
    assert "lr 0.02 = 0.01 x sqrt(16 / 4)" in done.stderr
    again = samtune("run", tmp_path / "r" / "config.toml", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert farthest(tmp_path / "r", tmp_path / "again") == 0


@pytest.mark.parametrize("rho", [pytest.param(0, marks=pytest.mark.slow), 0.05])
def test_activations_that_are_computed_again_change_nothing(rho, photos, tmp_path):
    """Statistics that update do so once, though the blocks pass twice."""
    for name, more in (("kept", []), ("again", ["--grad-checkpointing"])):
        done = run(
            photos, tmp_path / name, "--no-freeze-bn", "--rho", rho, "--batch-size", "8", "--drop-path", "0.1", *more
        )
        assert done.returncode == 0, done.stderr
    assert farthest(tmp_path / "kept", tmp_path / "again") < 1e-6


# ---------------------------------------------------------------------------------------------------- ends of a launch

WORK = RankStatus(0, 10), RankStatus(1, 11)
LOST = RankStatus(0, 10, "", 9, "the connection to another rank is lost", time=2.0)


class Agent(Exception):
    """As the error of torch's agent, which has the processes and exit codes of ranks that failed."""


@pytest.mark.parametrize(
    ("statuses", "exit_codes", "killed", "expected"),
    [
        ([LOST, RankStatus(1, 11, "", 3, "no image", time=1.0)], {0: 9, 1: 3}, [], (3, "rank 1: no image")),
        (
            [RankStatus(0, 10, "", 7, "nan", time=1.0), RankStatus(1, 11, "", 7, "nan", time=2.0)],
            {0: 7, 1: 7},
            [],
            (7, "nan"),
        ),
        ([LOST, WORK[1]], {0: 9, 1: -9}, [], (9, "rank 1 (process 11) was ended by SIGKILL")),
        ([WORK[0], WORK[1]], {0: -9, 1: -11}, [0], (9, "rank 1 (process 11) was ended by SIGSEGV")),
        (
            [RankStatus(0, 10, "", 143, "stopped", time=2.0), WORK[1]],
            {0: 143, 1: -9},
            [],
            (9, "rank 1 (process 11) was"),
        ),
        ([LOST, WORK[1]], {0: 9, 1: 1}, [], (1, "rank 1 (process 11) ended with a defect")),
        ([LOST, WORK[1]], {0: 9, 1: -15}, [], (9, "rank 0: the connection")),
        ([WORK[0]], {0: -15}, [], (9, "rank 0 (process 10) was ended by SIGTERM")),
        (
            [RankStatus(0, 10, "", 75, "stopped by SIGTERM"), RankStatus(1, 11, "", 75, "stopped")],
            {},
            [],
            (75, "stopped by SIGTERM"),
        ),
        # The agent ends those that are left by SIGTERM, which they take for a second signal.
        (
            [
                RankStatus(0, 10, "", 143, "stopped by a second signal", time=2.0),
                RankStatus(1, 11, "", 75, "stopped by SIGTERM"),
            ],
            {0: 143, 1: 75},
            [],
            (75, "stopped by SIGTERM"),
        ),
        (
            [RankStatus(0, 10, "", 143, "stopped by SIGTERM"), RankStatus(1, 11, "", 143, "stopped")],
            {0: 143},
            [],
            (143, "stopped"),
        ),
        # A signal to a rank that has reported its end, or that everything is saved, changes nothing.
        (
            [RankStatus(0, 10, "", 75, "stopped by SIGINT"), RankStatus(1, 11, "", 75, "stopped")],
            {1: -2},
            [],
            (75, "stopped by"),
        ),
        ([RankStatus(0, 10, "", 75, "stopped by SIGINT"), WORK[1]], {1: -2}, [], (75, "stopped by SIGINT")),
        ([RankStatus(0, 10, "", 0), RankStatus(1, 11, "", 0)], {1: -2}, [], None),
        ([RankStatus(0, 10, "", 0), WORK[1]], {1: -9}, [], (9, "rank 1 (process 11) was ended by SIGKILL")),
        ([RankStatus(0, 10, "", 0), RankStatus(1, 11, "", 0)], {}, [], None),
    ],
)
def test_the_cause_of_an_end_is_told_from_its_consequences(
    statuses, exit_codes, killed, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        launch, "_failed_processes", lambda _: {rank: (10 + rank, code) for rank, code in exit_codes.items()}
    )
    monitor = launch._Monitor(tmp_path, launch.LaunchSpec(2), None)
    monitor.killed = set(killed)
    cause = launch._cause({status.rank: status for status in statuses}, Agent() if exit_codes else None, monitor)
    if expected is None:
        assert cause is None
    else:
        assert isinstance(cause, SamtuneError | Stopped)
        assert cause.exit_code == expected[0]
        assert str(cause).startswith(expected[1])


def test_statuses_of_restarted_ranks_replace_all_earlier_ones(tmp_path):
    again = RankStatus(0, 12, "port 2", time=3.0)
    for status in (RankStatus(0, 10, "port 1", 9, "lost", time=2.0), RankStatus(1, 11, "port 1", time=1.0), again):
        (tmp_path / f"{status.rank}.json").write_text(json.dumps(vars(status)))
    assert rank_status.read_statuses(tmp_path) == {0: again}


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu1", "gpu1"), ("gpu[03-05,9],cpu1", "gpu03"), ("a,b", "a"), ("node-[7]", "node-7")]
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert environment.first_host(nodes) == first


def test_gpus_in_place_of_processes_may_be_asked_of_a_run_that_goes_on(photos):
    stored = {"model": "test_resnet", "dataset": str(photos), "processes": 2}
    now, _, _ = loading.load_over(stored, {}, None, {"gpus": "2"})
    assert (now.gpus, now.processes) == ("2", None)
    with pytest.raises(UsageError):
        loading.load_over(stored, {}, None, {"gpus": "2", "processes": 2})


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "H100")


@pytest.mark.parametrize(
    ("gpus", "numbers"),
    [("auto", [0]), ("all", [0, 1, 2]), ("2", [0, 1]), ("0,2", [0, 2]), ("2,", [2]), ("0", [])],
)
def test_gpus_are_chosen_by_number_or_by_name(three_gpus, gpus, numbers, monkeypatch):
    assert device.gpu_numbers(gpus) == numbers
    assert device.select_device(gpus) == (torch.device("cuda", numbers[0]) if numbers else torch.device("cpu"))
    assert device.select_device(gpus, processes=2) == torch.device("cpu")
    for local, number in enumerate(numbers if gpus != "auto" else [0, 1, 2]):
        monkeypatch.setattr(environment, "rank_info", lambda local=local: environment.RankInfo(local, 3, local, 3, 0))
        assert device.select_device(gpus) == torch.device("cuda", number)


@pytest.mark.parametrize("gpus", ["4", "0,3", "7,"])
def test_more_gpus_than_the_machine_has_are_refused_and_those_it_has_are_listed(three_gpus, gpus):
    with pytest.raises(MachineError, match="there are 3 GPUs here") as refused:
        device.gpu_numbers(gpus)
    assert "2: H100" in refused.value.cause


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_as_a_rank_of_its_own(photos, tmp_path):
    """nccl, one rank."""
    assert run(photos, tmp_path / "alone", "--amp-dtype", "float32", "--deterministic").returncode == 0
    done = run(photos, tmp_path / "rank", "--amp-dtype", "float32", "--deterministic", "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name(0) in json.loads(done.stdout)["devices"]
    assert farthest(tmp_path / "alone", tmp_path / "rank") < 1e-6


@row(19)
def test_more_ranks_than_images_work(tmp_path):
    few = write_image_folder(tmp_path / "pets", {"train": 3, "test": 1})
    assert run(few, tmp_path / "three", "--processes", "3", "--max-train", "2").returncode == 0
    assert run(few, tmp_path / "one", "--max-train", "2", "--m", "1").returncode == 0
    assert farthest(tmp_path / "three", tmp_path / "one") < 1e-6
