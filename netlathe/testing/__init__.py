"""The conformance kit: what whoever writes a pass, a frontend or a backend runs on it.

    from netlathe.testing import check_pass
    check_pass(MyPass(width=3))

Each check judges a plug-in by laws that every one of its kind keeps, on small models, and raises
:class:`ConformanceError` with a diagnostic for every breach: which law, on which model, and what to do.
``pass_cases`` and its like give the laws one by one, for `pytest.mark.parametrize`.
"""

from __future__ import annotations

from netlathe.testing.backends import backend_cases, check_backend
from netlathe.testing.frontends import check_frontend, frontend_cases
from netlathe.testing.installed import check_entry_point
from netlathe.testing.laws import Case, ConformanceError, Law
from netlathe.testing.models import from_model, from_text, models
from netlathe.testing.passes import check_pass, pass_cases

__all__ = [
    "Case",
    "ConformanceError",
    "Law",
    "backend_cases",
    "check_backend",
    "check_entry_point",
    "check_frontend",
    "check_pass",
    "from_model",
    "from_text",
    "frontend_cases",
    "models",
    "pass_cases",
]
