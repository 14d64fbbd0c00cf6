"""The public names are the promised ones, importing them costs nothing, and each source file has tests of its own."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import remote_modules
import remote_modules.testing
from remote_modules import RemoteSequential, load
from remote_modules.testing import LocalSwarm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "remote_modules"

PUBLIC = {
    *("RemoteSequential", "load", "InferenceSession", "ClientConfig", "ClientStats", "DeepPrompts", "Speculation"),
    *("Server", "ServerConfig", "Tracker", "TrackerConfig", "RemoteModulesCallback", "RemoteModulesTrainerCallback"),
    *("RemoteModulesError", "NoRouteError", "PeerError", "ProtocolError", "SessionError", "UnsupportedCallError"),
}
# What importing the package, or what a program needs to parse its arguments, must not load.
HEAVY = (
    "torch",
    "transformers",
    "aiohttp",
    "zeroconf",
    "huggingface_hub",
    "cryptography",
    "prometheus_client",
    "lightning",
)

MIRRORED = ("wire", "plan", "discovery", "net", "model", "client", "server", "training")
# Source files, or whole folders of them, without a test file of their own, and the tests that are theirs.
TESTED_BY = {
    "client": "tests/swarm",  # needs peers: whole swarms over sockets there, and under virtual time in tests/simulation
    "discovery.base": "tests/discovery/test_conformance.py",  # an interface: every implementation runs the suite
    "discovery.redis_storage": "tests/replicas/test_redis_storage.py",
    "discovery.storage": "tests/discovery/test_storage_contract.py",
    "discovery.tracker_replies": "tests/discovery/test_tracker_server.py",
    "discovery.http_json": "tests/discovery/test_tracker_client.py",
    "model.adapted_ia3": "tests/model/test_adapted.py",
    "model.adapted_item": "tests/model/test_adapted.py",
    "model.adapted_lora": "tests/model/test_adapted.py",
    "model.adapted_lycoris": "tests/model/test_adapted.py",
    "model.adapted_oft": "tests/model/test_adapted.py",
    "model.adapted_parameter": "tests/model/test_adapted.py",
    "model.adapted_prompt": "tests/model/test_adapted.py",
    "model.adapter_entries": "tests/model/test_adapters.py",
    "model.adapter_reading": "tests/model/test_adapters.py",
    "model.block_prompt": "tests/peft_models/test_deep_prompts.py",
    "model.adapter_files": "tests/peft_models/test_preloaded.py",  # peft writes the files
    "model.decode_attention": "tests/model/test_decode_graphs.py",
    "model.joined": "tests/model/test_decode_graphs.py",
    "net.client_connection": "tests/net/test_connection.py",  # one side is tested with the other
    "server.arguments": "tests/server/test_named_tensors.py",
    "server.batcher": "tests/server/test_batching.py",
    "server.cache_device": "tests/server/test_copies.py",
    "server.captures": "tests/model/test_decode_graphs.py",
    "server.copy_job": "tests/server/test_copies.py",
    "server.load_plan": "tests/server/test_server.py",
    "server.packing": "tests/server/test_batching.py",
    "server.peer": "tests/server/test_server.py",
    "server.served": "tests/server/test_handler.py",
    "server.steps": "tests/server/test_handler.py",
    "wire.control_messages": "tests/wire/test_messages.py",
    "wire.forms": "tests/wire/test_codecs.py",
    "wire.mxint8": "tests/wire/test_codecs.py",
    "wire.outliers": "tests/wire/test_codecs.py",
    "wire.parts": "tests/wire/test_messages.py",
    "server.tracker": "tests/server/test_server.py",
}


def source_modules() -> list[str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]


def test_public_names_are_those_that_are_promised() -> None:
    assert set(remote_modules.__all__) == PUBLIC
    assert sorted(remote_modules.__all__) == list(remote_modules.__all__)
    assert dir(remote_modules) == remote_modules.__all__
    assert {"LocalSwarm", "FaultyLink"} <= set(remote_modules.testing.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_importable(name: str) -> None:
    assert getattr(remote_modules, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        remote_modules.nothing  # noqa: B018


@pytest.mark.parametrize("module", [name for name in source_modules() if not name.endswith("__main__")])
def test_module_exports_what_it_says(module: str) -> None:
    imported = importlib.import_module(f"remote_modules.{module}".removesuffix(".__init__"))
    names = getattr(imported, "__all__", ())
    assert [name for name in names if not hasattr(imported, name)] == []


def test_importing_the_package_starts_and_loads_nothing() -> None:
    program = (
        "import sys, threading, remote_modules\n"
        f"print([name for name in {HEAVY} if name in sys.modules], threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[] 1\n"


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            RemoteSequential.from_swarm,
            ["trackers", "mdns", "peers", "invite", "start", "end", "revision", "config"],
        ),
        (load, ["auto_class", "trackers", "mdns", "peers", "invite", "config"]),
        (LocalSwarm, ["spans", "mode", "tracker"]),
    ],
    ids=["from_swarm", "load", "LocalSwarm"],
)
def test_arguments_after_the_first_are_keywords(function: Callable[..., object], names: list[str]) -> None:
    first, *others = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    assert first.kind is first.POSITIONAL_OR_KEYWORD
    assert {parameter.kind for parameter in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(names) <= {parameter.name for parameter in others}


@pytest.mark.parametrize(
    "module", [name for name in source_modules() if name.startswith(MIRRORED) and not name.endswith("__init__")]
)
def test_source_file_has_tests_of_its_own(module: str) -> None:
    area, _, name = module.partition(".")
    own = f"tests/{area}/test_{name.replace('.', '_')}.py"
    assert (ROOT / own).exists() or (ROOT / TESTED_BY.get(module, TESTED_BY.get(area, own))).exists(), (
        f"{own} is missing"
    )


def test_exceptions_name_what_exists() -> None:
    assert TESTED_BY.keys() <= {*source_modules(), *MIRRORED}
