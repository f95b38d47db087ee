"""The tests of the engine can fail: each known mistake, written into a copy of the package, is caught by one."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RESUMED = (
    "faults/test_stop.py::test_a_killed_run_goes_on_to_the_same_end_by_the_same_command[while_weights_are_perturbed]"
)

# What others got wrong: file, what it says, what it would say, and a test that then fails.
MUTATIONS = {
    "the perturbation is dropped": (
        {"sam/perturbation.py": [("torch._foreach_add_(self.params, grads, alpha=scale.item())", "pass")]},
        "sam/test_step.py::test_a_hundred_steps_equal_a_naive_loop",
    ),
    "weights come back by subtraction": (
        {
            "sam/perturbation.py": [
                (
                    "torch._foreach_copy_(self.params, self._backup)",
                    "torch._foreach_sub_(self.params, torch._foreach_sub(self.params, self._backup))",
                )
            ]
        },
        "sam/test_perturbation.py::test_weights_come_back_bit_for_bit_in_their_own_storage",
    ),
    "what was perturbed is subtracted twice": (
        {
            "sam/perturbation.py": [
                (
                    "torch._foreach_copy_(self.params, self._backup)",
                    "torch._foreach_sub_(self.params, torch._foreach_sub(self.params, self._backup), alpha=2)",
                )
            ]
        },
        "sam/test_step.py::test_on_a_quadratic_the_steps_are_those_worked_by_hand",
    ),
    "each tensor has a norm of its own": (
        {
            "sam/perturbation.py": [
                (
                    "torch._foreach_add_(self.params, grads, alpha=scale.item())",
                    "torch._foreach_add_(self.params, [rho * g / g.norm() for g in grads])",
                )
            ]
        },
        "sam/test_step.py::test_twenty_steps_equal_those_of_a_published_sam",
    ),
    "pass 2 updates batch-norm statistics too": (
        {"sam/snapshot.py": [("module.track_running_stats = False", "pass")]},
        "sam/test_step.py::test_statistics_and_generator_after_a_sam_step_are_those_after_one_plain_forward",
    ),
    "pass 2 draws its own masks": (
        {
            "sam/gradient.py": [
                (
                    "            set_generator_states(masks, self._device)\n            self._descend(",
                    "            self._descend(",
                )
            ]
        },
        "sam/test_step.py::test_all_passes_see_the_same_dropout_and_drop_path_masks",
    ),
    "16-bit copies of the weights outlive pass 1": (
        {"sam/gradient.py": [("torch.clear_autocast_cache()  # 16-bit", "pass  # 16-bit")]},
        "sam/test_lifecycle.py::test_an_autocast_around_all_passes_is_no_trap",
    ),
    "the first gradient is kept through pass 2": (
        {"sam/gradient.py": [("                g1.clear()\n", "")]},
        "sam/test_step.py::test_beyond_the_first_pass_no_copy_but_the_backup_is_alive",
    ),
    "values that are not finite are used": (
        {"sam/step.py": [("applied = math.isfinite(grad_norm)", "applied = True")]},
        "sam/test_lifecycle.py::test_a_value_that_is_not_finite_skips_the_update_and_halves_the_scale_once",
    ),
    "each rank decides by itself whether to skip": (
        {
            "sam/runner.py": [("torch.where(at_w.isfinite(), torch.full_like(at_w, share), math.nan)", "share")],
            "sam/step.py": [
                (
                    "return [loss_sum, wrong, n, stopping, norm]",
                    "return [loss_sum, wrong, n, stopping, norm if bool(self._at_w[0].isfinite()) else math.nan]",
                )
            ],
        },
        "distributed/test_collectives.py::test_a_bad_value_on_one_rank_skips_the_same_update_on_all",
    ),
    "pass 1 communicates": (
        {
            "sam/runner.py": [
                ("with self._ranks.no_sync():\n            value =", "if True:\n            value ="),
                (
                    "list(torch.autograd.grad(value, self._perturbed, materialize_grads=True))",
                    "(value.backward(), [w.grad.clone() for w in self._perturbed])[1]",
                ),
            ]
        },
        "distributed/test_collectives.py::test_a_step_reduces_gradients_once_and_one_more_time_for_a_global_perturbation",
    ),
    "a global perturbation is that of the rank": (
        {
            "distributed/ddp.py": [
                ("grads = collectives.all_reduce_sum_lists(grads, self._group, like=self._params)", "pass")
            ]
        },
        "distributed/test_collectives.py::test_global_mode_equals_one_process_on_the_joined_batch",
    ),
    "micro-batches of different sizes weigh the same": (
        {"sam/gradient.py": [("alpha=share)", "alpha=1)")]},
        "sam/test_memory.py::test_micro_batches_give_the_gradient_of_all_samples_at_once",
    ),
    "each micro-batch communicates": (
        {
            "sam/gradient.py": [
                ("nullcontext() if micro is micro_batches[-1][0] else self.ranks.no_sync()", "nullcontext()")
            ]
        },
        "distributed/test_collectives.py::test_a_step_reduces_gradients_once_and_one_more_time_for_a_global_perturbation",
    ),
    "each rank keeps the statistics of its own images": (
        {"sam/step.py": [("            ddp.average_over_ranks(self._stats.kept_floats(), weight)\n", "")]},
        "distributed/test_collectives.py::test_statistics_that_update_are_the_mean_over_the_ranks_and_the_same_everywhere",
    ),
    "every rank scores all images": (
        {"train/evaluation.py": [("own = starts[collectives.rank() :: world]", "own = starts")]},
        "distributed/test_collectives.py::test_an_evaluation_is_the_same_to_the_last_bit_for_any_number_of_ranks",
    ),
    "a failed attempt leaves its statistics": (
        {"sam/snapshot.py": [("torch._foreach_copy_(group, copies)", "pass")]},
        "sam/test_memory.py::test_what_was_done_before_memory_ran_out_is_undone",
    ),
    "the error still holds the memory when the step begins again": (
        {
            "distributed/device.py": [
                ("(error)\n        # Only here", "(error)\n            kept = error\n        # Only here")
            ]
        },
        "sam/test_memory.py::test_when_a_step_begins_again_nothing_of_the_failed_attempt_is_alive",
    ),
    "a recorded pass reads the batch that was recorded": (
        {"sam/cuda_graphs.py": [("own.copy_(given, non_blocking=True)", "pass")]},
        "sam/test_cuda_graphs.py::test_a_recording_reads_the_batch_that_it_is_given",
    ),
    "the pass at w is replayed at w + e": (
        {"sam/cuda_graphs.py": [('("ascend", self._is_perturbed())', '"ascend"')]},
        "sam/test_cuda_graphs.py::test_replayed_steps_are_eager_steps_bit_for_bit[several ascent steps-True]",
    ),
    "further ascent measures the weights where it stands": (
        {"sam/perturbation.py": [("torch._foreach_abs(self._backup)", "torch._foreach_abs(self.params)")]},
        "sam/test_perturbation.py::test_further_ascent_measures_the_ball_at_the_unperturbed_weights",
    ),
    "a resumed run draws other masks": (
        {"train/state.py": [('set_generator_states(state["generators"], setup.device)', "pass")]},
        RESUMED,
    ),
    "a resumed run forgets its momentum": (
        {"train/state.py": [('setup.load_optimizer_state(state["optimizer"])', "pass")]},
        RESUMED,
    ),
    "a resumed run averages anew": (
        {
            "train/state.py": [
                (
                    "checkpoint.load_weights(partial(setup.load, setup.ema.module), "
                    'folder / "ema" / "model.safetensors")',
                    "pass",
                )
            ]
        },
        RESUMED,
    ),
    "a resumed run begins its epoch anew": (
        {
            "data/loader.py": [
                (
                    "for step in range(done, total_steps)",
                    "for step in range(done // per_epoch * per_epoch, total_steps)",
                )
            ]
        },
        RESUMED,
    ),
    "a resumed run keeps the metrics of steps that it does again": (
        {
            "runs/run_log.py": [
                ("os.truncate(metrics, log._metrics_bytes)", "pass"),
                ("min(length, metrics_bytes)", "length"),
            ]
        },
        # In validation a row of training has been written since the checkpoint.
        "faults/test_stop.py::test_a_killed_run_goes_on_to_the_same_end_by_the_same_command[in_validation]",
    ),
    "nobody compares the sums of a checkpoint": (
        {"runs/checkpoint.py": [('if _sha256(folder / name) != expected["sha256"]', "if False")]},
        "faults/test_disk.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end"
        "[weights_with_a_flipped_bit]",
    ),
}


def run(copy, *tests):
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "",  # in whatever lane they are
        *(f"tests/{test}" for test in tests),
    ]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def package(tmp_path):
    """A copy of the package and its tests."""
    for name in ("samtune", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_what_a_mistake_replaces_stands_in_the_code_once(mistake):
    changes, _ = MUTATIONS[mistake]
    for file, pairs in changes.items():
        text = (ROOT / "samtune" / file).read_text()
        assert [text.count(old) for old, _ in pairs] == [1] * len(pairs), file


@pytest.mark.slow
def test_without_a_mutation_the_same_tests_pass(package):
    done = run(package, *dict.fromkeys(test for _, test in MUTATIONS.values()))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mistake_is_caught(package, mistake):
    changes, test = MUTATIONS[mistake]
    for file, pairs in changes.items():
        path = package / "samtune" / file
        text = path.read_text()
        for old, new in pairs:
            text = text.replace(old, new)
        path.write_text(text)
    done = run(package, test)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout
