"""The same on uvloop, on which a host runs: its transports are others than asyncio's."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import uvloop

from tests.proxies.host import test_credentials, test_relay, test_server, test_socks, test_udp

SCENARIOS: list[Callable[[], Coroutine[Any, Any, None]]] = [
    test_credentials.test_a_removal_cuts_open_connections_at_once,
    test_credentials.test_expiry_and_silence_end_real_connections,
    test_credentials.test_the_limit_is_exact_among_many_at_once,
    test_relay.test_every_byte_arrives_and_is_counted_once,
    test_relay.test_a_target_may_end_first,
    test_relay.test_a_target_that_speaks_first_is_heard_after_the_reply,
    test_relay.test_a_break_is_passed_on_as_a_break,
    test_relay.test_a_client_that_breaks_off_breaks_off_the_target,
    partial(test_relay.test_a_slow_reader_slows_the_sender, 10_000_000),
    test_relay.test_five_hundred_at_once_get_their_own_answers,
    test_relay.test_a_new_bandwidth_holds_at_once,
    test_server.test_an_address_has_so_many_unfinished_handshakes,
    test_server.test_the_oldest_handshake_makes_room,
    test_server.test_stopping_cuts_everything,
    test_socks.test_a_client_that_leaves_while_it_is_connected_leaves_nothing,
    test_socks.test_a_silent_target_is_given_up,
    test_udp.test_strangers_do_not_get_in,
    test_udp.test_what_is_no_whole_datagram_is_dropped,
    test_udp.test_a_removal_ends_it_at_once,
    test_udp.test_it_ends_with_its_connection,
    test_udp.test_what_the_bandwidth_does_not_carry_is_dropped,
]


def _name(scenario: Callable[[], Coroutine[Any, Any, None]]) -> str:
    return getattr(scenario, "func", scenario).__name__.removeprefix("test_")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
async def test_it_holds_on_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """What holds on asyncio's own loop holds on uvloop."""
    await asyncio.to_thread(uvloop.run, scenario())
