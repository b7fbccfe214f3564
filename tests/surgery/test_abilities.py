"""The localized model has the abilities of the plain one: a few classes (`make supported` tries all)."""

import pytest

from tests.surgery.abilities import ABILITIES, outcome
from tests.surgery.cases import CASES, QUICK


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("name", QUICK)
def test_no_ability_is_lost(name, ability):
    case = CASES[name]
    found, reason = outcome(case.make(), case.images(), ABILITIES[ability])
    assert found != "lost", reason
