from __future__ import annotations

import random
import tracemalloc
from typing import Any

import msgspec
import pytest

from remote_modules.errors import LocalProtocolError, RefusalReason, RemoteProtocolError
from remote_modules.wire import messages
from remote_modules.wire.messages import Message, decode_message, encode_message

from .helpers import CALL, EXAMPLES, HIDDEN, MESSAGE_TYPES, OPTIONS, RECORD, SOURCE, TARGET, items_of, name_of

pack = msgspec.msgpack.encode

ANYTHING_ELSE: dict[str, tuple[Any, ...]] = {
    "int": (None, True, 1.0, "1", b"1", [], {}, 2**63),
    "float": (None, True, "1", b"1", [], {}, float("nan"), float("inf")),
    "str": (None, True, 1, 1.0, b"1", [], {}),
    "bytes": (None, True, 1, 1.0, "n" * 32, [], {}),
    "bool": (None, 0, 1, 1.0, "true", b"1", [], {}),
    "list": (None, True, 1, 1.0, "a", b"a", {}),
    "option": (None, b"1", [], [1], {}),
}

# Per annotation: base type, values that just pass, values that just do not.
BOUNDS: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "Id": ("int", (0, 2**53 - 1), (-1, 2**53)),
    "Count": ("int", (0, 2**40 - 1), (-1, 2**40)),
    "Block": ("int", (0, 4096), (-1, 4097)),
    "Seconds": ("float", (0, 0.0, 86400.0), (-1e-9, 86400.1)),
    "Name": ("str", ("", "n" * 128, "é" * 128), ("n" * 129,)),
    "Text": ("str", ("", "t" * 1024), ("t" * 1025,)),
    "SessionId": ("str", ("s" * 16, "s" * 64), ("", "s" * 15, "s" * 65)),
    "Nonce": ("bytes", (b"n" * 32,), (b"", b"n" * 31, b"n" * 33)),
    "Annotated[bytes, Meta(min_length=32, max_length=32)]": ("bytes", (b"k" * 32,), (b"k" * 31, b"k" * 33)),
    "Annotated[bytes, Meta(min_length=64, max_length=64)]": ("bytes", (b"s" * 64,), (b"s" * 63, b"s" * 65)),
    "Annotated[str, Meta(max_length=16)]": ("str", ("", "d" * 16), ("d" * 17,)),
    "CacheOpKind": ("str", ("crop", "select", "reset"), ("", "crop\n", "\ncrop", "CROP", "crop ", "other")),
    "bool": ("bool", (True, False), ()),
    "RefusalReason": ("str", tuple(reason.value for reason in RefusalReason), ("", "BUSY", "busy ", "other")),
    "Dims": ("list", ([], [0], [2**40 - 1] * 8), ([1] * 9, [-1], [2**40], [1.0], [None], [[1]])),
    "Tensors": ("list", ([], [["a", "b", [1]]] * 2048), ([["a", "b", [1]]] * 2049, [1], [["a", "b"]], [["a"]])),
    "OptionValue": (
        "option",
        (True, False, 0, -(2**53), 2**53 - 1, 0.5, float("inf"), "", "t" * 64, "é" * 64),
        (2**53, -(2**53) - 1, "t" * 65),
    ),
    "Options": ("list", ([], [["a", 1]] * 32), ([["a", 1]] * 33, [1], [["a"]], [[1, 1]], [["a", []]])),
    "Records": (
        "list",
        ([], ["hidden_states"], ["router_logits", "hidden_states"]),
        (["hidden_states"] * 3, ["attentions"], [""], [1], [None], [["hidden_states"]]),
    ),
    "CallMeta": (
        "list",
        ([], [1, 2], [1, 2, True, "", [["a", 1]], ["hidden_states"], "d", None, True]),
        (
            [-1],
            [1, 2, 1],
            [1, 2, True, None],
            [1, 2, True, "", [1]],
            [1, 2, True, "", [], [], "", -1],
            [1, 2, True, "", [], [], "", 1, 0],
        ),
    ),
    "AdapterParts": ("list", ([], [b"p" * 16] * 2048), ([b"p" * 16] * 2049, [1], [b"p" * 15], [b"p" * 17])),
    "AdapterRows": ("bytes", (b"", b"\x01" * 8192), (b"\x01" * 8193,)),
    "Addresses": ("list", ([], ["a:1"] * 4), (["a:1"] * 5, [1], [["a:1"]])),
    "CopySource": ("list", (["p", []], ["p", ["a:1"], None]), ([], ["p"], [1, []], ["p", "a:1"], ["p", [], 1])),
    "Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]": ("bytes", (b"", b"r" * 16384), (b"r" * 16385,)),
    "Key": ("bytes", (b"", b"k" * 32), (b"k" * 33,)),
    "Grant": ("bytes", (b"", b"g" * 64), (b"g" * 65,)),
    "RecordProof": (
        "list",
        ([b"", b"k" * 32, b"s" * 64],),
        ([], [b"", b"k" * 32], [b"", b"k" * 31, b"s" * 64], [1, 2, 3]),
    ),
    "Destination": (
        "list",
        (["t" * 16, 0], ["t" * 16, 3, b"g" * 64, None]),
        ([], ["t" * 16], ["t" * 15, 0], ["t" * 16, -1], ["t" * 16, 0, b"", []]),
    ),
    "CacheMeta": ("list", ([0, 0, 0], [9, 2, 1, 640]), ([], [1, 2], [-1, 0, 0], [0, 0, 0, -1])),
    "CacheOps": ("list", ([], [["crop"]] * 1024), ([["crop"]] * 1025, [1], [[]], [["crop", "1"]])),
}


def fields_of(struct: type[msgspec.Struct]) -> list[tuple[int, str, bool]]:
    """Position in the array, annotation as written, and whether it must be given."""
    first = 0 if struct.__struct_config__.tag is None else 1
    return [
        (index, str(struct.__annotations__[field.name]), field.required)
        for index, field in enumerate(msgspec.structs.fields(struct), start=first)
    ]


def with_item(items: list[Any], index: int, value: Any) -> list[Any]:
    return [*items[:index], value, *items[index + 1 :]]


def with_tensor(meta: list[Any]) -> list[Any]:
    return ["forward", 2, 0, 4, [meta], 1.5]


def with_op(op: list[Any]) -> list[Any]:
    return ["step", 1, "s" * 16, 2, 0, 4, 3, [op], [], 1.5]


def with_call(call: list[Any]) -> list[Any]:
    return ["forward", 2, 0, 4, [], 1.5, call]


def with_option(option: list[Any]) -> list[Any]:
    return with_call([1, 2, True, "", [option]])


def with_source(source: list[Any]) -> list[Any]:
    return ["copy", 4, "s" * 16, 0, 4, 1, [], [], 1.5, "t" * 16, source]


def with_target(target: list[Any]) -> list[Any]:
    return ["step", 1, "s" * 16, 2, 0, 4, 3, [], [], 1.5, [], False, False, None, None, False, target]


def with_record(record: list[Any]) -> list[Any]:
    return with_target(["t" * 16, 3, b"g" * 64, record])


def with_cache(cache: list[Any]) -> list[Any]:
    return ["output", 1, [], 0.25, 0.5, 2, 4096, cache]


def check_field(items: list[Any], index: int, annotation: str, *, wrap: Any = lambda items: items) -> None:
    name, _, optional = annotation.partition(" | ")
    base, good, bad = BOUNDS[name]
    for value in (*good, None) if optional else good:
        decode_message(pack(wrap(with_item(items, index, value))))
    for value in (*bad, *ANYTHING_ELSE[base][bool(optional) :]):  # the first of these is None
        with pytest.raises(RemoteProtocolError, match="is no message"):
            decode_message(pack(wrap(with_item(items, index, value))))


# -------------------------------------------------------------------------------- round trip


def test_examples_name_every_message() -> None:
    assert tuple(map(type, EXAMPLES)) == MESSAGE_TYPES


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_message_comes_back_equal(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_message_is_an_array_of_its_tag_and_fields(message: Message) -> None:
    tag, *values = items_of(message)
    assert tag == type(message).__struct_config__.tag
    fields = msgspec.structs.astuple(message)
    assert values == [msgspec.msgpack.decode(pack(field)) for field in fields]


# -------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_fields_out_of_type_or_bounds_are_refused(message: Message) -> None:
    for index, annotation, _ in fields_of(type(message)):
        check_field(items_of(message), index, annotation)


def test_tensor_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.TensorMeta):
        check_field(["hidden_states", "float32", [1, 2]], index, annotation, wrap=with_tensor)


def test_cache_op_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.CacheOp):
        check_field(["select", 0, "rows"], index, annotation, wrap=with_op)


def test_call_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.CallMeta):
        check_field(msgspec.msgpack.decode(pack(CALL)), index, annotation, wrap=with_call)


def test_option_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.Option):
        check_field(["window", 5], index, annotation, wrap=with_option)


def test_source_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.CopySource):
        check_field(msgspec.msgpack.decode(pack(SOURCE)), index, annotation, wrap=with_source)


def test_target_fields_out_of_type_or_bounds_are_refused() -> None:
    for struct, example, wrap in (
        (messages.Destination, TARGET, with_target),
        (messages.RecordProof, RECORD, with_record),
    ):
        for index, annotation, _ in fields_of(struct):
            check_field(msgspec.msgpack.decode(pack(example)), index, annotation, wrap=wrap)


def test_cache_fields_out_of_type_or_bounds_are_refused() -> None:
    for index, annotation, _ in fields_of(messages.CacheMeta):
        check_field([9, 2, 1, 640], index, annotation, wrap=with_cache)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_keeps_the_type_of_its_value(option: messages.Option) -> None:
    call = messages.CallMeta(options=(option,))
    decoded = decode_message(encode_message(messages.ForwardRequest(1, 0, 1, (), 1.0, call)))
    assert isinstance(decoded, messages.ForwardRequest)
    assert decoded.call.options == (option,)
    assert type(decoded.call.options[0].value) is type(option.value)


@pytest.mark.parametrize("num_fields", range(10))
def test_fields_of_a_call_that_are_left_out_have_their_defaults(num_fields: int) -> None:
    whole, default = (msgspec.structs.astuple(call) for call in (CALL, messages.CallMeta()))
    items = msgspec.msgpack.decode(pack(CALL))[:num_fields]
    decoded = decode_message(pack(with_call(items)))
    assert isinstance(decoded, messages.ForwardRequest)
    assert msgspec.structs.astuple(decoded.call) == whole[:num_fields] + default[num_fields:]


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_extra_trailing_fields_of_a_later_minor_version_are_ignored(message: Message) -> None:
    assert decode_message(pack([*items_of(message), 1, "x", [None, {"deep": [1]}]])) == message


def test_extra_trailing_fields_of_parts_of_a_message_are_ignored() -> None:
    forward = decode_message(pack(with_tensor(["hidden_states", "float32", [1, 2, 4], "", "extra"])))
    assert isinstance(forward, messages.ForwardRequest)
    assert forward.tensors == HIDDEN
    call = decode_message(pack(with_option(["window", 5, "unit"])))
    assert isinstance(call, messages.ForwardRequest)
    assert call.call == messages.CallMeta(1, 2, True, "", (messages.Option("window", 5),))
    step = decode_message(pack(with_op(["crop", 3, "", {"a": 1}])))
    assert isinstance(step, messages.StepRequest)
    assert step.ops == (messages.CacheOp("crop", 3),)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_missing_fields_are_refused_unless_they_have_a_default(message: Message) -> None:
    items = items_of(message)
    for index, _, is_required in fields_of(type(message)):
        if is_required:
            with pytest.raises(RemoteProtocolError, match="is no message"):
                decode_message(pack(items[:index]))
        else:
            assert type(decode_message(pack(items[:index]))) is type(message)


@pytest.mark.parametrize(
    "message",
    [
        messages.Reject("t" * 1025),
        messages.Cancel(-1),
        messages.Ping(2**53),
        messages.Refused(1, RefusalReason.BUSY, "x", float("nan")),
        messages.CloseSession("short"),
        messages.Output(1, HIDDEN * 2049, 0.0, 0.0),
        messages.ForwardRequest(1, 0, 1, (), 1.0, messages.CallMeta(options=(messages.Option("a", 2**53),))),
        messages.ForwardRequest(1, 0, 1, (messages.TensorMeta("a", "float32", (1,) * 9),), 1.0),
    ],
    ids=name_of,
)
def test_message_out_of_bounds_is_not_encoded(message: Message) -> None:
    with pytest.raises(LocalProtocolError, match=f"{type(message).__name__} may not be sent: "):
        encode_message(message)


# -------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        pack("ping"),
        pack(None),
        pack({"type": "ping", "nonce": 1}),
        pack([]),
        pack([1, 1]),
        pack(["unknown", 1]),
        pack(["Ping", 1]),
        pack([["ping"], 1]),
        pack(["ping", 1]) + b"\x00",
        b"\x92" + pack("reject") + b"\xa2\xff\xfe",
        b"\x92" + pack("ping") + b"\xd6\xff\x00\x00\x00\x00",
        b"\x92" + pack("ping") + b"\x91" * 60_000 + b"\xc0",
        b"\x93" + pack("ping") + b"\x01" + b"\x91" * 60_000 + b"\xc0",
        b"\x93" + pack("ping") + b"\x01" + b"\x81\x01" * 30_000 + b"\xc0",
    ],
    ids=[
        "empty",
        "reserved-byte",
        "no-array",
        "nil",
        "map",
        "no-tag",
        "int-tag",
        "unknown-tag",
        "wrong-case-tag",
        "nested-tag",
        "trailing-bytes",
        "invalid-utf8",
        "extension-type",
        "deep-array",
        "deep-array-in-extra-field",
        "deep-map-in-extra-field",
    ],
)
def test_header_that_is_no_message_is_refused(header: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=f"header of {len(header)} bytes is no message: "):
        decode_message(header)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_header_cut_anywhere_is_refused(message: Message) -> None:
    header = encode_message(message)
    for num_bytes in range(len(header)):
        with pytest.raises(RemoteProtocolError):
            decode_message(header[:num_bytes])


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_header_with_random_bytes_is_refused_or_within_bounds(message: Message) -> None:
    rng = random.Random(type(message).__name__)
    header = encode_message(message)
    for _ in range(300):
        mutated = bytearray(header)
        for index in rng.sample(range(len(header)), min(len(header), rng.randint(1, 4))):
            mutated[index] = rng.randrange(256)
        try:
            decoded = decode_message(bytes(mutated))
        except RemoteProtocolError:
            continue
        encode_message(decoded)  # raises for a field out of bounds


@pytest.mark.parametrize(
    "claim",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"],
)
def test_claim_of_four_billion_items_is_refused_before_allocation(claim: bytes) -> None:
    fields = (
        b"\x92" + pack("reject"),
        b"\x93" + pack("ping") + b"\x01",
        b"\x96" + pack(with_tensor([])[:4])[1:],
    )
    tracemalloc.start()
    try:
        for start in fields:
            with pytest.raises(RemoteProtocolError):
                decode_message(start + claim)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


def test_requests_are_named_by_their_tags() -> None:
    named = {messages.kind_of(example) for example in EXAMPLES if isinstance(example, messages.Request)}
    assert named == {"step", "forward", "backward"}
