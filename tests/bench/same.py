"""Nothing is timed before this has passed: every peer answers the same to the same, and refuses the same."""

import json
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import MessageToDict

from controlplane.api.v1 import databases_pb2
from tests.bench.native import METHOD
from tests.bench.peers import Peer, PeerError
from tests.bench.seed import DATABASES_PER_ACCOUNT, RATE_LIMIT, Seed


def check_same_work(peers: list[Peer], seed: Seed, native_address: str) -> None:
    """Hold every answer of every peer against ours, with each token, byte for byte.

    Raises PeerError at the first difference.
    """
    ours, *others = [peer for peer in peers if peer.url and peer.name != "empty"]
    expected = [_list(ours, token) for token in seed.tokens]
    for peer in others:
        for token, answer in zip(seed.tokens, expected, strict=True):
            if _list(peer, token) != answer:
                raise PeerError(f"{peer.title} answers something else than {ours.title}.")
    for peer in (ours, *others):
        _check_refusals(peer, seed)
    if _lists_natively(native_address, seed.tokens) != [json.loads(answer) for answer in expected]:
        raise PeerError("Native gRPC answers something else than REST.")


def _list(peer: Peer, token: str) -> bytes:
    answer = _get(peer, token)
    limits = [answer.headers.get(f"ratelimit-{name}", "") for name in ("limit", "remaining", "reset")]
    if answer.status_code != httpx.codes.OK or len(answer.json()) != DATABASES_PER_ACCOUNT:
        raise PeerError(f"{peer.title} answers {answer.status_code}: {answer.text[:200]}")
    if limits[0] != str(RATE_LIMIT) or not all(number.isdigit() for number in limits):
        raise PeerError(f"{peer.title} does not tell the rate limit: {limits}.")
    return answer.content


def _check_refusals(peer: Peer, seed: Seed) -> None:
    for token, status in seed.refused:
        answer = _get(peer, token)
        if answer.status_code != status:
            raise PeerError(f"{peer.title} answers {answer.status_code} to a token that must get {status}.")


def _get(peer: Peer, token: str) -> httpx.Response:
    return httpx.get(peer.url, headers={"authorization": f"Bearer {token}"})


def _lists_natively(address: str, tokens: list[str]) -> list[list[dict[str, Any]]]:
    with grpc.insecure_channel(address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        raw = [method(b"", metadata=(("authorization", f"Bearer {token}"),)) for token in tokens]
    answers = [databases_pb2.ListDatabasesResponse.FromString(answer) for answer in raw]
    return [
        [
            MessageToDict(database, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            for database in answer.databases
        ]
        for answer in answers
    ]
