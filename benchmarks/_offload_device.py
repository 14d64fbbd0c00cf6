"""Blocks that do not fit on an accelerator: streamed from host memory for each token, or held by three peers on it.

*Streamed*: transformers' own model, whose blocks' parameters are views of two buffers on the device. While one block
computes, the weights of the next come from pinned memory by a copy stream, one copy for each block. It goes on over the
end of a token, so the first two blocks of the first token are there already: in this arm's favour.

*Peers*: three processes on the same device, each with a third of all blocks, whose weights repeat
(`_repeated_peer.py`), since all of them do not fit on one device either. They are behind delayed links
(`_delayed_links.py`), which also peers dial that pass tensors on directly. This process is the client, with hidden
states on the CPU, as in the streamed arm. Both have the same weights, so outputs are compared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from _delayed_links import DelayedLinks
from _device_span import build, config_of, wait
from _report import say
from safetensors import safe_open
from suite import PROFILES
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.stack import cache_argument
from remote_modules.testing import child_process
from remote_modules.testing.child_process import ChildProcess

__all__ = ["STREAMED", "Measured", "measure_device"]

STREAMED = "streamed from pinned memory"
PREFIX_TOKENS = 128
WARM_STEPS = 3
START_TIMEOUT_S = 400.0
KV_BYTES = 2 << 30  # of each peer


class Streamed:
    """Args:
    folder: of the checkpoint with ``distinct`` blocks; block i of ``config`` has the weights of i % distinct.
    """

    def __init__(self, folder: Path, config: LlamaConfig, distinct: int, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._num_blocks = config.num_hidden_layers
        if self._num_blocks % 2:
            raise SystemExit(f"the number of layers must be even, got {self._num_blocks}")
        with torch.device("meta"):
            self.model = LlamaModel(config).eval()
        self.model.norm = nn.Identity()
        self.model.embed_tokens = nn.Embedding(1, config.hidden_size, device=device)  # tells where the model is
        with device:
            self.model.rotary_emb = type(self.model.rotary_emb)(config=config)
        shapes = {name: parameter.shape for name, parameter in self.model.layers[0].named_parameters()}
        self._host = [self._read(folder, block, shapes) for block in range(distinct)]
        self._buffers = [torch.empty_like(self._host[0], device=device, pin_memory=False) for _ in range(2)]
        self._copies: Any = torch.cuda.Stream(device) if self._is_cuda else None
        self._ready: list[Any] = [torch.cuda.Event() if self._is_cuda else None for _ in range(2)]
        self.num_copied = 0
        for index, block in enumerate(self.model.layers):
            self._place(block, self._buffers[index % 2], shapes)
            block.register_forward_pre_hook(lambda *_, index=index: self._await(index))
            block.register_forward_hook(lambda *_: self._copy_next())
        for _ in range(2):
            self._copy_next()

    @property
    def block_bytes(self) -> int:
        return self._host[0].nbytes

    def _read(self, folder: Path, block: int, shapes: dict[str, torch.Size]) -> torch.Tensor:
        """All weights of a block, one after the other."""
        checkpoint = open_checkpoint(str(folder))
        total = sum(shape.numel() for shape in shapes.values())
        flat, start = torch.empty(total, dtype=torch.bfloat16, pin_memory=self._is_cuda), 0
        for name, shape in shapes.items():
            key = f"model.layers.{block}.{name}"
            with safe_open(str(folder / checkpoint.weight_map[key]), framework="pt") as file:
                flat[start : start + shape.numel()] = file.get_tensor(key).flatten()
            start += shape.numel()
        return flat

    @staticmethod
    def _place(block: nn.Module, buffer: torch.Tensor, shapes: dict[str, torch.Size]) -> None:
        start = 0
        for name, shape in shapes.items():
            path, _, last = name.rpartition(".")
            view = buffer[start : start + shape.numel()].view(shape)
            setattr(block.get_submodule(path), last, nn.Parameter(view, requires_grad=False))
            start += shape.numel()

    def _await(self, index: int) -> None:
        if self._is_cuda:
            torch.cuda.current_stream(self.device).wait_event(self._ready[index % 2])

    def _copy_next(self) -> None:
        """The block after the next, into the buffer of the one that is done."""
        number, self.num_copied = self.num_copied, self.num_copied + 1
        source, buffer = self._host[number % self._num_blocks % len(self._host)], self._buffers[number % 2]
        if not self._is_cuda:
            buffer.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # what used the buffer is queued there
        with torch.cuda.stream(self._copies):
            buffer.copy_(source, non_blocking=True)
            self._ready[number % 2].record(self._copies)

    def copy_s(self) -> float:
        """Of one block, nothing else going on; between tokens, when the buffers have the first two blocks anyway."""
        wait(self.device)
        began_s = time.perf_counter()
        for _ in range(4):
            for buffer, source in zip(self._buffers, (self._host[0], self._host[1 % len(self._host)]), strict=True):
                buffer.copy_(source, non_blocking=True)
        wait(self.device)
        return (time.perf_counter() - began_s) / 8

    def step(self, hidden: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        arguments: dict[str, Any] = {cache_argument(self.model) or "": cache, "use_cache": True}
        output = self.model(inputs_embeds=hidden.to(self.device), **arguments)
        found: torch.Tensor = output.last_hidden_state.cpu()
        return found


@dataclass(slots=True)
class Measured:
    """Seconds of a step by arm, by round.

    Attributes:
        compute: the peers' own computing in such a step.
        difference: of the outputs, relative; the largest.
        bound: if nothing took time but copying the weights.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    compute: dict[str, list[float]] = field(default_factory=dict)
    difference: float = 0.0
    bound: list[float] = field(default_factory=list)


class DeviceBench:
    def __init__(
        self, options: argparse.Namespace, config: LlamaConfig, streamed: Streamed, links: DelayedLinks, hidden: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self._options = options
        self._config = config
        self._streamed = streamed
        self._links = links
        self._prefix = torch.randn(1, PREFIX_TOKENS, hidden, generator=generator).bfloat16()
        num_steps = WARM_STEPS + max(options.steps, options.streamed_steps)
        self._steps = [torch.randn(1, 1, hidden, generator=generator).bfloat16() for _ in range(num_steps)]
        self._cache = DynamicCache(config=config)
        self._expected = torch.empty(0)
        self.measured = Measured()

    def measure(self) -> Measured:
        self._streamed.step(self._prefix, self._cache)
        rng, arms = Random(0), [STREAMED, *self._options.profiles]
        self._streamed_s()  # warms up, and knows the outputs
        for number in range(self._options.rounds + 1):
            for arm in rng.sample(arms, len(arms)):
                took_s = self._streamed_s() if arm == STREAMED else self._remote_s(arm, is_kept=number > 0)
                say(f"round {number}: {arm}: {took_s * 1e3:.2f} ms, {1 / took_s:.3f} steps/s")
                if number:  # the first warms up
                    self.measured.seconds.setdefault(arm, []).append(took_s)
            if number:
                self.measured.bound.append(self._streamed.copy_s() * self._config.num_hidden_layers)
        return self.measured

    def _streamed_s(self) -> float:
        steps = self._steps[: self._options.streamed_steps]
        wait(self._streamed.device)
        began_s = time.perf_counter()
        for step in steps:
            output = self._streamed.step(step, self._cache)
        took_s = time.perf_counter() - began_s
        self._cache.crop(-len(steps))
        self._expected = output
        return took_s / len(steps)

    def _remote_s(self, profile: str, *, is_kept: bool) -> float:
        mbit, rtt_ms = PROFILES[profile] or (0.0, 0.0)
        self._links.become(mbit, rtt_ms)
        with RemoteSequential.from_swarm(
            self._config, peers=self._links.addresses, mdns=False, config=ClientConfig(peer_cache=None)
        ) as layers, layers.session() as session:  # fmt: skip
            session.step(self._prefix)
            outputs = [session.step(step) for step in self._steps[:WARM_STEPS]]
            times, computing = [], []
            for step in self._steps[WARM_STEPS : WARM_STEPS + self._options.steps]:
                began_s = time.perf_counter()
                outputs.append(session.step(step))
                times.append(time.perf_counter() - began_s)
                computing.append(sum(hop.compute_s for hop in layers.stats().waterfall[-1]))
        found, expected = outputs[self._options.streamed_steps - 1].float(), self._expected.float()
        difference = ((found - expected).norm() / expected.norm()).item()
        self.measured.difference = max(self.measured.difference, difference)
        if is_kept:
            self.measured.compute.setdefault(profile, []).append(statistics.median(computing))
        return statistics.fmean(times)


def spans_of(layers: int, peers: int) -> list[str]:
    cuts = [round(number * layers / peers) for number in range(peers + 1)]
    return [f"{start}:{end}" for start, end in zip(cuts, cuts[1:], strict=False)]


def begin_peers(options: argparse.Namespace, folder: Path, links: DelayedLinks, stack: ExitStack) -> list[ChildProcess]:
    program = [str(Path(__file__).with_name("_repeated_peer.py")), str(options.blocks)]
    children = []
    for address, span in zip(links.addresses, spans_of(options.layers, options.peers), strict=True):
        config: dict[str, Any] = {
            "model": str(folder),
            "blocks": span,
            "mdns": False,
            "peer_cache": None,
            "device": options.device,
            "announce_addresses": [address],
            "kv_budget_bytes": KV_BYTES,
        }
        config |= dict(options.server_option)
        children.append(ChildProcess("peer", config, program=program))
        stack.callback(children[-1].end)
    return children


def measure_device(options: argparse.Namespace, folder: Path) -> tuple[Measured, int]:
    """And the bytes of a block."""
    child_process.START_TIMEOUT_S = START_TIMEOUT_S
    device = torch.device(options.device)
    build(config_of(options.shape, options.blocks, 4096), device, folder)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length; peers keep it out, too
    config = config_of(options.shape, options.layers, 4096)
    named = LlamaConfig.from_dict({**config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]})
    named.save_pretrained(folder)
    with ExitStack() as stack, torch.inference_mode():
        links = stack.enter_context(DelayedLinks(options.peers))
        children = begin_peers(options, folder, links, stack)
        streamed = Streamed(folder, config, options.blocks, device)
        say("the streamed model is up")
        links.aim([child.first_line()["listening"] for child in children])
        say("the peers are up")
        bench = DeviceBench(options, config, streamed, links, config.hidden_size)
        return bench.measure(), streamed.block_bytes
