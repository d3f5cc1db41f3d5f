"""A module that cannot be imported, as math-verify where it is not installed."""

import no_such_module_anywhere  # noqa: F401
