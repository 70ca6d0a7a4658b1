"""A host that carries SOCKS5 traffic: credentials in, bytes across, counters out.

Only host.py knows the control plane, and follows it. In the order in which a client meets it:

    server.py        listens, lets so many shake hands at a time, and ends what has to end
    incoming.py      the bytes of a client that shakes hands
    socks.py         what it says, and what it is answered (RFC 1928, RFC 1929)
    wire.py          addresses, as both write them
    logins.py        how much slower each further wrong login is answered
    credentials.py   who may come in, what each has open and has carried; cuts what may not stay
    destinations.py  where nobody may go, names included
    connect.py       the connection to an address that was checked
    relay.py         the bytes of a CONNECT
    udp.py           the datagrams of a UDP ASSOCIATE
    bandwidth.py     how soon more may follow
    metrics.py       what is counted for Prometheus
"""
