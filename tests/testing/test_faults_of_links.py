"""Every fault of a link does what it says, is counted, and nothing else changes."""

from __future__ import annotations

import asyncio

import pytest

from remote_modules.testing.memory_network import KEEPALIVE_S
from remote_modules.testing.virtual_time import HOST, VirtualLoop, run_virtual

from .test_memory_network import ADDRESS, Net, now_s, virtual

CLIENT = "client"
DATA = bytes(range(256)) * 20


@virtual
async def test_lost_segments_come_late_and_in_order() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.path(CLIENT, ADDRESS).loss = 0.5
    for number in range(20):
        ours.write(bytes([number]) * 10)
    await asyncio.sleep(300.0)
    assert theirs.received == b"".join(bytes([number]) * 10 for number in range(20))
    assert net.network.fired["loss"] >= 5
    assert theirs.times[-1] - 0.1 >= 0.05 + 0.2  # one delay, one timeout


@virtual
async def test_loss_of_everything_ends() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.path(CLIENT, ADDRESS).loss = 1.0
    ours.write(b"abc")
    await asyncio.sleep(300.0)
    assert theirs.received == b"abc"
    assert net.network.fired["loss"] == 8
    assert theirs.times == [pytest.approx(0.1 + 0.05 + 0.2 * (2**8 - 1))]


@virtual
async def test_jitter_lets_connections_overtake_each_other_but_keeps_their_order() -> None:
    net = Net(delay_s=0.05)
    links = [await net.connect() for _ in range(8)]
    net.network.path(CLIENT, ADDRESS).jitter_s = 1.0
    for ours, _ in links:
        ours.write(b"first")
        ours.write(b"second")
    await asyncio.sleep(5.0)
    assert all(theirs.received == b"firstsecond" for _, theirs in links)
    firsts = [theirs.times[0] for _, theirs in links]
    assert firsts != sorted(firsts)


@virtual
async def test_bandwidth_is_shared() -> None:
    net = Net(delay_s=0.0)
    links = [await net.connect() for _ in range(2)]
    net.network.path(CLIENT, ADDRESS).bytes_per_s = 1000.0
    for ours, _ in links:
        ours.write(bytes(500))
    await asyncio.sleep(5.0)
    assert [theirs.times[-1] for _, theirs in links] == [0.5, 1.0]


@virtual
async def test_one_way_partition_cuts_one_way_until_it_heals() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.partition([CLIENT], [ADDRESS], is_one_way=True)
    ours.write(b"there")
    theirs.write(b"back")
    await asyncio.sleep(60.0)
    assert (theirs.received, ours.received) == (b"", b"back")
    dial = asyncio.ensure_future(net.connect())
    await asyncio.sleep(60.0)
    assert not dial.done()
    net.network.mend([CLIENT], [ADDRESS])
    await asyncio.sleep(1.0)
    assert theirs.received == b"there"
    assert dial.done()


@virtual
async def test_one_byte_slices() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.path(CLIENT, ADDRESS).max_slice_bytes = 1
    ours.write(b"abcdef")
    await asyncio.sleep(1.0)
    assert theirs.slices == [b"a", b"b", b"c", b"d", b"e", b"f"]


@virtual
async def test_truncated_write_ends_in_a_reset() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.path(CLIENT, ADDRESS).truncate = 1.0
    ours.write(DATA)
    await asyncio.sleep(1.0)
    assert DATA.startswith(theirs.received)
    assert len(theirs.received) < len(DATA)
    ((_, reason),) = theirs.losses
    assert isinstance(reason, ConnectionResetError)
    assert net.network.fired["truncate"] == 1


@virtual
async def test_flip_changes_one_bit() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.network.path(CLIENT, ADDRESS).flip = 1.0
    ours.write(DATA)
    await asyncio.sleep(1.0)
    changed = [a ^ b for a, b in zip(DATA, theirs.received, strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0].bit_count() == 1
    assert net.network.fired["flip"] == 1


@virtual
async def test_host_that_vanishes_tells_nobody_until_the_kernel_finds_out() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.host.vanish()
    await asyncio.sleep(KEEPALIVE_S - 1.0)
    assert theirs.losses
    assert not ours.losses
    await asyncio.sleep(2.0)
    ((_, reason),) = ours.losses
    assert isinstance(reason, TimeoutError)


@virtual
async def test_host_that_is_back_resets_what_it_does_not_know() -> None:
    net = Net(delay_s=0.05)
    ours, theirs = await net.connect()
    net.host.vanish()
    ours.write(b"lost")
    await asyncio.sleep(1.0)
    assert not ours.losses
    net.host.accept = net._accept
    ours.write(b"who are you")
    await asyncio.sleep(1.0)
    ((_, reason),) = ours.losses
    assert isinstance(reason, ConnectionResetError)
    assert theirs.received == b""


def test_suspended_host_runs_nothing_and_then_what_was_due() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        log: list[tuple[str, float]] = []

        async def ticks(name: str) -> None:
            HOST.set(name)
            for _ in range(3):
                await asyncio.sleep(1.0)
                log.append((name, now_s()))

        tasks = [loop.create_task(ticks(name)) for name in ("awake", "asleep")]
        await asyncio.sleep(0.5)
        loop.suspend("asleep")
        await asyncio.sleep(10.0)
        loop.resume("asleep")
        await asyncio.gather(*tasks)
        return log

    assert run_virtual(main()) == [
        *(("awake", time_s) for time_s in (1.0, 2.0, 3.0)),
        *(("asleep", time_s) for time_s in (10.5, 11.5, 12.5)),
    ]
