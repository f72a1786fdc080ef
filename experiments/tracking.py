"""Mirror runs to wandb. The record on disk stays the home of every number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig


@contextmanager
def track(
    tracking: DictConfig, *, name: str, group: str, job_type: str, config: dict
) -> Iterator[Callable[[dict, list[dict]], None]]:
    """Open a run, and yield the function that logs its summary row and its rows per layer.

    The run is finished when the context is left, also by an exception. With ``tracking=none``
    nothing is imported or written.
    """
    if tracking.name == "none":
        yield lambda summary, layers: None
        return
    import wandb

    Path(tracking.directory).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=tracking.project,
        mode=tracking.mode,
        dir=tracking.directory,
        name=name,
        group=group,
        job_type=job_type,
        config=config,
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off"),
    )
    exit_code = 1
    try:

        def log(summary: dict, layers: list[dict]) -> None:
            columns = list(layers[0])
            table = wandb.Table(columns, [[layer[key] for key in columns] for layer in layers])
            run.log({"layers": table})
            run.summary.update(summary)
            run.summary.update(
                {
                    f"layer/{layer['layer']}/{key}": value
                    for layer in layers
                    for key, value in layer.items()
                    if key not in summary and key != "layer"
                }
            )

        yield log
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
