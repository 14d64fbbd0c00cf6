"""`RemoteModulesCallback`: swarm metrics in the loggers of a Lightning `Trainer`."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as exc:
    if exc.name != "lightning":
        raise
    raise ImportError("RemoteModulesCallback needs Lightning: pip install 'remote-modules[lightning]'") from exc

from remote_modules.training.swarm_metrics import SwarmMeter

__all__ = ["RemoteModulesCallback"]


class RemoteModulesCallback(Callback):
    """Logs what happened in the swarm each ``log_every_n_steps`` optimizer steps and at the end of training.

    A log has the time since the last one, so that sums over the logs are those of the run. The names begin with
    ``swarm/``, and they and their units are those of `remote_modules.training.swarm_metrics.difference`. The progress
    bar shows the failovers so far.
    """

    def __init__(self) -> None:
        self._meter: SwarmMeter | None = None
        self._logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count.

        Raises:
            UnsupportedCallError: the model has no remote blocks.
        """
        self._meter = SwarmMeter(pl_module)
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if the trainer logs at this step."""
        assert self._meter is not None, "training has started"
        pl_module.log("failovers", float(self._meter.failovers()), prog_bar=True, logger=False)
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and step > self._logged_step and step % interval == 0:
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rest."""
        if trainer.global_step > self._logged_step:
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        assert self._meter is not None, "training has started"
        metrics = self._meter.read()
        self._logged_step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)  # Lightning's own metrics count from zero
