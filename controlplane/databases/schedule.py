"""When a database is backed up by itself: `hourly`, `daily`, or a cron expression in UTC."""

import hashlib
from datetime import datetime, timedelta

from cronsim import CronSim, CronSimError

HOURLY, DAILY, NONE = "hourly", "daily", "none"
SHORTEST = timedelta(minutes=15)
_SOME_DAY = datetime(2028, 1, 1)  # noqa: DTZ001 - a leap year, and cron knows no zones
_NIGHT_HOURS = 6


def check_schedule(schedule: str) -> str:
    """Return the schedule.

    Raises ValueError, with what is wrong in words, for what is none or runs too often.
    """
    if schedule in {HOURLY, DAILY}:
        return schedule
    fields = schedule.split()
    if len(fields) != 5:  # noqa: PLR2004 - cronsim would take seconds too
        raise ValueError(f"must be '{HOURLY}', '{DAILY}', '{NONE}' or a cron expression such as '15 3 * * *', in UTC")
    try:
        next(CronSim(schedule, _SOME_DAY))
    except (CronSimError, StopIteration) as error:
        raise ValueError(f"is no cron expression that ever comes: {error}".rstrip(": ")) from None
    # As if each day counted: two days in a row may be among them, and may be a long way off.
    runs = CronSim(f"{fields[0]} {fields[1]} * * *", _SOME_DAY)
    before = next(runs)
    until = before + timedelta(days=1)
    for run in runs:
        if run - before < SHORTEST:
            raise ValueError(f"runs at {before:%H:%M} and at {run:%H:%M}: leave at least 15 minutes in between")
        if run >= until:
            break
        before = run
    return schedule


def next_run(schedule: str, *, after: datetime, database_id: str) -> datetime:
    """Return when a schedule is due next; those by name are spread, so that not all databases are backed up at once."""
    spread = int.from_bytes(hashlib.sha256(database_id.encode()).digest()[:4], "big")
    if schedule == HOURLY:
        schedule = f"{spread % 60} * * * *"
    elif schedule == DAILY:
        schedule = f"{spread % 60} {spread // 60 % _NIGHT_HOURS} * * *"
    run: datetime = next(CronSim(schedule, after.replace(tzinfo=None)))
    return run.replace(tzinfo=after.tzinfo)
