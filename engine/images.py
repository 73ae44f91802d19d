"""What task=image needs beside the trainer: its checks, its accuracy, and its memory."""

from collections.abc import Callable

import torch

from geon.configs.choices import Layouts, Source, Task
from geon.configs.schema import Config
from geon.data import Corpus, ImageSplit
from geon.data.images import opened
from geon.engine.evaluate import ASK_EVERY, Evaluation, val_windows
from geon.engine.memory import FP32, PHASES, Prediction, held_bytes
from geon.engine.parallel import Parallel, mesh_shape
from geon.engine.scratch import scratch_bytes
from geon.errors import UsageError
from geon.launch.env import Env
from geon.models import IMAGE_MODELS, ImageModel
from geon.optim.routing import Routing
from geon.optim.shard import Plan


def check_task(config: Config, world: int) -> None:
    """Refuse a model, data or layout that are of the other task.

    Raises:
        UsageError: names the two keys.
    """
    image = config.task is Task.image
    arch, source = config.model.arch.value, config.data.source
    ours = ", ".join(IMAGE_MODELS)
    if image != (arch in IMAGE_MODELS):
        fits = f"model={ours}" if image else f"a language model: {arch} is one of images"
        raise UsageError(f"task={config.task.value} with model.arch={arch}: it takes {fits}")
    if image != (source is Source.images):
        fits = "data=images" if image else "text or ids, and data=images has classes"
        raise UsageError(
            f"task={config.task.value} with data.source={source.value}: it takes {fits}"
        )
    if not image:
        return
    if config.model.context != 1:
        raise UsageError(
            f"model.context {config.model.context} with task=image: an image is one prediction, so "
            "it is 1 (model/size=image)"
        )
    tensor = mesh_shape(config.parallel, world).get("tensor", 1)
    if tensor > 1 or config.parallel.layout in (Layouts.tp, Layouts.deepspeed):
        told = "parallel.tensor" if tensor > 1 else "parallel.layout"
        value = tensor if tensor > 1 else config.parallel.layout.value
        raise UsageError(
            f"{told}={value} with task=image: image models run under parallel=single, ddp, fsdp "
            "and hsdp without tensor ranks"
        )


@torch.no_grad()
def evaluate_images(
    parallel: Parallel,
    corpus: Corpus,
    most: int,
    batch: int,
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Loss and accuracy over the first `most` test images (0: all). Every rank must call this.

    Batches go to ranks in turn, and are filled up and left as in `evaluate`.
    """
    split = corpus.val
    assert isinstance(split, ImageSplit)
    count = val_windows(corpus, 1, most)
    batch = min(batch, count)
    starts = range(0, count, batch)
    rank, world = parallel.env.rank, parallel.env.world
    totals = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for turn in range(-(-len(starts) // world)):
        if stop is not None and turn % ASK_EVERY == ASK_EVERY - 1 and stop():
            parallel.reshard()
            return None
        mine = turn * world + rank
        first = starts[mine] if mine < len(starts) else 0
        chosen = range(first, min(first + batch, count))
        filled = [*chosen, *[first] * (batch - len(chosen))]
        images, classes = opened(torch.from_numpy(split.records[filled]).to(parallel.device))
        logits = parallel.logits(images)[: len(chosen), 0].double()
        classes = classes[: len(chosen), 0]
        if mine < len(starts):
            totals[0] += torch.nn.functional.cross_entropy(logits, classes, reduction="sum")
            totals[1] += (logits.argmax(-1) == classes).sum()
    parallel.reshard()
    nats, right = parallel.sum(totals).tolist()
    return Evaluation(count, nats / count, None, accuracy=right / count)


def predict_images(
    config: Config,
    model: ImageModel,
    routing: Routing,
    plan: Plan,
    world: int,
    kind: str,
    micro: int,
) -> Prediction:
    """Predict the bytes on the busiest rank.

    Weights, gradients and states are exact, the rest is rough: activations are the model's own
    count of numbers an image, in its arithmetic.
    """
    size = Parallel(config.parallel, Env(world=world), torch.device(kind)).dtype.itemsize
    held = held_bytes(config, model, routing, world, size)
    share = config.data.batch_tokens // world
    ddp = config.parallel.layout is Layouts.ddp and world > 1
    kept = {
        "weights": held["weights"],
        "optimizer state": held["optimizer state"],
        "gradient buckets": held["gradients"] * ddp,
        "batch": share * 3 * 32 * 32 * (FP32 + 1),
    }
    one = model.activations() * size
    running = {**kept, "gradients": held["gradients"], "activations": micro * one}
    stepping = {
        **kept,
        "gradients": held["gradients"],
        "buffers": scratch_bytes(config, routing, plan, model, world, kind),
    }
    looking = {**kept, "activations": config.eval.batch * one}
    phases = dict.fromkeys(PHASES, running) | {PHASES[-2]: stepping, PHASES[-1]: looking}
    return Prediction(phases, micro, max(1, share // micro), 1)
