"""Schedules: what one may be, and when it comes."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from controlplane.databases.schedule import SHORTEST, check_schedule, next_run
from tests.backups.rest import DATABASES
from tests.clock import MovableClock
from tests.stack import Customer, Stack, eventually

NIGHT = datetime(2030, 1, 1, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "after", "runs"),
    [
        ("15 3 * * *", "2030-01-01T03:14:59.9", "2030-01-01T03:15"),
        ("15 3 * * *", "2030-01-01T03:15", "2030-01-02T03:15"),
        ("*/15 * * * *", "2030-12-31T23:50", "2031-01-01T00:00"),
        ("0 0 29 2 *", "2030-01-01T00:00", "2032-02-29T00:00"),
        ("0 0 L * *", "2030-02-01T00:00", "2030-02-28T00:00"),
        ("0 12 * * mon-fri", "2030-01-05T00:00", "2030-01-07T12:00"),
        ("0 0 1 jan sun", "2030-01-01T00:00", "2030-01-06T00:00"),  # either day counts, as cron has it
        ("0 0 * * 5#5", "2030-01-01T00:00", "2030-03-29T00:00"),
        ("30 2 31 3 *", "2030-01-01T00:00", "2030-03-31T02:30"),  # an hour that Berlin does not have: UTC has it
    ],
)
def test_when_it_comes(schedule: str, after: str, runs: str) -> None:
    """A cron expression comes when cron says, in UTC, and later than now."""
    now = datetime.fromisoformat(after).replace(tzinfo=UTC)
    assert next_run(check_schedule(schedule), after=now, database_id="db_1") == datetime.fromisoformat(runs).replace(
        tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ("", "must be 'hourly'"),
        ("weekly", "must be 'hourly'"),
        ("@daily", "must be 'hourly'"),
        ("Hourly", "must be 'hourly'"),
        ("0 3 * *", "cron expression such as '15 3 * * *', in UTC"),
        ("0 0 3 * * *", "cron expression such as '15 3 * * *', in UTC"),  # with seconds
        ("a b c d e", "no cron expression that ever comes: Bad minute"),
        ("60 3 * * *", "Bad minute"),
        ("0 24 * * *", "Bad hour"),
        ("0 0 30 2 *", "Bad day-of-month"),
        ("0 0 */16 * mon#5", "no cron expression that ever comes"),  # the 1st and the 17th are no fifth Monday
        ("*/0 * * * *", "Bad minute"),
        ("٣ 3 * * *", "Bad minute"),
        ("* * * * *", "runs at 00:01 and at 00:02: leave at least 15 minutes in between"),
        ("*/14 * * * *", "leave at least 15 minutes"),
        ("0,50 * * * *", "runs at 00:50 and at 01:00"),
        ("55,0 23,0 * * *", "runs at 23:55 and at 00:00"),
        ("0,55 0,23 1,3,4 * *", "runs at 23:55 and at 00:00"),  # between the third and the fourth
    ],
)
def test_what_is_none(schedule: str, reason: str) -> None:
    """What is no schedule, never comes or comes too often is refused, with what is wrong."""
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_schedule(schedule)


def some_of(first: int, last: int) -> st.SearchStrategy[str]:
    """Return what a field of a cron expression may be."""
    number = st.integers(first, last)
    numbers = st.lists(number, min_size=1, max_size=4, unique=True).map(lambda found: ",".join(map(str, found)))
    ranges = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    return st.one_of(st.just("*"), numbers, ranges, st.builds("*/{}".format, st.integers(1, last or 1)))


CRON = st.builds("{} {} {} {} {}".format, some_of(0, 59), some_of(0, 23), some_of(1, 31), some_of(1, 12), some_of(0, 7))
MOMENTS = st.datetimes(datetime(2026, 1, 1), datetime(2099, 12, 31))  # noqa: DTZ001 - hypothesis wants them so


@given(schedule=st.one_of(st.sampled_from(["hourly", "daily"]), CRON), after=MOMENTS, name=st.uuids())
@example(schedule="0,55 0,23 1,3,4 * *", after=datetime(2030, 1, 1), name="x")  # noqa: DTZ001
def test_it_comes_again_and_never_too_soon(schedule: str, after: datetime, name: object) -> None:
    """Each run is later than what it is asked for, and at least a quarter of an hour after the one before."""
    try:
        check_schedule(schedule)
    except ValueError:
        assume(False)
    runs = [after.replace(tzinfo=UTC)]
    for _ in range(12):
        runs.append(next_run(schedule, after=runs[-1], database_id=f"db_{name}"))
    assert runs[0] < runs[1]
    assert all(later - earlier >= SHORTEST for earlier, later in pairwise(runs[1:]))


@given(st.text(alphabet="0123456789*/,-#LW mon\n", max_size=30))
def test_anything_is_a_schedule_or_is_none(text: str) -> None:
    """Whatever somebody sends is taken or refused in words; what is taken comes."""
    try:
        check_schedule(text)
    except ValueError:
        return
    assert next_run(text, after=NIGHT, database_id="db_1") > NIGHT


def test_those_by_name_are_spread() -> None:
    """Hourly ones are spread over the hour, daily ones over the night, each always at the same time."""
    names = [f"db_{number}" for number in range(500)]
    hourly = [next_run("hourly", after=NIGHT, database_id=name) for name in names]
    assert len({run.minute for run in hourly}) == 60
    assert max(hourly) - min(hourly) < timedelta(hours=1)
    daily = [next_run("daily", after=NIGHT, database_id=name) for name in names]
    assert {run.hour for run in daily} == set(range(6))
    assert [next_run("daily", after=run, database_id=name) - run for run, name in zip(daily, names, strict=True)] == [
        timedelta(days=1)
    ] * 500


async def test_the_default_is_seven(customer: Customer) -> None:
    """A database may be ordered with a schedule; seven backups are kept unless it says otherwise."""
    shown = await customer.create_database("analytics", backup_schedule="hourly")
    assert (shown["backup_schedule"], shown["backup_retention"]) == ("hourly", {"count": 7})
    assert timedelta(0) < datetime.fromisoformat(shown["next_backup_at"]) - datetime.now(UTC) <= timedelta(hours=1)
    shown = await customer.create_database("other")
    assert not {"backup_schedule", "backup_retention", "next_backup_at"} & shown.keys()


async def test_a_schedule_is_changed(customer: Customer) -> None:
    """Only what a change names is changed: the schedule, how many, how long; `none` ends all of it."""
    path = f"{DATABASES}/analytics"
    await customer.create_database("analytics")

    async def change(**wanted: object) -> dict[str, object]:
        answer = await customer.call("PATCH", path, json=wanted)
        assert answer.status_code == 200, answer.text
        shown: dict[str, object] = answer.json()
        assert shown.items() >= {key: value for key, value in wanted.items() if value != "none"}.items()
        return shown

    shown = await change(backup_schedule="15 3 * * *", backup_retention={"count": 3})
    assert str(shown["next_backup_at"]).endswith("T03:15:00Z")
    shown = await change(backup_schedule="20 4 * * *")
    assert shown["backup_retention"] == {"count": 3}
    assert str(shown["next_backup_at"]).endswith("T04:20:00Z")
    shown = await change(backup_retention={"days": 30})
    assert str(shown["next_backup_at"]).endswith("T04:20:00Z")
    await change(backup_retention={"count": 5, "days": 30})
    assert (await change(tags={"a": "b"}))["backup_retention"] == {"count": 5, "days": 30}
    for _ in range(2):
        shown = await change(backup_schedule="none")
        assert not {"backup_schedule", "backup_retention", "next_backup_at"} & shown.keys()
    assert (await change(backup_schedule="daily"))["backup_retention"] == {"count": 7}


async def test_what_is_refused(customer: Customer) -> None:
    """What is no schedule, or retention without one, is a 400 that names the field, and changes nothing."""
    path = f"{DATABASES}/analytics"
    before = await customer.create_database("analytics")
    for body, field in (
        ({"backup_schedule": "weekly"}, "backup_schedule"),
        ({"backup_schedule": "*/5 * * * *"}, "backup_schedule"),
        ({"backup_schedule": "0 0 31 4 *"}, "backup_schedule"),
        ({"backup_schedule": ""}, "backup_schedule"),
        ({"backup_schedule": "0 " * 100}, "backup_schedule"),
        ({"backup_retention": {"count": 3}}, "backup_retention"),
        ({"backup_schedule": "none", "backup_retention": {"count": 3}}, "backup_retention"),
        ({"backup_schedule": "daily", "backup_retention": {"count": 0}}, "backup_retention.count"),
        ({"backup_schedule": "daily", "backup_retention": {"days": 4000}}, "backup_retention.days"),
    ):
        refused = await customer.call("PATCH", path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_field"), refused.text
        assert [each["field"].removeprefix("database.") for each in refused.json()["fields"]] == [field]
        order = {"name": "other", "engine": "postgresql", "sku": "db-s-1vcpu-1gb", **body}
        refused = await customer.call("POST", DATABASES, json=order)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_field"), refused.text
    shown = (await customer.call("GET", path)).json()
    assert shown["generation"] == before["generation"]
    assert "backup_schedule" not in shown


async def test_a_scheduled_backup(timed: tuple[Stack, MovableClock]) -> None:
    """When its time has come there is a backup, marked as scheduled, with the day on which it goes again."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics", backup_schedule="hourly", backup_retention={"days": 2})
    clock.let_pass(hours=1)

    async def made() -> list[dict[str, str]]:
        found = (await customer.call("GET", f"{DATABASES}/analytics/backups")).json()
        return [backup for backup in found if backup["status"] == "completed"]

    (backup,) = await eventually(made)
    assert backup["trigger"] == "scheduled"
    until = datetime.fromisoformat(backup["expires_at"]) - datetime.fromisoformat(backup["created_at"])
    assert until == timedelta(days=2)
    shown = (await customer.call("GET", f"{DATABASES}/analytics")).json()
    assert datetime.fromisoformat(shown["next_backup_at"]) > clock.now()
