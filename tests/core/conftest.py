"""How hypothesis works while `nox -s mutation` tests mutants."""

from __future__ import annotations

from hypothesis import Phase, settings

# The same examples every time, and no search for the shortest that fails: that it fails is enough.
settings.register_profile("mutation", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
