"""What bad input gets: a typed one-line error or refusal at once; nothing else is disturbed, nobody is banned."""

from __future__ import annotations

import copy
import http.server
import json
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_config
from transformers import PreTrainedModel

from remote_modules import (
    ClientConfig,
    NoRouteError,
    PeerError,
    RemoteModulesError,
    RemoteSequential,
    Server,
    ServerConfig,
    Tracker,
    TrackerConfig,
    UnsupportedCallError,
    load,
)
from remote_modules.errors import (
    CheckpointError,
    DiscoveryError,
    LocalProtocolError,
    PeerRefused,
    RefusalReason,
)
from remote_modules.net.client_connection import ClientConnection
from remote_modules.testing import LocalSwarm
from remote_modules.wire import messages
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import TensorMeta, encode_message
from remote_modules.wire.tensors import encode_tensors

from .conftest import IMPATIENT, Connect, generate, noise, prompt, run_locally, undisturbed, with_blocks

AT_ONCE_S = 2.0  # no timeout is shorter; a refusal takes milliseconds
E = TypeVar("E", bound=Exception)
Undisturbed: TypeAlias = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def others(model: PreTrainedModel, local: PreTrainedModel, layers: RemoteSequential, swarm: LocalSwarm) -> Undisturbed:
    """``with others():`` around what goes wrong."""
    return lambda: undisturbed(model, local, layers, swarm)


@contextmanager
def refused(kind: type[E], text: str) -> Iterator[pytest.ExceptionInfo[E]]:
    """The error is of that type, one line, names what is wrong, and comes at once."""
    began_s = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        yield caught
    assert time.monotonic() - began_s < AT_ONCE_S
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- wrong tensors

WRONG_STATES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "two dimensions": (lambda: noise(1, 4)[0], ValueError, r"must be \[B, T, 64\], got \[4, 64\]"),
    "four dimensions": (lambda: noise(1, 4)[None], ValueError, r"got \[1, 1, 4, 64\]"),
    "another width": (lambda: noise(1, 4)[..., :63], ValueError, r"got \[1, 4, 63\]"),
    "no tokens": (lambda: noise(1, 0), ValueError, r"got \[1, 0, 64\]"),
    "no rows": (lambda: noise(0, 4), ValueError, r"got \[0, 4, 64\]"),
    "integers": (lambda: noise(1, 4).long(), ValueError, "must be floating point, got torch.int64"),
    "complex numbers": (lambda: noise(1, 4) + 0j, ValueError, "must be floating point, got torch.complex64"),
    "no tensor": (lambda: noise(1, 4).tolist(), TypeError, "must be a tensor, got list"),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_hidden_states_are_refused_before_anything_is_sent(
    layers: RemoteSequential, others: Undisturbed, case: str
) -> None:
    make, kind, text = WRONG_STATES[case]
    with others():
        before = layers.stats().bytes_sent
        with refused(kind, text):
            layers(make())
        with refused(kind, text):
            layers[2:5](make())
        with refused(kind, text):
            layers[2](make())
        with layers.session() as session, refused(kind, text):
            session.step(make())
        assert layers.stats().bytes_sent == before


WRONG_SIDES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "positions of other tokens": (
        {"position_ids": torch.arange(3)[None]},
        r"position_ids must be \[2, 4\], got \[1, 3\]",
    ),
    "positions of other rows": (
        {"position_ids": torch.zeros(3, 4, dtype=torch.int64)},
        r"must be \[2, 4\], got \[3, 4\]",
    ),
    "negative positions": ({"position_ids": -torch.arange(4)[None]}, r"position_ids must be in 0:2\*\*31"),
    "huge positions": ({"position_ids": torch.full((1, 4), 2**31)}, r"position_ids must be in 0:2\*\*31"),
    "float positions": ({"position_ids": torch.zeros(1, 4)}, "position_ids must be int64"),
    "flat positions": ({"position_ids": torch.arange(4)}, "position_ids must be int64"),
    "mask of other tokens": ({"attention_mask": torch.ones(2, 5)}, "attention_mask must have 4 columns, got 5"),
    "mask of other rows": ({"attention_mask": torch.ones(3, 4)}, r"attention_mask'? must be \[2, tokens\]"),
    "mask of one dimension": ({"attention_mask": torch.ones(4)}, r"attention_mask'? must be \[2, tokens\]"),
    "4-D mask of other rows": ({"attention_mask": torch.ones(3, 1, 4, 4)}, r"\[2, h, 4, 4\], got .* \[3, 1, 4, 4\]"),
    "4-D mask of more tokens": ({"attention_mask": torch.ones(2, 1, 4, 5)}, r"\[2, h, 4, 4\], got .* \[2, 1, 4, 5\]"),
    "complex mask": (
        {"attention_mask": torch.ones(2, 4, dtype=torch.bfloat16)},
        r"attention_mask'? must be \[2, tokens\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_SIDES)
def test_wrong_positions_and_masks_are_refused_by_the_peer(
    layers: RemoteSequential, others: Undisturbed, case: str
) -> None:
    sides, text = WRONG_SIDES[case]
    with others(), refused(PeerRefused, text):
        layers(noise(2, 4), **sides)


WRONG_STEPS: dict[str, tuple[dict[str, torch.Tensor], type[Exception], str]] = {
    "positions of other tokens": (
        {"position_ids": torch.arange(3)[None]},
        UnsupportedCallError,
        r"position_ids must be \[B, 2\] or \[1, 2\], got \[1, 3\]",
    ),
    "flat positions": ({"position_ids": torch.arange(2)}, UnsupportedCallError, r"position_ids must be .* got \[2\]"),
    "negative positions": (
        {"position_ids": torch.tensor([[-2, -1]])},
        PeerRefused,
        r"position_ids must be in 0:2\*\*31",
    ),
    "mask of new tokens only": (
        {"attention_mask": torch.ones(2, 2)},
        UnsupportedCallError,
        "attention_mask must have 6 columns, got 2",
    ),
    "mask of other rows": (
        {"attention_mask": torch.ones(1, 6)},
        PeerRefused,
        r"attention_mask'? must be \[2, tokens\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_STEPS)
def test_session_goes_on_after_a_refused_step(
    local: PreTrainedModel, layers: RemoteSequential, others: Undisturbed, case: str
) -> None:
    sides, kind, text = WRONG_STEPS[case]
    tokens = noise(2, 7)
    with others(), layers.session() as session:
        session.step(tokens[:, :4])
        with refused(kind, text):
            session.step(tokens[:, 4:6], **sides)
        assert session.position == 4
        output = session.step(tokens[:, 4:])
        torch.testing.assert_close(output, run_locally(local, tokens)[:, 4:], rtol=1e-4, atol=1e-4)


def test_session_with_other_rows_is_refused_and_goes_on(
    local: PreTrainedModel, layers: RemoteSequential, others: Undisturbed
) -> None:
    tokens = noise(2, 7)
    with others(), layers.session() as session:
        session.step(tokens[:, :4])
        with refused(PeerRefused, "the session has 2 rows, got 1"):
            session.step(tokens[:1, 4:])
        output = session.step(tokens[:, 4:])
        torch.testing.assert_close(output, run_locally(local, tokens)[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", [-1, 5])
def test_rollback_to_where_the_session_never_was_is_refused(
    layers: RemoteSequential, others: Undisturbed, position: int
) -> None:
    with others(), layers.session() as session:
        session.step(noise(1, 4))
        with refused(ValueError, rf"rollback position must be in 0\.\.4, got {position}"):
            session.rollback(position)
        assert session.position == 4


def test_request_beyond_the_peers_batch_limit_is_refused(layers: RemoteSequential, others: Undisturbed) -> None:
    with others():
        with refused(PeerRefused, "takes 8192 tokens in a request, got 8193: send shorter rows"):
            layers(noise(1, 8193))
        with layers.session() as session, refused(PeerRefused, "got 1 x 8193"):
            session.step(noise(1, 8193))


def test_request_beyond_our_own_limit_is_never_sent(connect: Connect, others: Undisturbed, swarm: LocalSwarm) -> None:
    small = connect(config=ClientConfig(max_request_bytes=10_000))
    with others():
        small(noise(1, 10))
        with refused(LocalProtocolError, "request of 25600 bytes exceeds max_request_bytes=10000; send fewer tokens"):
            small(noise(1, 100))
        with small.session() as session, refused(LocalProtocolError, "send fewer tokens"):
            session.step(noise(1, 100))
        small(noise(1, 10))
    assert small.stats().failovers == 0


def test_values_that_are_not_finite_are_the_callers_and_ban_nobody(
    layers: RemoteSequential, others: Undisturbed
) -> None:
    with others():
        states = noise(1, 4)
        states[0, 2, 3] = float("nan")
        assert bool(layers(states)[0, 3].isnan().all())


# ------------------------------------------------------------------------------------- wrong arguments

BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "span beyond the model": ({"start": 6, "end": 9}, ValueError, "span 6:9 is outside the model's blocks 0:8"),
    "negative start": ({"start": -1}, ValueError, "span -1:8 is outside"),
    "empty span": ({"start": 4, "end": 4}, ValueError, "span 4:4 is outside"),
    "reversed span": ({"start": 5, "end": 2}, ValueError, "span 5:2 is outside"),
    "one tracker as a string": ({"trackers": "http://localhost:1"}, TypeError, r"write \['http://localhost:1'\]"),
    "tracker without a scheme": ({"trackers": ["localhost:1"]}, ValueError, "must be an http:// or https:// URL"),
    "one peer as a string": ({"peers": "localhost:1"}, TypeError, r"write \['localhost:1'\]"),
    "peer without a port": ({"peers": ["localhost"]}, ValueError, "localhost"),
    "nowhere to look": ({"trackers": (), "peers": ()}, ValueError, "nowhere to look for peers"),
    "invite": ({"invite": "rm://x"}, UnsupportedCallError, "invites are not carried yet"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused_before_any_io(
    connect: Connect, others: Undisturbed, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.delenv("REMOTE_MODULES_TRACKERS", raising=False)
    options, kind, text = BAD_ARGUMENTS[case]
    with others(), refused(kind, text):
        connect(**options)


def test_bad_timeout_is_refused() -> None:
    with refused(ValueError, "silence_timeout_s must be positive and finite, got 0"):
        ClientConfig(silence_timeout_s=0)


def test_session_of_no_tokens_is_refused(layers: RemoteSequential) -> None:
    with refused(ValueError, "max_tokens must be positive, got 0"):
        layers.session(max_tokens=0)


# ------------------------------------------------------------------------------------- unknown models


def test_missing_folder_is_named(connect: Connect, others: Undisturbed, tmp_path: Path, swarm: LocalSwarm) -> None:
    folder = tmp_path / "nothing"
    with others():
        with refused(CheckpointError, f"{folder} does not exist"):
            connect(folder)
        with refused(CheckpointError, f"{folder} does not exist"):
            load(folder, trackers=swarm.trackers, mdns=False)
        with refused(CheckpointError, f"{folder} does not exist"):
            swarm.add("0:8", model=str(folder))
    assert len(swarm.peers) == 3


def test_object_that_names_no_model_is_refused(connect: Connect, others: Undisturbed) -> None:
    with others(), refused(TypeError, "must be a hub id, folder, PreTrainedConfig or PreTrainedModel, got int"):
        connect(8)


def test_model_that_nobody_serves_has_no_route(connect: Connect, others: Undisturbed) -> None:
    layers = connect(tiny_config(hidden_size=48, num_hidden_layers=3), config=IMPATIENT)
    with others(), refused(NoRouteError, "no route for blocks 0:3: 0 peers known"):
        layers(torch.zeros(1, 2, 48))


def test_blocks_that_nobody_serves_are_named(checkpoint: Path, connect: Connect, others: Undisturbed) -> None:
    with LocalSwarm(checkpoint, spans=["2:5"]) as partial, others():
        layers = connect(trackers=partial.trackers, config=IMPATIENT)
        with refused(NoRouteError, "no route for blocks 0:2") as caught:
            layers(noise(1, 2))
        assert [str(span) for span in caught.value.missing] == ["0:2", "5:8"]
        layers[2:5](noise(1, 2))


def test_peers_with_other_weights_are_never_used(
    connect: Connect, local: PreTrainedModel, swarm: LocalSwarm, others: Undisturbed, tmp_path: Path
) -> None:
    text = local.config.to_dict()
    other = save_tiny(
        tmp_path,
        seed=1,
        **{name: text[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim")},
        max_position_embeddings=text["max_position_embeddings"],
        eos_token_id=None,
    )
    with others():
        impostor = swarm.add("0:8", model=str(other))
        try:
            layers = connect()
            assert torch.equal(layers(noise(1, 5)), run_locally(local, noise(1, 5)))
            assert impostor.peer_id not in {hop.peer_id for hop in layers.stats().route}
            nameless = copy.deepcopy(local.config)
            nameless._name_or_path = ""
            unsure = connect(nameless, config=IMPATIENT)
            with refused(NoRouteError, r"different weights for block \d of .* name the model by its checkpoint folder"):
                unsure(noise(1, 5))
        finally:
            swarm.peers.remove(impostor)
            impostor.drain()  # takes its record back: a dead one would stand for a lease
            assert impostor.wait(10.0) == 0
            impostor.close()


# ------------------------------------------------------------------------------------- trackers and addresses


@contextmanager
def web_page() -> Iterator[str]:
    """``host:port`` of somebody else's web server: every answer is HTML, with status 200."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b"<html><body>Welcome to nginx!</body></html>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_tracker_that_answers_html_is_named_in_the_error(connect: Connect, others: Undisturbed) -> None:
    with web_page() as address, others():
        layers = connect(trackers=[f"http://{address}"], config=IMPATIENT)
        text = f"tracker http://{address} answered text/html instead of JSON .* is this a remote-modules tracker"
        with refused(NoRouteError, text):
            layers(noise(1, 2))


def test_tracker_that_answers_html_beside_a_good_one_does_no_harm(
    connect: Connect, local: PreTrainedModel, swarm: LocalSwarm, others: Undisturbed
) -> None:
    with web_page() as address, others():
        layers = connect(trackers=[f"http://{address}", *swarm.trackers])
        model = with_blocks(local, layers)
        assert torch.equal(generate(model, prompt()), generate(local, prompt()))
        assert layers.stats().failovers == 0


def test_peer_serves_on_though_its_tracker_answers_html(
    connect: Connect, local: PreTrainedModel, checkpoint: Path
) -> None:
    with web_page() as address:
        config = ServerConfig(model=str(checkpoint), blocks="0:8", mdns=False, trackers=(f"http://{address}",))
        with Server(config) as server:
            layers = connect(trackers=(), peers=[server.address])
            assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))


def test_address_that_is_no_peer_is_passed_over(
    connect: Connect, local: PreTrainedModel, swarm: LocalSwarm, others: Undisturbed
) -> None:
    with web_page() as address, others():
        layers = connect(trackers=(), peers=[address, *swarm.addresses])
        assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))
        assert layers.stats().failovers == 0
        alone = connect(trackers=(), peers=[address], config=IMPATIENT)
        with refused(NoRouteError, re.escape(address)):
            alone(noise(1, 4))


def test_tracker_that_is_not_there_is_named_in_the_error(connect: Connect, others: Undisturbed) -> None:
    with others():
        layers = connect(trackers=["http://127.0.0.1:9"], config=IMPATIENT)
        with refused(NoRouteError, "tracker http://127.0.0.1:9 is unreachable"):
            layers(noise(1, 2))


# ------------------------------------------------------------------------------------- ports and checkpoints


def test_port_in_use_is_named(checkpoint: Path, swarm: LocalSwarm, others: Undisturbed) -> None:
    port = int(swarm.peers[0].address.rpartition(":")[2])
    tracker_port = int(swarm.trackers[0].rpartition(":")[2])
    with others():
        server = Server(ServerConfig(model=str(checkpoint), blocks="0:1", mdns=False, port=port))
        with pytest.raises(RemoteModulesError, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose another --port"):
            server.start()
        with refused(DiscoveryError, str(tracker_port)):
            Tracker(TrackerConfig(port=tracker_port)).start()


def test_span_outside_the_model_is_refused(checkpoint: Path, swarm: LocalSwarm, others: Undisturbed) -> None:
    with others():
        for blocks in ("6:9", "8:9"):
            with refused(ValueError, f"span {blocks} is outside model .* of 8 blocks"):
                Server(ServerConfig(model=str(checkpoint), blocks=blocks, mdns=False)).start()
        for blocks in ("3:3", "5:2", "1", "-1:4", "a:b"):
            with refused(ValueError, "blocks: span must"):
                ServerConfig(model=str(checkpoint), blocks=blocks)
        with refused(ValueError, "span must"):
            swarm.add("6:2")


def serve(folder: Path, blocks: str = "0:8") -> None:
    """Try to."""
    Server(ServerConfig(model=str(folder), blocks=blocks, mdns=False)).start()


def test_missing_shard_is_named_by_who_needs_it(
    checkpoint: Path, connect: Connect, local: PreTrainedModel, swarm: LocalSwarm, others: Undisturbed, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    shard = index["model.layers.4.mlp.up_proj.weight"]
    (folder / shard).unlink()
    with others():
        with refused(CheckpointError, f"lacks shard '{shard}'"):
            serve(folder)
        needed = {file for key, file in index.items() if ".layers." not in key}
        if shard not in needed:
            model = load(folder, trackers=swarm.trackers, mdns=False)
            with model.model.layers:
                assert torch.equal(generate(model, prompt()), generate(local, prompt()))
        assert torch.equal(connect(folder)(noise(1, 3)), run_locally(local, noise(1, 3)))
        (folder / index["model.embed_tokens.weight"]).unlink()
        with refused(CheckpointError, f"lacks shard '{index['model.embed_tokens.weight']}'"):
            load(folder, trackers=swarm.trackers, mdns=False)


def test_cut_off_shard_is_refused(checkpoint: Path, others: Undisturbed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with others(), refused(CheckpointError, "copy"):
        serve(folder)


def test_pickled_weights_are_never_loaded(
    checkpoint: Path, connect: Connect, swarm: LocalSwarm, others: Undisturbed, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = {key: tensor for shard in checkpoint.glob("*.safetensors") for key, tensor in load_file(shard).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    text = r"has only pickled weights \(pytorch_model.bin\), which are never loaded; save it with save_pretrained"
    with others():
        with refused(CheckpointError, text):
            serve(folder)
        with refused(CheckpointError, text):
            connect(folder)
        with refused(CheckpointError, text):
            load(folder, trackers=swarm.trackers, mdns=False)


def test_folder_without_weights_or_config_is_refused(
    checkpoint: Path, connect: Connect, others: Undisturbed, tmp_path: Path
) -> None:
    with others():
        with refused(CheckpointError, "has no config.json"):
            connect(tmp_path)
        (tmp_path / "config.json").write_text("{not json")
        shutil.copy(next(checkpoint.glob("*.safetensors")), tmp_path / "model.safetensors")
        with refused(CheckpointError, "config of .* is not usable"):
            connect(tmp_path)


def test_index_that_leads_out_of_its_folder_is_refused(
    checkpoint: Path, connect: Connect, others: Undisturbed, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001-of', '"../model-00001-of'))
    with others(), refused(CheckpointError, "outside its folder"):
        connect(folder)


# ------------------------------------------------------------------------------------- on the wire


def tensors(num_tokens: int = 3, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden_states": noise(1, num_tokens), **changes}


def with_grad(grad: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors(), "grad.hidden_states": grad}


def call(**changes: Any) -> messages.CallMeta:
    return messages.CallMeta(**{"rows": 1, "num_tokens": 3, **changes})


def forward(named: dict[str, torch.Tensor], **changes: Any) -> tuple[messages.ForwardRequest, list[Any]]:
    metas, body = encode_tensors(named)
    fields: dict[str, Any] = {"start": 3, "end": 6, "tensors": metas, "timeout_s": 5.0, "call": call(), **changes}
    return messages.ForwardRequest(0, **fields), body


def backward(named: dict[str, torch.Tensor], **changes: Any) -> tuple[messages.BackwardRequest, list[Any]]:
    metas, body = encode_tensors(named)
    fields: dict[str, Any] = {"start": 3, "end": 6, "tensors": metas, "timeout_s": 5.0, "call": call(), **changes}
    return messages.BackwardRequest(0, **fields), body


def step(named: dict[str, torch.Tensor], **changes: Any) -> tuple[messages.StepRequest, list[Any]]:
    metas, body = encode_tensors(named)
    fields: dict[str, Any] = {"start": 3, "end": 6, "position": 0, "ops": (), "create": True, "call": call(), **changes}
    return messages.StepRequest(0, "a-session-of-nobody", 0, tensors=metas, timeout_s=5.0, **fields), body


BAD, LOST, ELSEWHERE = RefusalReason.BAD_REQUEST, RefusalReason.SESSION_LOST, RefusalReason.NOT_SERVED
RESERVED = (messages.Option("attention_mask", True),)
LONG = messages.CacheOp("crop", length=4)
UNNAMED = messages.CacheOp("select", tensor="x")
REFUSED: dict[str, tuple[tuple[Any, list[Any]], RefusalReason, str]] = {
    "span beyond the model": (forward(tensors(), start=5, end=9), BAD, "span 5:9 is outside the model's blocks 0:8"),
    "empty span": (forward(tensors(), start=4, end=4), BAD, "span 4:4 is outside"),
    "reversed span": (forward(tensors(), start=5, end=4), BAD, "span 5:4 is outside"),
    "span of another peer": (forward(tensors(), start=2, end=4), ELSEWHERE, "this peer holds 3:6"),
    "no hidden states": (forward({"states": noise(1, 3)}), BAD, "needs a tensor 'hidden_states'"),
    "another width": (forward({"hidden_states": torch.zeros(1, 3, 65)}), BAD, r"must be \[B, T, 64\]"),
    "integers": (forward({"hidden_states": noise(1, 3).long()}), BAD, "floating point"),
    "another shape than told": (forward(tensors(4)), BAD, r"for 1 x 3 tokens, got \[1, 4, 64\]"),
    "no tokens told": (forward(tensors(), call=call(num_tokens=0)), BAD, "for 1 x 0 tokens"),
    "unknown tensor": (
        forward(tensors(weights=noise(1, 3))),
        BAD,
        "tensor 'weights' is not one that these blocks take",
    ),
    "unknown autocast": (forward(tensors(), call=call(autocast="float7")), BAD, "must be bfloat16 or float16"),
    "reserved option": (forward(tensors(), call=call(options=RESERVED)), BAD, "'attention_mask' may not be an option"),
    "mask of other tokens": (forward(tensors(attention_mask=torch.ones(1, 9))), BAD, "3 columns, got 9"),
    "backward without a gradient": (backward(tensors()), BAD, "needs a tensor 'grad.hidden_states'"),
    "gradient of another shape": (backward(with_grad(noise(1, 2))), BAD, "grad.hidden_states must be"),
    "unknown session": (step(tensors(), create=False), LOST, "unknown session"),
    "wrong position": (step(tensors(), position=7), LOST, "holds 0 tokens, the step expects 7"),
    "crop of what is not there": (step(tensors(), ops=(LONG,)), BAD, "cannot crop to 4"),
    "select without indices": (step(tensors(), ops=(UNNAMED,)), BAD, "named 'x'"),
    "mask to append to nothing": (step(tensors(attention_mask=torch.ones(1, 3))), BAD, "send the whole one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_refused_on_the_connection_that_others_use(
    layers: RemoteSequential, swarm: LocalSwarm, others: Undisturbed, case: str
) -> None:
    (message, body), reason, text = REFUSED[case]
    handle = layers._handle

    async def ask(connection: ClientConnection) -> None:
        request = msgspec.structs.replace(message, request_id=connection.new_request_id())
        await connection.request(request, body, timeout_s=10.0)

    with others():
        connection = handle.io.run(handle.swarm.connect(swarm.peers[1].peer_id, "step"))
        with refused(PeerRefused, text) as caught:
            handle.io.run(ask(connection))
        assert caught.value.reason is reason
        assert caught.value.peer_id == swarm.peers[1].peer_id
        assert connection.is_open


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=AT_ONCE_S)


def upgraded(address: str) -> socket.socket:
    """A connection on which frames are expected."""
    sock = dial(address)
    sock.sendall(b"GET /api/v1/connect HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: remote-modules/1\r\n\r\n")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    assert head.startswith(b"HTTP/1.1 101 "), head
    return sock


def frame(message: messages.Message, body: bytes = b"") -> bytes:
    return b"".join(encode_frame(encode_message(message), [body] if body else []))


HELLO = frame(messages.ClientHello(messages.VERSION_MAJOR, messages.VERSION_MINOR, b"n" * 32, 2**20, "test"))
META = (TensorMeta("hidden_states", "float32", (1, 3, 64)),)
LYING = messages.ForwardRequest(1, 3, 6, META, 5.0)


def read_to_the_end(sock: socket.socket) -> bytes:
    """What comes until the peer closes, which it must do at once."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


NONSENSE = {
    "bytes at random": bytes(range(256)) * 4,
    "a web request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100,
    "another frame format": b"RM\x02" + HELLO[3:],
    "a huge header": struct.pack("<2sBBIQII", b"RM", 1, 0, 65_537, 0, 0, 0),
    "a body before the hello": struct.pack("<2sBBIQII", b"RM", 1, 0, 10, 1, 0, 0),
    "a flipped bit": HELLO[:30] + bytes([HELLO[30] ^ 1]) + HELLO[31:],
    "a header that is no message": b"".join(encode_frame(b"\xc1\xc1\xc1")),
    "a message of the other side": frame(messages.Pong(1)),
    "a request before the hello": frame(LYING, bytes(3 * 64 * 4)),
    "a second hello": HELLO + HELLO,
    "an oversized body": HELLO + struct.pack("<2sBBIQII", b"RM", 1, 0, 10, 2**62, 0, 0),
    "a body that is too short": HELLO + frame(LYING, b"1234"),
    "a body that is too long": HELLO + frame(LYING, bytes(3 * 64 * 4 + 1)),
    "a tensor beyond all bounds": HELLO
    + frame(messages.ForwardRequest(1, 3, 6, (TensorMeta("hidden_states", "float32", (2**39, 2**39)),), 5.0)),
    "a dtype that is none": HELLO
    + frame(messages.ForwardRequest(1, 3, 6, (TensorMeta("hidden_states", "float7", (1,)),), 5.0), b"1234"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_closes_its_connection_only(swarm: LocalSwarm, others: Undisturbed, case: str) -> None:
    with others(), upgraded(swarm.peers[1].address) as sock:
        sock.sendall(NONSENSE[case])
        read_to_the_end(sock)


def test_nonsense_in_place_of_http_closes_its_connection_only(swarm: LocalSwarm, others: Undisturbed) -> None:
    with others():
        for peer in swarm.peers:
            with dial(peer.address) as sock:
                sock.sendall(b"\x16\x03\x01\x02\x00" + bytes(range(256)) + b"\r\n\r\n")
                assert read_to_the_end(sock).startswith(b"HTTP/1.0 400 ")
        with dial(swarm.trackers[0].removeprefix("http://")) as sock:
            sock.sendall(b"\x00\x01\x02\x03\r\n\r\n")
            assert read_to_the_end(sock).startswith(b"HTTP/1.0 400 ")


@pytest.mark.parametrize("num_bytes", [1, 23, 24, 60, len(HELLO) + 5, len(HELLO) + 200])
def test_stream_that_ends_inside_a_frame_is_forgotten(swarm: LocalSwarm, others: Undisturbed, num_bytes: int) -> None:
    stream = HELLO + frame(LYING, bytes(3 * 64 * 4))
    with others(), upgraded(swarm.peers[1].address) as sock:
        sock.sendall(stream[:num_bytes])
        sock.shutdown(socket.SHUT_WR)
        read_to_the_end(sock)


def test_another_major_version_is_rejected_naming_both(swarm: LocalSwarm, others: Undisturbed) -> None:
    with others(), upgraded(swarm.peers[1].address) as sock:
        sock.sendall(frame(messages.ClientHello(9, 4, b"n" * 32, 2**20, "from the future")))
        assert b"peer speaks protocol 9.4, we speak 1.5; update the older side" in read_to_the_end(sock)


def test_peer_of_another_identity_is_not_believed(
    connect: Connect, local: PreTrainedModel, checkpoint: Path, swarm: LocalSwarm
) -> None:
    """A port that a stranger took over: the record's peer is avoided, the stranger serves under its own name."""
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"], announce_interval_s=60.0) as pair:
        first, second = pair.peers
        port = int(first.address.rpartition(":")[2])
        first.kill()
        with Server(ServerConfig(model=str(checkpoint), blocks="0:8", port=port, mdns=False)):
            for _ in range(4):
                layers = connect(trackers=pair.trackers)
                assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))
                assert layers.stats().route[0].peer_id == second.peer_id


def test_loss_of_the_only_peer_is_told_with_its_cause(connect: Connect, checkpoint: Path) -> None:
    with LocalSwarm(checkpoint, spans=["0:8"]) as lonely:
        layers = connect(trackers=lonely.trackers, config=IMPATIENT)
        layers(noise(1, 2))
        lonely.peers[0].kill()
        with refused(NoRouteError, r"no route for blocks 0:8: .* \(1 more failed moments ago") as caught:
            layers(noise(1, 2))
        assert [str(span) for span in caught.value.missing] == ["0:8"]
        cause = caught.value.__cause__
        assert isinstance(cause, PeerError)
        assert cause.peer_id == lonely.peers[0].peer_id
