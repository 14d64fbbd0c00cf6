"""`RemoteModulesTrainerCallback`: swarm metrics in the logs of transformers' `Trainer`, and of TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from remote_modules.training.swarm_metrics import SwarmMeter

__all__ = ["RemoteModulesTrainerCallback"]


class RemoteModulesTrainerCallback(TrainerCallback):
    """Adds what happened in the swarm since the last log to each log, by names that begin with ``swarm/``.

    The names and units are those of `remote_modules.training.swarm_metrics.difference`. Given as
    ``Trainer(callbacks=[...])`` it comes after the reporters, so that ``state.log_history`` and the progress bar have
    the metrics but TensorBoard and the like do not; use `add_to` for these.
    """

    def __init__(self) -> None:
        self._meter: SwarmMeter | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Put this before the trainer's reporters, so that whatever it reports to gets the metrics too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count.

        Raises:
            UnsupportedCallError: the model has no remote blocks.
        """
        self._meter = SwarmMeter(kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to ``logs``, which later callbacks see, and to the history."""
        if self._meter is None or logs is None:
            return
        metrics = self._meter.read()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
