"""Where nobody's traffic is let, from no host: whatever is not public."""

from ipaddress import ip_network

MAIL = 25  # the port from where most spam would be sent
# All of the special-purpose registries of IPv4 (RFC 6890) that is not reachable by everybody, and of IPv6 what lies
# within 2000::/3.
REFUSED = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # shared by a provider's customers (RFC 6598); Alibaba's metadata service is in it
        "127.0.0.0/8",  # loopback (RFC 1122)
        "169.254.0.0/16",  # link-local (RFC 3927); most clouds' metadata service is in it
        "172.16.0.0/12",  # private (RFC 1918)
        "192.0.0.0/24",  # protocol assignments (RFC 6890); Oracle's metadata service is in it
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
        "192.168.0.0/16",  # private (RFC 1918)
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "198.51.100.0/24",  # documentation (RFC 5737)
        "203.0.113.0/24",  # documentation (RFC 5737)
        "224.0.0.0/4",  # multicast (RFC 5771)
        "240.0.0.0/4",  # reserved (RFC 1112), and broadcast (RFC 919)
        "168.63.129.16/32",  # Azure's host agent, at a public address
        "2001::/23",  # protocol assignments (RFC 2928): Teredo (RFC 4380), ORCHID (RFC 7343), benchmarks (RFC 5180)
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4 (RFC 3056): IPv4 addresses, reached through relays that are no more (RFC 7526)
        "3fff::/20",  # documentation (RFC 9637)
    )
)
