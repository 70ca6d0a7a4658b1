"""A connection to one of the addresses that were checked."""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address

from controlplane.access.caller import Address


async def connect(addresses: Sequence[Address], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that takes the connection, until `deadline` in the loop's time.

    An address that is silent has its share of the time only.

    Raises OSError, TimeoutError if nobody has answered: what the last address tried had to say.
    """
    loop = asyncio.get_running_loop()
    for tried, address in enumerate(addresses, 1):
        share = (deadline - loop.time()) / (len(addresses) - tried + 1)
        try:
            async with asyncio.timeout(share):
                return await _connect(address, port)
        except OSError:
            if tried == len(addresses):
                raise
    raise OSError("There is no address to connect to.")


async def _connect(address: Address, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, (str(address), port))
    except BaseException:
        made.close()
        raise
    return made
