"""docs/protocol.md is normative: its tables must say what the code does."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from remote_modules import peers, spans
from remote_modules.config import ClientConfig
from remote_modules.errors import LocalProtocolError, RefusalReason
from remote_modules.identity import Identity, verify_hello
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.wire import framing, messages, parts, protocol, tensors
from remote_modules.wire.protocol import Role, State

from .helpers import EXAMPLES, MESSAGE_TYPES, ConnectionPair, frame_of, name_of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
STRUCTS: tuple[type[msgspec.Struct], ...] = (
    *MESSAGE_TYPES,
    messages.TensorMeta,
    messages.CacheOp,
    messages.Option,
    messages.CallMeta,
    messages.CopySource,
    messages.CacheMeta,
    messages.RecordProof,
    messages.Destination,
    PeerRecord,
    SignedRecord,
)
MODULES = {
    module.__name__.rsplit(".", 1)[-1]: module for module in (framing, messages, parts, protocol, tensors, peers, spans)
}

Row = list[str]


def sections() -> dict[str, str]:
    """The text under each heading, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", DOCUMENT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(heading: str, first_column: str) -> list[Row]:
    """Rows of the one table under ``heading`` that starts with that column, without backticks in the first cell."""
    lines = iter(sections()[heading].splitlines())
    rows: list[Row] = []
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            assert re.fullmatch(r"\|(---\|)+", next(lines))
            for row in lines:
                if not row.startswith("|"):
                    return rows
                first, *others = (cell.strip() for cell in row.strip("|").split("|"))
                assert len(others) == line.count("|") - 2
                rows.append([first.strip("`"), *others])
    return rows


def heading_of(struct: type[msgspec.Struct]) -> str:
    tag = struct.__struct_config__.tag
    return struct.__name__ if tag is None else f"{struct.__name__} (`{tag}`)"


def numbers_in(text: str) -> list[int]:
    """All numbers of a cell, ``2^53`` being one."""
    found = re.findall(r"(?<![\w.])(-?)(\d+)(?:\^(\d+))?(?![\w.])", text)
    return [int(f"{sign}1") * int(base) ** int(power or 1) for sign, base, power in found]


def bounds_of(annotation: Any) -> list[int]:
    """The same for a type of messages.py: every bound once, lower before upper."""
    found: list[int] = []
    for part in get_args(annotation)[0 if isinstance(annotation, UnionType) else 1 :]:
        if not isinstance(part, msgspec.Meta):  # one of several types
            found += bounds_of(part)
            continue
        given = (part.ge, part.le, part.lt, part.min_length, part.max_length)
        found += [int(bound) for bound in given if bound is not None]
    return list(dict.fromkeys(found))


def check_type(cell: str, annotation: str, hint: Any) -> None:
    if annotation.startswith("Annotated["):
        assert cell.startswith(f"`{get_args(hint)[0].__name__}`, ")
        assert numbers_in(cell) == bounds_of(hint)
    else:
        text, _, optional = annotation.partition(" | ")
        assert cell == (f"`{text}` or nil" if optional else f"`{text}`")


def default_text(value: object) -> str:
    """A default as it would travel; a call that says nothing has no fields."""
    if value == messages.CallMeta():
        return "[]"
    return json.dumps(value.decode() if isinstance(value, bytes) else value).replace("null", "nil")


# -------------------------------------------------------------------------------- structs


def test_every_message_has_a_heading_and_no_other_has() -> None:
    tagged = [heading for heading in sections() if "(`" in heading]
    assert tagged == list(map(heading_of, MESSAGE_TYPES))


@pytest.mark.parametrize("struct", STRUCTS, ids=name_of)
def test_fields_match_the_struct(struct: type[msgspec.Struct]) -> None:
    fields = msgspec.structs.fields(struct)
    hints = get_type_hints(struct, include_extras=True)
    rows = table(heading_of(struct), "field")
    assert [row[0] for row in rows] == [field.name for field in fields]
    for (name, type_cell, default_cell, _), field in zip(rows, fields, strict=True):
        check_type(type_cell, str(struct.__annotations__[name]), hints[name])
        default = "" if field.required else default_text(field.default)
        assert default_cell == (f"`{default}`" if default else "")


def test_types_match_their_bounds() -> None:
    rows = table("3. Messages and tensors", "type")
    calls = (messages.TensorMeta, messages.CacheOp, messages.Option, messages.CallMeta)
    inner = (*calls, messages.CopySource, messages.CacheMeta, messages.Destination)
    used = {str(annotation) for struct in (*MESSAGE_TYPES, *inner) for annotation in struct.__annotations__.values()}
    names = {name for name in used if name.isidentifier()} - {"bool", "RefusalReason", "CacheOpKind", "CallMeta"}
    assert {row[0] for row in rows} == names
    for name, _, bounds in rows:
        assert numbers_in(bounds) == bounds_of(getattr(parts, name)), name


def test_dtypes_match() -> None:
    (line,) = re.findall(r"^Dtypes: (.+)\.$", DOCUMENT, flags=re.MULTILINE)
    assert [word.strip("`") for word in line.split(", ")] == list(tensors.DTYPES)


def test_kinds_of_cache_operations_match() -> None:
    meaning = table("CacheOp", "field")[0][3]
    assert tuple(re.findall(r"`(\w+)`: ", meaning)) == get_args(parts.CacheOpKind)


# -------------------------------------------------------------------------------- enums, states, limits


@pytest.mark.parametrize(
    ("heading", "column", "values"),
    [("Refusal reasons", "reason", RefusalReason), ("Peer states", "state", PeerState)],
    ids=["refusal-reasons", "peer-states"],
)
def test_every_value_has_a_row(heading: str, column: str, values: type[enum.Enum]) -> None:
    rows = table(heading, column)
    assert [row[0] for row in rows] == [value.value for value in values]
    assert all(all(row) for row in rows)


def test_states_match_what_may_be_sent() -> None:
    rows = table("4. Connection states", "state")
    assert [row[0] for row in rows] == [state.value for state in State]
    for name, *cells in rows:
        for role, cell in zip(Role, cells, strict=True):
            assert re.findall(r"`(\w+)`", cell) == sendable(State(name), role)


def sendable(state: State, role: Role) -> list[str]:
    names = []
    for message in EXAMPLES:
        pair = ConnectionPair.in_state(state)
        try:
            pair.pass_on(role, message)
        except LocalProtocolError:
            continue
        names.append(name_of(message))
    return names


def test_limits_match_their_constants() -> None:
    rows = table("9. Limits", "limit")
    for name, value, _ in rows:
        module, _, constant = name.partition(".")
        assert numbers_in(value) == [getattr(MODULES[module], constant)], name
    assert f"After {ClientConfig().silence_timeout_s:g} s of silence (`ClientConfig.silence_timeout_s`;" in DOCUMENT


def test_version_is_the_one_spoken() -> None:
    assert f"Version {messages.VERSION_MAJOR}.{messages.VERSION_MINOR}." in DOCUMENT
    assert str(protocol.check_version(2, 0)) in DOCUMENT


# -------------------------------------------------------------------------------- bytes


def test_frame_table_adds_up() -> None:
    rows = table("2. Frames", "offset")
    offset = 0
    for start, num_bytes, _ in rows[:-2]:
        assert int(start) == offset
        offset += int(num_bytes)
    assert rows[-2][0] == str(offset) == str(framing.PREFIX_BYTES)


def test_example_frame_is_what_is_sent() -> None:
    assert frame_of(messages.Ping(7)).hex(" ") in DOCUMENT


def test_hello_signature_is_over_the_documented_bytes() -> None:
    assert 'b"rm-hello-v1" + length of nonce, 2 bytes, big-endian + nonce + SHA-256 of the TLS' in DOCUMENT
    identity, nonce = Identity.from_seed(b"a" * 32), b"n" * 32
    for digest in (hashlib.sha256(b"certificate").hexdigest(), ""):
        signature = identity.key.sign(b"rm-hello-v1" + b"\x00\x20" + nonce + digest.encode())
        proven = verify_hello(
            public_key=identity.public_key, signature=signature, nonce=nonce, certificate_sha256=digest
        )
        assert proven == identity.peer_id


def test_record_signature_is_over_the_documented_bytes() -> None:
    assert '`b"rm-record-v3" + payload`' in DOCUMENT
    identity = Identity.from_seed(b"a" * 32)
    record = PeerRecord(
        peer_id=identity.peer_id,
        instance_id="run-1",
        sequence=1,
        model="tiny",
        model_key="key",
        num_blocks=4,
        start=0,
        end=4,
        addresses=("127.0.0.1:1",),
        state=PeerState.ONLINE,
    )
    signed = identity.sign_record(record)
    assert signed.signature == identity.key.sign(b"rm-record-v3" + signed.payload)
    assert list(msgspec.msgpack.decode(signed.payload)) == [row[0] for row in table("PeerRecord", "field")]
    assert len(identity.peer_id) == 52
