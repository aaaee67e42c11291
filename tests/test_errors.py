from openmae.errors import CheckpointError, DataError, OpenMAEError, RunError, SpecError, UserError


def test_a_message_is_the_problem_and_its_fix():
    error = SpecError("train.num_epochs must be >= 1, got 0.", "Set it to 1 or more.")
    assert str(error) == "train.num_epochs must be >= 1, got 0.\n  Fix: Set it to 1 or more."
    assert (error.problem, error.fix) == ("train.num_epochs must be >= 1, got 0.", "Set it to 1 or more.")
    assert str(DataError("No images.")) == "No images."


def test_exit_codes():
    assert RunError("disk full").exit_code == 1
    for kind in (UserError, SpecError, DataError, CheckpointError):
        assert kind("x").exit_code == 2
        assert issubclass(kind, OpenMAEError)
        assert issubclass(kind, ValueError)
