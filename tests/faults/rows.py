"""The rows of the fault matrix: what happens, what must come of it, and why a row has no test yet."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ELSEWHERE", "LATER", "ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        fault: what happens.
        bar: what must come of it.
    """

    fault: str
    bar: str


ROWS: dict[str, Row] = {
    "F01": Row("a peer is killed", "identical; stall at most 1 s and 1.5 prefills of the replayed span"),
    "F02": Row("3 of 6 peers are killed, one replica of each span left", "identical in every run"),
    "F03": Row("the replacement is killed during the replay, too", "identical; nothing applied twice"),
    "F04": Row("all replicas of a span are gone, one returns after 20 s", "goes on at most 2 s after the return"),
    "F05": Row("the answer is lost after the step was done", "identical; no step applied twice"),
    "F07": Row("a peer is killed after a rollback", "identical; the history is cut with the cache"),
    "F08": Row("a peer is killed in backward", "gradients differ by at most 1e-5"),
    "F09": Row("a peer is frozen for 60 s", "stall at most 3.5 s; it serves again afterwards"),
    "F10": Row("a peer is 10 times slower", "not banned; at least 70 % of the best other path"),
    "F11": Row("5 % of the requests to a peer fail", "identical; not chosen for being idle"),
    "F12": Row("nothing passes between client and peer, no reset", "stall at most 3.5 s; session freed within 60 s"),
    "F13": Row("nothing passes in one direction", "as F12"),
    "F14": Row("the other host is gone without a word", "closed within 30 s on both sides; none left of 1,000"),
    "F15": Row("reset in the middle of a frame, cut-off stream, single bytes", "identical"),
    "F16": Row("one bit flips", "of 10,000 flips none accepted"),
    "F17": Row("a peer answers NaN, Inf, another shape, another dtype, nothing", "identical; peer banned"),
    "F18": Row("no memory at the peer", "typed refusal within 100 ms; other sessions untouched"),
    "F19": Row("the device thread dies, or the device is broken for good", "nobody waits; back within 10 s"),
    "F20": Row("the disk is full", "clear message; goes on once there is space; peer serves on"),
    "F21": Row("a file of a cache is damaged", "noticed, made again, or an error that names it"),
    "F22": Row("hub down, or offline", "starts from the cache; no socket opened"),
    "F23": Row("the port is in use, or another peer has it", "message of at most 2 lines; stranger refused"),
    "F24": Row("the tracker is killed and comes back empty", "no token lost; full within 60 s"),
    "F25": Row("all trackers are down for 1 h", "goes on; all listed again within 2 intervals"),
    "F26": Row("10,000 announces after a tracker's restart", "p99 at most 1 s"),
    "F27": Row("clocks jump by 1 h", "as F01; leases on the tracker's own clock"),
    "F28": Row("two processes with one identity", "the newer wins, the other is told; no ghost after a lease"),
    "F30": Row("SIGTERM of every peer in turn, under load", "0 failed requests; exit status 0"),
    "F31": Row("client and peer of other versions", "spoken to, or refused naming both versions"),
    "F32": Row("a peer moves its blocks while it is in use", "identical"),
    "F33": Row("the client gives up a request", "KV memory back within 2 s"),
    "F34": Row("the client vanishes with all its sessions", "KV memory back after the lease"),
    "F35": Row("10,000 sessions, opened and dropped in all ways", "memory, tasks, descriptors back to start"),
    "F36": Row("an event loop is blocked", "no failover below 2 s; lag under load at most 50 ms at p99"),
    "F38": Row("four times the load that the peer can do", "90 % of peak goodput; others keep their share"),
    "F39": Row("NAT: full cone, restricted, symmetric, carrier", "all reached, by relay if need be"),
    "F41": Row("all links stop one by one and start in another order", "no violation in any seed"),
    "F42": Row("the n-th await fails, for every n", "identical, or one typed error"),
    "F43": Row("fork, two event loops, end of the interpreter", "no deadlock; ends within 2 s"),
    "F44": Row("IPv6 only, dead addresses first, DNS fails", "connected within 3 s"),
}

# Rows without a test here, and why.
LATER: dict[str, str] = {
    "F26": "`benchmarks/tracker.py` measures it: 10,000 peers with jitter, p99 of one announce 3.3 ms",
    "F39": "needs the relay, which is not built yet",
}

# Tests outside of this folder that go deeper into a row: ``file::function``.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "F01": (
        "tests/simulation/test_every_step.py::test_loss_at_every_step_changes_no_token",
        "tests/simulation/test_kill_modes.py::test_loss_of_a_peer_changes_nothing",
        "tests/swarm/test_process_faults.py::test_killed_process_changes_no_token",
        "tests/peft_models/test_peft.py::test_peer_lost_in_a_generation",
    ),
    "F05": ("tests/server/test_handler.py::test_repeated_step_gets_the_same_answer_and_runs_once",),
    "F07": ("tests/simulation/test_rollback.py::test_peer_lost_after_a_rollback_is_replaced",),
    "F08": (
        "tests/simulation/test_every_step.py::test_loss_in_training_changes_no_gradient",
        "tests/simulation/test_kill_modes.py::test_loss_of_a_peer_in_training_changes_no_gradient",
    ),
    "F09": ("tests/swarm/test_process_faults.py::test_frozen_process_changes_no_token_and_serves_again",),
    "F10": (
        "tests/simulation/test_slow_peers.py::test_peer_that_is_slow_for_a_while_costs_little_and_is_used_again",
        "tests/simulation/test_slow_peers.py::test_crash_during_a_hedge_changes_no_token",
    ),
    "F15": ("tests/swarm/test_faulty_link.py::test_generation_goes_on_through_a_fault",),
    "F16": ("tests/wire/test_framing.py::test_any_bit_of_a_small_frame_flipped_is_never_read_as_a_frame",),
    "F17": ("tests/swarm/test_bad_input.py::test_values_that_are_not_finite_are_the_callers_and_ban_nobody",),
    "F18": ("tests/server/test_handler.py::test_session_that_does_not_fit_is_refused_before_work_and_nobody_is_hurt",),
    "F19": (
        "tests/server/test_supervisor.py::test_crash_loop_is_slowed_down_up_to_a_minute",
        "tests/server/test_executor.py::test_broken_device_answers_everybody_and_refuses_until_restarted",
    ),
    "F20": ("tests/model/test_partial.py::test_full_disk_is_told_before_anything_is_fetched",),
    "F21": (
        "tests/model/test_hub.py::test_damaged_part_is_fetched_again",
        "tests/model/test_hub.py::test_whole_shard_damaged_on_the_way_is_removed",
    ),
    "F24": ("tests/swarm/test_local_swarm.py::test_restarted_tracker_is_full_within_an_announce_interval",),
    "F30": ("tests/swarm/test_local_swarm.py::test_drained_peer_hands_its_generation_over_and_ends",),
    "F31": ("tests/wire/test_protocol.py::test_later_minor_version_is_accepted",),
    "F38": ("tests/plan/test_admission.py::test_share_of_each_client_is_equal_in_the_end",),
    "F41": ("tests/simulation/test_random_faults.py::test_random_faults_change_nothing",),
    "F42": (
        "tests/simulation/test_fail_nth_await.py::test_every_point_fails_once_and_changes_nothing",
        "tests/simulation/test_fail_nth_await.py::test_every_wait_of_the_client_is_cancelled_once_and_changes_nothing",
    ),
    "F43": ("tests/net/test_loop.py::test_forked_process_gets_a_loop_of_its_own",),
}
