"""One model and one data set for all whole runs, as the tests of the stages have them."""

from tests.stages.conftest import _one_process, root

__all__ = ["_one_process", "root"]
