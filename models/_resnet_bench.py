"""One network of `models.resnet`: trained, on from its checkpoint if need be, and measured.

`config` is that of the recipe.
"""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from models import _augment as pictures
from models import _cli as cli
from models import _resnet_plan as plan
from models import _resnet_train as net
from models._augment import Data
from models._report import interleaved
from models._resnet_plan import Size
from models._train import Checkpoints, CtrlC, Progress, finite

CLASSES = 10


class Job(NamedTuple):
    """A network to train."""

    name: str
    size: Size
    seed: int

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"


def settings(config: Any, job: Job, digest: str) -> dict[str, Any]:
    """All that a result depends on."""
    flags = {name.removeprefix("--"): value for name, value in cli.fixed(config).items()}
    return {**flags, "model": job.name, "seed": job.seed, "data": digest}


def schedule(config: Any, data: Data) -> net.Training:
    """Of all epochs."""
    return config.training(config.epochs * (len(data.images.train.y) // config.batch))


def train(config: Any, job: Job, data: Data) -> dict[str, Any] | None:
    """The result of one network, or None after Ctrl-C. Goes on from its checkpoint with
    `resume`."""
    images, moments = data.images, data.moments
    per_epoch = len(images.train.y) // config.batch
    training = schedule(config, data)
    graph, state = net.start(job.size, training, images.train.x.shape[-1], CLASSES, job.seed)
    about = {**cli.fixed(config), "model": job.name, "seed": job.seed, "images": images.digest}
    folder = f"{job.name.replace(' ', '-')}-{job.seed}"
    saved = Checkpoints(config.out / "resnet-checkpoint" / folder, about)
    first, log = 0, {"losses": [], "measured": [], "seconds": 0.0, "position": None}
    if config.resume and saved.step() is not None:
        first, state, log = saved.restore(state)
        print(f"{job.title}: going on from step {first}.")
    how = config.augmentation()
    batches = pictures.batches(images.train, config.batch, how, data.fill, seed=job.seed)
    feed, waiting = pictures.stream(batches, log["position"]), collections.deque()
    progress = Progress(
        training.steps, start=first, tokens=config.batch, unit="images", doing=job.title
    )
    with CtrlC() as stop, progress:
        for step in range(first, training.steps):
            began, done = time.perf_counter(), step + 1
            state, loss = net.train_step(graph, training, state, moments, *next(feed))
            waiting.append(loss)
            epoch, within = divmod(done, per_epoch)
            keep = stop.asked or (not within and not epoch % config.checkpoint_every)
            keep = keep or done == training.steps
            measure = not within and (epoch % config.measure_every == 0 or done == training.steps)
            # the loss of the step before: the device always has something to do
            while len(waiting) > (0 if keep or measure else 1):
                log["losses"].append(finite(job.name, waiting.popleft()))
            log["seconds"] += time.perf_counter() - began
            if measure:
                now = net.evaluated(graph, state, averaged=True)
                share, _ = net.measure(now, moments, images.measured, config.batch)
                log["measured"].append([epoch, share])
            if log["losses"]:
                progress.update(done, note(log))
            if keep:
                log["position"] = feed.get_state()
                saved.save(done, state, log)
            if stop.asked:
                break
    saved.close()
    feed.close()
    return None if stop.asked else result(config, job, data, (graph, state), batches, log)


def note(log: dict[str, Any]) -> str:
    """For the progress bar."""
    right = f", {100 * log['measured'][-1][1]:.2f}% right" if log["measured"] else ""
    return f"loss {log['losses'][-1]:.3f}{right}"


def result(
    config: Any, job: Job, data: Data, trained: Any, batches: Any, log: dict[str, Any]
) -> dict[str, Any]:
    """What is known of a network that has done all its steps."""
    graph, state = trained
    images, moments = data.images, data.moments
    if config.statistics == "re-estimated":
        count = config.statistics_batches
        state = net.reestimated(graph, state, moments, batches, count, averaged=True)
    found = {}
    for which, averaged in (("", True), (", last weights", False)):
        model = net.evaluated(graph, state, averaged=averaged, folded=config.fold)
        right, loss = net.measure(model, moments, images.measured, config.batch)
        found |= {f"accuracy{which}": right, f"loss{which}": loss}
    side, channels = images.train.x.shape[-2:]
    costs = plan.costs(job.size, side=side, channels=channels, classes=CLASSES)
    densities = job.size.densities or (1.0,) * len(job.size.blocks)
    per_epoch = len(images.train.y) // config.batch
    means = [
        sum(log["losses"][i : i + per_epoch]) / per_epoch
        for i in range(0, len(log["losses"]), per_epoch)
    ]
    return {
        **found,
        **costs._asdict(),
        "depth": plan.depth(job.size),
        "stored": list(densities),
        "seconds": log["seconds"],
        "training losses": means,
        "measured": log["measured"],
    }


def step_times(config: Any, sizes: Mapping[str, Size], data: Data) -> dict[str, np.ndarray]:
    """Seconds of training steps of fresh networks on one batch, in rounds; by the programs that
    trained them, which are not compiled again."""
    x, y = (a[: config.batch] for a in data.images.train)
    training = schedule(config, data)

    def stepping(size: Size) -> Callable[[], Any]:
        graph, state = net.start(size, training, x.shape[-1], CLASSES, config.seed)

        def step() -> Any:
            nonlocal state
            state, loss = net.train_step(graph, training, state, data.moments, x, y)
            return loss

        return step

    return interleaved({name: stepping(size) for name, size in sizes.items()}, config.rounds)
