"""How often a step of a run waits for the GPU: torch warns where it does, if asked to."""

import warnings

import pytest
import torch

from tests.support import single_steps

# c10/cuda/CUDAFunctions.cpp, a UserWarning. The notice that the debug mode is a prototype says "synchronizing" too.
WAITS = "called a synchronizing CUDA operation"
CLASSES = 4


def waits_of(work):
    """Where the work waits for the GPU: file and line of each time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # by default a place warns once, and here warnings are errors
        work()
    return [
        f"{w.filename}:{w.lineno}" for w in caught if issubclass(w.category, UserWarning) and WAITS in str(w.message)
    ]


def test_every_wait_is_counted_also_at_one_place():
    def work():
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        for _ in range(2):
            warnings.warn(f"{WAITS} (Triggered internally at CUDAFunctions.cpp:1.)", stacklevel=1)

    places = waits_of(work)
    assert len(places) == 2
    assert all(__file__ in place for place in places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("settings", [{"rho": 0.0}, {}, {"adaptive": True}, {"model_ema": True}, {"m": 4}])
def test_a_step_waits_for_the_gpu_once_where_it_reads_what_it_decides_by(tmp_path, graphs, settings):
    decode = single_steps.write_pictures(tmp_path / "pictures", 64, CLASSES)
    size = {"model": "test_efficientnet", "img_size": 64, "batch_size": 8, "workers": 2}
    setup = single_steps.prepare(tmp_path / "pictures", decode, **size, graphs=graphs, **settings)
    step = single_steps.start(setup, tmp_path)
    for _ in range(4):  # two before a recording, the recording, and one that replays it
        step()
    before = torch.cuda.get_sync_debug_mode()

    def work():
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    places = waits_of(work)
    assert len(places) == 1, places
    assert "step.py" in places[0]
