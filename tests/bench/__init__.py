"""`make bench`: how fast a list is answered here, beside the usual way to build the same.

`__main__` runs it; `seed` fills the database; `peers` says who is compared, with `usual`, `data_path` and `empty` as
their sources; `same` holds them to the same work; `load` and `native` make the load; `revocation` checks a promise that
caching could break; `report` says what came of it.
"""
