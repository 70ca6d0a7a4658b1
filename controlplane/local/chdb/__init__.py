"""The embedded ClickHouse: chDB, which is its engine as a library, behind its HTTP interface; `python -m` starts it.

    __main__.py     the options, and the server
    gateway.py      who may do what: the admin's statements, and tenants' queries passed on to their engines
    accounts.py     what the admin's statements change: users and databases, kept in files
    engine.py       one process per database, which runs its queries
    confine.py      what such a process may reach: its own folder

chDB has no SQL users. So the gateway reads the few statements that `controlplane.databases.engines.clickhouse` sends
and gives each database's engine a configuration in which its only user has the rights and limits that they granted.
"""
