"""Ids: sorted by age, never twice, and fit to be names in every engine."""

import re

from controlplane.ids import new_id


def test_ids_are_identifiers() -> None:
    """An id is its kind's prefix and 26 lower-case letters and digits, none of which look alike."""
    assert re.fullmatch(r"db_[0-9a-hjkmnp-tv-z]{26}", new_id("db"))


def test_ids_sort_by_age_and_never_repeat() -> None:
    """Ids that are made one after the other sort that way, also as text, and no two are the same."""
    made = []
    for _ in range(1000):
        made.append(new_id("db"))
        before = made[-1][:13]
        while new_id("db")[:13] == before:  # two within the clock's resolution have chance alone between them
            pass
    assert sorted(made) == made
    assert len({new_id("db") for _ in range(10_000)}) == 10_000
