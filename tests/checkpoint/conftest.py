"""One rank in the test process itself."""

from tests.models.conftest import context

__all__ = ["context"]
