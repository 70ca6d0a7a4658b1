"""Addresses, as SOCKS 5 writes them (RFC 1928, 5)."""

from ipaddress import IPv4Address

from controlplane.access.caller import Address

NAME = 3
SIZES = {1: 4, 4: 16}  # bytes of an address, by its type


def packed_address(address: Address, port: int) -> bytes:
    """Return type, address and port."""
    return bytes([1 if isinstance(address, IPv4Address) else 4]) + address.packed + port.to_bytes(2, "big")
