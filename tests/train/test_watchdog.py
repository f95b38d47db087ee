"""Steps that take too long, told by a clock of the test's own."""

from samtune.train.watchdog import Watchdog


def watched(timeout=100.0):
    said = []
    dog = Watchdog(timeout, lambda seconds, usual: said.append(("slow", seconds)), lambda s: said.append(("stuck", s)))
    return dog, said


def looks(dog, seconds):
    """A look every second."""
    for _ in range(seconds):
        dog.check(1.0)


def test_a_step_that_takes_far_longer_than_usual_is_said_once():
    dog, said = watched()
    dog.heartbeat()
    looks(dog, 30)
    assert said == []
    looks(dog, 30)
    assert said == [("slow", 31.0)]
    dog.heartbeat()
    looks(dog, 31)
    assert len(said) == 2


def test_before_the_first_step_nothing_is_usual_and_nothing_slow():
    dog, said = watched()
    looks(dog, 99)
    assert said == []


def test_after_the_timeout_it_is_stuck_and_zero_waits_for_ever():
    dog, said = watched()
    looks(dog, 101)
    assert said == [("stuck", 101.0)]
    patient, said = watched(timeout=0)
    looks(patient, 10_000)
    assert said == []


def test_a_beat_begins_anew():
    dog, said = watched()
    for _ in range(20):
        looks(dog, 25)
        dog.heartbeat()
    assert said == []


def test_time_in_which_the_process_was_suspended_does_not_count():
    dog, said = watched()
    dog.check(10_000.0)
    looks(dog, 90)
    assert said == []
