"""The tests of SAM, runs and sharpness can fail: each known mistake, put into a copy of the package, is caught."""

import shutil

import pytest

from tests.conftest import ROOT
from tests.support.forked_pytest import run

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
                    "set_generator_states(masks, self._device)\n                with nullcontext() if cut is None else "
                    "cut.later_pass(with_front=True):",
                    "with nullcontext() if cut is None else cut.later_pass(with_front=True):",
                )
            ]
        },
        "sam/test_step.py::test_all_passes_see_the_same_dropout_and_drop_path_masks",
    ),
    "16-bit copies of the weights outlive pass 1": (
        {"sam/gradient.py": [("torch.clear_autocast_cache()  # 16-bit", "pass  # 16-bit")]},
        "sam/test_lifecycle.py::test_an_autocast_around_all_passes_is_no_trap",
    ),
    "a pass along the momentum looks behind": (
        {"sam/known_direction.py": [("list(torch._foreach_neg(direction)) if", "direction if")]},
        "sam/test_one_pass.py::test_momentum_is_the_algorithm_of_the_paper_which_keeps_the_shifted_weights",
    ),
    "the gradient of a skipped step is kept": (
        {"sam/known_direction.py": [("torch.where(found_inf == 0, w.grad, state[_PREVIOUS])", "w.grad")]},
        "sam/test_one_pass.py::test_a_loss_scale_changes_nothing_and_an_overflow_leaves_the_previous_gradient[True]",
    ),
    "the only pass leaves batch-norm statistics": (
        {"sam/gradient.py": [("statistics_stay=False) if direction", "statistics_stay=True) if direction")]},
        "sam/test_one_pass.py::test_the_model_is_called_once_and_statistics_are_those_of_one_pass[momentum-None]",
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
                    "torch.autograd.grad(value, self._perturbed, allow_unused=True)",
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
                    "checkpoint.load_weights(partial(setup.load, setup.average.module), "
                    'folder / "ema" / "model.safetensors")',
                    "pass",
                )
            ]
        },
        RESUMED,
    ),
    "a resumed run counts the steps of its tail anew": (
        {"train/state.py": [('setup.average.count = state.get("averaged_steps", 0)', "pass")]},
        "train/test_average_tail.py::test_a_run_that_is_killed_in_its_tail_or_before_goes_on_to_the_same_end[19-begins_in1]",
    ),
    "the tail begins a step late": (
        {"models/training.py": [("if step > self.start:", "if step > self.start + 1:")]},
        "train/test_average_tail.py::test_before_the_tail_there_is_no_average_and_a_step_that_was_skipped_counts",
    ),
    "averaged weights keep averaged statistics": (
        {"train/loop.py": [("estimate_batch_norm(setup.average.module, passes())", "pass")]},
        "train/test_average_tail.py::test_statistics_at_the_end_are_those_of_the_averaged_weights_on_the_first_batches",
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
    "pass 2 over the suffix draws other masks": (
        {"sam/suffix.py": [("set_generator_states(self._at_cut, z.device)  #", "pass  #")]},
        "sam/test_suffix.py::test_the_gradient_is_that_of_sam_on_the_suffix_alone[test_vit-blocks.1-True]",
    ),
    "pass 1 goes on with the graph of the front": (
        {"sam/suffix.py": [("return (self._z.detach(), *arguments[1:])", "return (self._z, *arguments[1:])")]},
        "sam/test_suffix.py::test_the_gradient_is_that_of_sam_on_the_suffix_alone[test_resnet-layer3-True]",
    ),
    "the front has no gradient": (
        {"sam/suffix.py": [("(z if with_front else z.detach(),", "(z.detach(),")]},
        "sam/test_suffix.py::test_the_gradient_is_that_of_sam_on_the_suffix_alone[test_resnet-layer3-True]",
    ),
    "the front is computed in each pass": (
        {
            "sam/suffix.py": [
                (
                    "            if reached:\n                return forward(",
                    "            if True:\n                return forward(",
                )
            ]
        },
        "sam/test_suffix.py::test_the_front_costs_one_pass_and_the_suffix_two",
    ),
    "the front stays replaced": (
        {"sam/suffix.py": [('vars(module).pop("forward", None)', "pass")]},
        "sam/test_suffix.py::test_weights_and_modules_are_as_before_also_after_an_error",
    ),
    "what goes past the cut is not looked for": (
        {"sam/suffix.py": [("found = [name for name, w in parameters.items() if w in reached]", "found = []")]},
        "sam/test_suffix.py::test_a_place_that_data_pass_by_is_refused[test_vit-blocks.1.attn-past it]",
    ),
    "a Lanczos vector is orthogonal to the last two only": (
        {"sharpness/lanczos.py": [("for other in self._basis:", "for other in self._basis[-2:]:")]},
        "sharpness/test_lanczos.py::test_all_steps_give_the_whole_spectrum_once_and_no_copies",
    ),
    "the largest eigenvalues are those of largest size": (
        {
            "sharpness/lanczos.py": [
                (
                    "found = range(len(values) - 1, max(-1, len(values) - 1 - k), -1)",
                    "found = np.argsort(-abs(values))[:k].tolist()",
                )
            ]
        },
        "sharpness/test_lanczos.py::test_the_largest_are_those_with_their_sign_and_not_those_of_largest_size",
    ),
    "a residual is that of the tridiagonal matrix": (
        {"sharpness/lanczos.py": [("float(torch.linalg.vector_norm(matvec(v) - value * v))", "0.0")]},
        "sharpness/test_lanczos.py::test_what_has_not_converged_says_so_and_its_residual_bounds_the_error",
    ),
    "the weights of a quadrature are not squared": (
        {
            "sharpness/lanczos.py": [
                ("[vectors[0] ** 2 for _, vectors in ritz]", "[abs(vectors[0]) for _, vectors in ritz]")
            ]
        },
        "sharpness/test_lanczos.py::test_a_density_integrates_to_1_and_has_the_moments_of_the_matrix",
    ),
    "parts of a Hessian weigh the same": (
        {"sharpness/hessian.py": [("alpha=share)", "alpha=1 / len(self._batches))")]},
        "sharpness/test_hessian.py::test_products_are_those_of_the_dense_hessian_whatever_the_batches[sizes1]",
    ),
    "a Hessian is that of the rank": (
        {"sharpness/hessian.py": [("return collectives.all_reduce_sum(product)", "return product")]},
        "sharpness/test_hessian.py::test_the_sum_over_ranks_is_the_product_of_one_process",
    ),
    "a convolution's gradient does not depend on its input": (
        {"sam/second_derivative.py": [("of_by_y + more", "of_by_y")]},
        "sharpness/test_hessian.py::test_grouped_convolutions_and_frozen_statistics_have_their_second_derivatives[.]",
    ),
    "frozen statistics are not a part of the scale": (
        {"sam/second_derivative.py": [("weight * torch.rsqrt(var + eps)", "weight")]},
        "sharpness/test_hessian.py::test_grouped_convolutions_and_frozen_statistics_have_their_second_derivatives[.]",
    ),
    "a kept graph outlives a change of the weights": (
        {"sharpness/hessian.py": [("self._sizes.clear()\n            self._kept.clear()", "pass")]},
        "sharpness/test_hessian.py::test_kept_graphs_do_not_outlive_a_change_of_the_weights",
    ),
    "a rule takes the variance for the deviation": (
        {"sam/gradient_rule.py": [("self.c * math.sqrt(variance)", "self.c * variance")]},
        "sam/test_gradient_rule.py::test_thirty_steps_are_those_of_the_rule_written_out",
    ),
    "a step without pass 2 drops the gradient that was there": (
        {"sam/gradient.py": [("w.grad = grad if w.grad is None else w.grad.add_(grad)", "w.grad = grad")]},
        "sam/test_gradient_rule.py::test_a_gradient_is_added_to_the_one_that_is_there",
    ),
    "the search follows the gradient at w": (
        {
            "sharpness/m_sharpness.py": [
                (
                    "e, gradient, rise, fraction = list(ahead), gradient_ahead,",
                    "e, _, rise, fraction = list(ahead), gradient_ahead,",
                )
            ]
        },
        "sharpness/test_m_sharpness.py::test_the_maximum_on_a_sphere_away_from_the_minimum_is_that_of_a_fine_search",
    ),
    "a search keeps a step that falls": (
        {"sharpness/m_sharpness.py": [("if value - at_w >= rise:", "if True:")]},
        "sharpness/test_m_sharpness.py::test_a_maximum_inside_the_ball_is_found_and_no_value_is_below_zero",
    ),
    "groups of different sizes weigh the same": (
        {
            "sharpness/m_sharpness.py": [
                (
                    "sum(group.samples * value for group, value in zip(groups, values, strict=True)) / total",
                    "sum(values) / len(groups)",
                )
            ]
        },
        "sharpness/test_m_sharpness.py::test_the_mean_over_groups_weighs_them_by_their_samples",
    ),
    "a direction has the norm of the tensor, not of the filter": (
        {"sharpness/slices.py": [("dims = tuple(range(1, w.ndim))", "dims = tuple(range(w.ndim))")]},
        "sharpness/test_slices.py::test_a_slice_does_not_change_if_a_filter_is_scaled_and_its_normalisation_undoes_it",
    ),
    "a line leaves the statistics behind": (
        {
            "sharpness/slices.py": [
                (
                    "dict(model.named_parameters()) | dict(model.named_buffers())",
                    "dict(model.named_parameters())",
                )
            ]
        },
        "sharpness/test_slices.py::test_a_line_leads_from_one_model_to_another_with_their_statistics",
    ),
    "a slice leaves the weights where it ended": (
        {"sharpness/slices.py": [("tensors[name].copy_(w)", "pass")]},
        "sharpness/test_slices.py::test_weights_and_statistics_come_back_bit_for_bit",
    ),
    "every rank measures all groups": (
        {"sharpness/measure.py": [("group = groups[turn * world + rank]", "group = groups[turn]")]},
        "sharpness/test_measure.py::test_two_ranks_find_what_one_finds",
    ),
    "training images are measured with their clean labels": (
        {"train/eval_checkpoint.py": [("trained[changes[0]] = changes[1]", "pass")]},
        "sharpness/test_command.py::test_training_images_have_the_labels_that_the_run_was_trained_on",
    ),
    "a gap is the test error": (
        {"sharpness/run.py": [('test["top1_error"] - one["top1_error"]', 'test["top1_error"]')]},
        "sharpness/test_command.py::test_over_four_runs_m_sharpness_is_set_against_the_gap_of_test_and_train_error",
    ),
}


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
