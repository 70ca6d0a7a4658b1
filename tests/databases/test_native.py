"""Databases over native gRPC: the same servicer, without the edge."""

import asyncpg
import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from tests.stack import Customer, Stack, eventually


async def test_the_whole_life_of_a_database(stack: Stack, customer: Customer) -> None:
    """A database is created, listed, changed, connected to and deleted by native calls."""
    databases, metadata = databases_pb2_grpc.DatabaseServiceStub(stack.channel), customer.metadata
    wanted = databases_pb2.CreateDatabase(name="analytics", engine="postgresql", sku="db-s-1vcpu-1gb")
    made = await databases.CreateDatabase(databases_pb2.CreateDatabaseRequest(database=wanted), metadata=metadata)
    assert (made.status, made.HasField("progress")) == ("provisioning", True)
    get = databases_pb2.GetDatabaseRequest(name="analytics")

    async def ready() -> databases_pb2.Database | None:
        shown: databases_pb2.Database = await databases.GetDatabase(get, metadata=metadata)
        return shown if shown.status == "ready" else None

    found = await eventually(ready)
    assert found is not None
    assert not found.HasField("progress")
    listed = await databases.ListDatabases(databases_pb2.ListDatabasesRequest(), metadata=metadata)
    assert list(listed.databases) == [found]
    tags = Struct()
    tags.update({"env": "test"})
    change = databases_pb2.UpdateDatabase(tags=tags, deletion_protection=True)
    update = databases_pb2.UpdateDatabaseRequest(name="analytics", database=change)
    changed = await databases.UpdateDatabase(update, metadata=metadata)
    assert (dict(changed.tags), changed.deletion_protection) == ({"env": "test"}, True)
    delete = databases_pb2.DeleteDatabaseRequest(name="analytics")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await databases.DeleteDatabase(delete, metadata=metadata)
    assert refused.value.code() == grpc.StatusCode.ABORTED
    change = databases_pb2.UpdateDatabase(deletion_protection=False)
    update = databases_pb2.UpdateDatabaseRequest(name="analytics", database=change)
    await databases.UpdateDatabase(update, metadata=metadata)
    connection = await databases.GetDatabaseConnection(
        databases_pb2.GetDatabaseConnectionRequest(name="analytics"), metadata=metadata
    )
    tenant = await asyncpg.connect(connection.uri)
    await tenant.execute("CREATE TABLE notes ()")
    await tenant.close()
    assert (await databases.DeleteDatabase(delete, metadata=metadata)).status == "deleting"

    async def gone() -> bool:
        try:
            await databases.GetDatabase(get, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code() == grpc.StatusCode.NOT_FOUND
        return False

    assert await eventually(gone)


async def test_a_list_is_paged_oldest_first(stack: Stack, customer: Customer) -> None:
    """Pages of any size lead through all databases, oldest first, by the token in the answer."""
    databases, metadata = databases_pb2_grpc.DatabaseServiceStub(stack.channel), customer.metadata
    names = [f"page-{number}" for number in range(5)]
    for name in names:
        wanted = databases_pb2.CreateDatabase(name=name, engine="postgresql", sku="db-s-1vcpu-1gb")
        await databases.CreateDatabase(databases_pb2.CreateDatabaseRequest(database=wanted), metadata=metadata)
    for size in (1, 2, 5, 6):
        found, token = [], ""
        while True:
            request = databases_pb2.ListDatabasesRequest(page_size=size, page_token=token)
            page = await databases.ListDatabases(request, metadata=metadata)
            assert len(page.databases) <= size
            found += [database.name for database in page.databases]
            if not page.HasField("next_page_token"):
                break
            token = page.next_page_token
        assert found == names
