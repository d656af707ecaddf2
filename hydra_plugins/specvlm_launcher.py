"""Hydra launcher of specvlm: check all jobs of a sweep, then run them in turn or pass them to another launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:
    from specvlm.app.launch import Call


class TurnsLauncher(Launcher):
    """Composes and checks all jobs before the first starts, then runs them in turn.

    over: configuration of another launcher that runs the jobs instead; None if there is none.
    """

    def __init__(self, over: DictConfig | None = None) -> None:
        self.over = over

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.call: Call = task_function  # type: ignore[assignment]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and check the jobs of these overrides, and run them."""
        from specvlm.app import compose

        configs = [self.context.config_loader.load_sweep_config(self.config, list(words)) for words in job_overrides]
        jobs = compose.jobs_of(configs)
        self.call.expect(jobs)
        if self.over is not None:
            return self._other().launch(job_overrides, initial_job_idx=initial_job_idx)
        for number, config in enumerate(configs, start=initial_job_idx):
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
        return self.call.take_turns(list(zip(jobs, configs, strict=True)), self.context)

    def _other(self) -> Any:
        """Instantiate the other launcher, which starts the jobs instead of this one."""
        config = self.config.copy()
        with open_dict(config):
            config.hydra.launcher = self.over
        return Plugins.instance().instantiate_launcher(self.context, self.call, config)
