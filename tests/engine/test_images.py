"""task=image: data, models, accuracy, and what is refused."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from geon.data import ImageBatches, glyph_corpus
from geon.data.images import RECORD, cifar_corpus, opened
from geon.engine.build import make_model
from geon.engine.images import check_task, evaluate_images
from geon.engine.main import execute
from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.local import torchrun_command
from geon.models import IMAGE_MODELS, ModelShape
from geon.optim import Role
from geon.scripts import generate
from tests.distributed.jobs import launch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["task=image", "parallel=single", "device=cpu", "data.tokens=400", "data.batch_tokens=50"]
SMALL += ["model.d_model=32", "checkpoint=default", "logger.progress=false", "schedule.steps=4"]


def made(arch, **options):
    shape = {"vocab_size": 26, "context": 1, "n_layer": 3, "n_head": 4, "d_model": 32, **options}
    model = IMAGE_MODELS[arch](ModelShape(**shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for info in model.infos:
            model.get_parameter(info.name).copy_(model.initial(info, generator))
    return model


def run(folder, *overrides):
    execute(compose([*SMALL, f"output={folder}", *overrides]), Env())
    return json.loads((folder / "run" / "report.json").read_text())


def batch(file, labels, pixels=RECORD - 1, dtype=np.uint8):
    data = np.arange(len(labels) * pixels).reshape(len(labels), pixels).astype(dtype)
    file.write_bytes(pickle.dumps({b"data": data, b"labels": labels}, protocol=2))
    return data


def cifar(folder, **options):
    for i in range(1, 6):
        batch(folder / f"data_batch_{i}", [i, i + 1])
    return batch(folder / "test_batch", [0, 9, 3], **options)


def test_glyphs_are_the_same_every_time_and_of_every_class():
    first = glyph_corpus(300, 20.0)
    glyph_corpus.cache_clear()
    again = glyph_corpus(300, 20.0)
    assert first.facts == again.facts
    assert (len(first.train.records), len(first.val.records)) == (240, 60)
    assert set(first.train.records[:, 0]) == set(range(26))
    assert first.train.records[:, 1:].std() > 40


def test_an_epoch_reads_every_image_once_over_the_ranks():
    split = glyph_corpus(100, 20.0).train
    ranks = [ImageBatches(split, 1, 8, rank, 2, 4, seed=3) for rank in range(2)]
    read = np.concatenate([r.windows_at(step).numpy() for step in range(10) for r in ranks])
    assert sorted(map(bytes, read)) == sorted(map(bytes, split.records))
    images, classes = ranks[0].step(0)[0]
    assert images.shape == (4, 3, 32, 32) and classes.shape == (4, 1)
    assert -1 <= float(images.min()) < float(images.max()) <= 1


def test_both_forms_of_cifar_are_read(tmp_path):
    data = cifar(tmp_path)
    python = cifar_corpus(str(tmp_path))
    assert python.val.records[:, 0].tolist() == [0, 9, 3]
    assert (python.val.records[:, 1:] == data).all() and len(python.train.records) == 10
    (binary := tmp_path / "binary").mkdir()
    for i in range(1, 6):
        python.train.records[2 * i - 2 : 2 * i].tofile(binary / f"data_batch_{i}.bin")
    python.val.records.tofile(binary / "test_batch.bin")
    assert cifar_corpus(str(binary)).facts == python.facts


def test_files_that_are_not_cifar_are_refused(tmp_path):
    with pytest.raises(UsageError, match="lacks data_batch_1, .*CIFAR-10"):
        cifar_corpus(str(tmp_path))
    cifar(tmp_path, pixels=100)
    with pytest.raises(UsageError, match=r"uint8 \(3, 100\), with 3 labels"):
        cifar_corpus(str(tmp_path))
    cifar(tmp_path)
    batch(tmp_path / "data_batch_2", [3, 10])
    with pytest.raises(UsageError, match="not 0 to 9"):
        cifar_corpus(str(tmp_path))
    (tmp_path / "data_batch_2").write_bytes(b"text")
    with pytest.raises(UsageError, match="no Python batch"):
        cifar_corpus(str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(bytes(RECORD + 1))
    with pytest.raises(UsageError, match=r"lacks data_batch_1\.bin"):
        cifar_corpus(str(tmp_path))
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(bytes(RECORD + 1))
    with pytest.raises(UsageError, match=f"no records of {RECORD}"):
        cifar_corpus(str(tmp_path))


class Spy:
    def __reduce__(self):
        return Path.touch, (Path("called"),)


def test_a_pickle_that_would_call_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Spy()}))
    with pytest.raises(UsageError, match="which is not read"):
        cifar_corpus(str(tmp_path))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("arch", IMAGE_MODELS)
def test_models_declare_roles_and_count_their_flops(arch):
    model = made(arch)
    assert [i.name for i in model.infos] == [n for n, _ in model.named_parameters()]
    assert [i.role for i in model.infos if i.name == "head.weight"] == [Role.HEAD]
    images, classes = torch.randn(4, 3, 32, 32), torch.randint(0, 26, (4, 1))
    logits = model(images)
    assert logits.shape == (4, 1, 26)
    wanted = torch.nn.functional.cross_entropy(logits[:, 0], classes[:, 0])
    assert model(images, classes).item() == pytest.approx(wanted.item(), rel=1e-5)
    math_alone = sdpa_kernel(SDPBackend.MATH)  # the fused kernel's FLOPs are not counted
    with math_alone, FlopCounterMode(display=False) as counter:
        model(images, classes).backward()
    # Pixels need no gradient: a third of the first matrix's, at the places where it is used.
    places = {"mlp": 1, "vit": 64, "conv": 256}[arch]
    first = next(i for i in model.infos if i.role is Role.HIDDEN)
    assert counter.get_total_flops() / 4 == model.flops_per_token() - 2 * first.numel * places


def test_the_mlp_is_the_published_one_and_kernels_are_scions():
    shapes = [i.shape for i in made("mlp", d_model=128, vocab_size=10).infos]
    assert shapes == [(128, 3072), (64, 128), (10, 64)]
    kernels = [i for i in made("conv").infos if i.kernel]
    assert [i.shape[:2] for i in kernels] == [(8, 3), (16, 8), (32, 16)]
    assert all(i.by_position and i.blocks()[0].forms[0].count == 9 for i in kernels)


def test_accuracy_is_that_of_every_image_by_hand():
    corpus, model = glyph_corpus(300, 20.0), made("mlp")
    parallel = Parallel(compose(SMALL).parallel, Env(), torch.device("cpu"))
    parallel.wrap(model)
    images, classes = opened(torch.from_numpy(corpus.val.records))
    with torch.no_grad():
        logits = model(images)[:, 0]
    found = evaluate_images(parallel, corpus, 0, 25)  # three batches, the last not full
    right = (logits.argmax(1) == classes[:, 0]).double().mean()
    assert found.accuracy == float(right) and found.tokens == 60
    nats = torch.nn.functional.cross_entropy(logits.double(), classes[:, 0])
    assert found.nats_per_token == pytest.approx(float(nats), rel=1e-6)


@pytest.mark.parametrize(
    "choice", ["model=mlp optim=adamw", "model=vit optim=scion", "model=conv optim=manifold_muon"]
)
def test_a_run_resumes_to_the_bit(choice, tmp_path):
    choice = [*choice.split(), "schedule=constant", "checkpoint.every=2"]
    whole = run(tmp_path / "whole", *choice)
    run(tmp_path / "cut", *choice, "schedule.steps=2")
    resumed = run(tmp_path / "cut", *choice)
    for key in ("val_accuracy", "val_nats_per_token", "tokens"):
        assert resumed[key] == whole[key], key
    assert whole["val_tokens"] == 80 and 0 <= whole["val_accuracy"] <= 1
    with pytest.raises(UsageError, match="no text to generate"):
        generate.load(tmp_path / "whole" / "run", "cpu")


def test_it_learns(tmp_path):
    found = run(tmp_path, "optim=muon", "data.tokens=3000", "schedule.steps=60")
    assert found["val_accuracy"] > 2 / 26  # chance is half of it, five standard errors below
    assert found["val_nats_per_token"] < math.log(26)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=image", "data=stdlib"], "task=image with data.source=stdlib"),
        (["task=image", "model=gpt"], "task=image with model.arch=gpt: it takes model=mlp"),
        (["model=vit"], "task=text with model.arch=vit"),
        (["data=images"], "task=text with data.source=images"),
        (["task=image", "model/size=tiny"], "model.context 256 with task=image"),
        (["task=image", "parallel=fsdp", "parallel.tensor=2"], "parallel.tensor=2"),
        (["task=image", "parallel=tp"], "=tp with task=image|parallel.tensor"),
    ],
)
def test_what_belongs_to_the_other_task_is_refused(overrides, words):
    with pytest.raises(UsageError, match=words):
        check_task(compose(overrides), 2 if "parallel" in overrides[-1] else 1)


@pytest.mark.parametrize(
    "typed",
    ["data.tokenizer=gpt2", "data.bpe_vocab=300", "eval.sample_tokens=9", "model.softcap=15"]
    + ["model.context=64", "optim.rest.lr=0.1", "optim.embedding.lr=0.1"],
)
def test_keys_of_text_are_refused(typed):
    with pytest.raises(UsageError, match=f"{typed.split('=')[0]}=.* has no effect"):
        compose(["task=image", "optim=muon", typed], "train")


def test_sizes_of_another_model_are_refused():
    with pytest.raises(UsageError, match="model.mlp_ratio=2: mlp has no such option"):
        make_model(compose(["task=image", "optim=muon", "model.mlp_ratio=2"], "train").model)


def test_two_ranks_see_what_one_sees(tmp_path):
    """DDP, checkpoint and all: losses agree with one process."""
    told = [*SMALL[:1], *SMALL[2:], "optim=manifold_muon", f"output={tmp_path}"]
    done = launch(torchrun_command(2, [*told, "parallel=ddp", "name=two"]), 300)
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(tmp_path, "optim=manifold_muon")
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["val_nats_per_token"] == pytest.approx(one["val_nats_per_token"], rel=1e-5)
    assert two["val_accuracy"] == pytest.approx(one["val_accuracy"], abs=0.02)
