"""Bad input ends in one line and exit status 2, and nothing is written (R25, R30, R31)."""

import random
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import get_args

import pytest

from geon.benches import fuzz
from geon.configs.effects import RULE_READS, _has_members
from geon.configs.folder import check_folder
from geon.configs.overrides import kind_of
from geon.configs.ranges import RANGES, RULE_RANGES
from geon.configs.recipes import OverrideConfig, fill
from geon.configs.schema import Config
from geon.engine.build import make_model, make_routing
from geon.engine.checks import _read_data, check, check_launched
from geon.errors import UsageError
from geon.launch import slurm
from geon.launch.arguments import read_arguments
from geon.launch.compose import compose, jobs
from geon.launch.local import ROOT
from geon.scripts import check_jobs, generate
from tests import warm

TINY = fuzz.TINY


def train(folder, *arguments, environment=None):
    """What `python train.py` prints and leaves."""
    words = [*TINY, *arguments]
    return warm.run(0, ROOT / "train.py", words, timeout=120, env=environment, cwd=folder)


def refusal(*overrides):
    with pytest.raises(UsageError) as caught:
        config = compose([*TINY, *overrides], "train")
        check_launched(config, False)
        check(config, 1)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def leaves(schema, prefix=""):
    for f in fields(schema):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f.type


@pytest.mark.row("R25")
def test_every_leaf_of_the_schema_has_a_range_or_a_type_of_few_words():
    rules = {f"optim.{role}.{f.name}" for f in fields(OverrideConfig) for role in ROLES}
    for key, kind in leaves(Config):
        few = bool in {kind, *get_args(kind)} or (isinstance(kind, type) and issubclass(kind, Enum))
        word = key.split(".")[-1]
        assert few or (word in RULE_RANGES if key in rules else key in RANGES), key
        assert not few or key not in RANGES
        assert kind_of(key) == kind


ROLES = ("hidden", "embedding", "head", "tied", "rest")


def test_every_word_of_a_rule_is_read_by_some_kind_of_it():
    said = {word for words in RULE_READS.values() for word in words.split()}
    assert said == {f.name for f in fields(OverrideConfig)}


@pytest.mark.parametrize("model", ["gpt", "gpt2"])
@pytest.mark.parametrize("gains", ["false", "true"])
def test_roles_that_are_said_to_be_empty_are(model, gains):
    if model == "gpt2" and gains == "true":
        return  # refused where the model is made
    config = compose([*TINY, f"model={model}", f"model.gains={gains}", "optim=adamw"])
    used = set(make_routing(make_model(config.model), config.optim).rules)
    assert used == {role for role in ROLES if _has_members(config, f"optim.{role}")}


WITHOUT_EFFECT = """
optim.tied.norm=../x | optim=adamw optim.hidden.norm=sign | optim.hidden.eps=1e-5
optim=adamw optim.hidden={momentum: 0.5} | data.path=x | data.train=x | parallel.replicas=3
data.dir=x | data.dtype=uint16
parallel.zero=2 | schedule=constant schedule.decay=0.3 | logger.wandb_project=x
plan.world_size=8 | cluster.nodes=2 | sweep=lr | sweep.parallel_jobs=2 | model.base_width=32
optim.rest.rule=steepest
optim=adamw optim.compile=true | optim=adamw optim.record_pairs=[1] | shard.wire=bf16
optim=adamw logger.geometry_every=3 | parallel=ddp parallel.share_gpu=true
optim=adamw parallel=ddp shard.reproducible=true | parallel=single parallel.share_gpu=true
parallel=ddp shard.reproducible=true shard.objective=bytes
optim.embedding.per_head=true
optim=adamw optim.polar.steps=3 | optim.solver.method=oneshot | eval.sample_temperature=2.0
model=gpt2 optim.head.lr=1 | optim.hidden.lr=0.1 optim.embedding.lr=0.1 optim.head.lr=0.1 \
optim.overrides.qk=null optim.lr=0.3
"""


@pytest.mark.parametrize(
    "line", [x for t in WITHOUT_EFFECT.strip().split("\n") for x in t.split(" | ")]
)
@pytest.mark.row("R25")
def test_what_has_no_effect_is_refused_by_key(line):
    words = line.replace("{momentum: 0.5}", "{momentum:0.5}").split(" ")
    key = words[-1].split("=")[0]
    message = refusal(*words)
    assert "no effect" in message and key in message


def test_a_key_that_says_what_holds_anyway_is_let_through():
    compose([*TINY, "data.path=", "logger.wandb_mode=offline", "optim.max_norm=1"], "train")
    compose([*TINY, "optim.rest.rule=adamw", "optim.tied.lr=0.04"], "train")  # the recipe's own


REFUSED = """
model.n_layer=abc : abc ; Integer | optim.lr=null : optim.lr | data=5 : '5' is not an option
+optim.overrides.q=5 : optim.overrides.q must be a mapping | +sweep.arms.x=5 : sweep.arms.x
+optim.overrides.hidden={pattern:'*',lr:1} : whose rules it would replace
optim=[muon,adamw] : is not an option of optim | optim=muon,adamw : with -m
data.shuffle=2 : data.shuffle must be true or false, got 2 | optim.head.weight_decay=1e30 : at most
optim.polar.accuracy=5 : optim.polar.accuracy | model.softcap=1e-30 : model.softcap
model.vocab_size=4 : model.vocab_size 4 is below data.vocab_size 64
model.vocab_size=1000000000000 : at most | model.n_layer=100000 : at most 1,000
model.context=0 : model.context must be positive | model.mlp_ratio=1000000 : at most 64
schedule.warmup=0.6 schedule.decay=0.8 : overlap | ~seed : set it to another value
name=José : in quotes: 'name="..."' | seed=99999999999999999999999 : seed | name=${nope} : nope
name=${output} output=${name} : Recursive interpolation | output=/dev/null : is a file
output=/proc : cannot be used | parallel=deepspeed_z3 : needs a process group
optim.hidden.betas=${.lr} : optim.hidden.betas | optim.tied=${.lr} : optim.tied holds keys
optim.embedding.weight_decay=700 : optim.embedding.weight_decay 700.0 x optim.embedding.lr 0.04
schedule.decay=1e-30 : schedule.decay | schedule.budget_seconds=1e-30 : schedule.budget_seconds
data=text data.tokens=0 data.path=/proc/self/mem : data.path
optim.overrides=${name} : optim.overrides must be a mapping, got 'run'
sweep.arms=${model} : sweep.arms must be a mapping
+optim.hidden.finishes={row_cap:{most:x}} : optim.hidden ; most must be a number, got 'x' (finishes)
+optim.hidden.finishes={row_cap:{most:true}} : must be a number
optim.head.manifold=oblique +optim.head.manifold_options={axis:5} : axis must be a word, got 5
+optim.hidden.manifold_options={1a:5} : takes no options, not 1a (manifold_options)
checkpoint.allow_change=[no.key] : checkpoint.allow_change ; no.key
"""
CASES = [x.split(" : ") for t in REFUSED.strip().split("\n") for x in t.split(" | ")]


@pytest.mark.parametrize(("line", "said"), CASES)
@pytest.mark.row("R25")
def test_bad_values_are_refused_in_our_words(line, said):
    message = refusal(*line.split(" "))
    for words in said.split(" ; "):
        assert words in message


@pytest.mark.parametrize("node", fuzz.NODES)
@pytest.mark.row("R25")
def test_a_text_where_keys_are_expected_is_refused_by_key(node):
    content = "${name}"
    for part in reversed(node.split(".")):
        content = {part: content}
    with pytest.raises(UsageError, match=f"^{node} must be a mapping, got .*name"):
        fill(Config, content)


def test_names_stay_as_they_were_typed():
    for text in ("1e5", "007", "1_000", "true"):
        assert compose([f"name={text}"]).name == text


@pytest.mark.row("R25")
def test_a_hundred_drawn_command_lines_end_well():
    cases, wrong = fuzz.fuzz(100, seed=11, processes=1)
    bad = [case for case in cases if case.outcome not in ("clean", "accepted")]
    assert not bad and not wrong
    assert sum(case.outcome == "clean" for case in cases) > 50


@pytest.mark.slow
@pytest.mark.row("R25")
def test_two_thousand_drawn_command_lines_end_well():
    cases, wrong = fuzz.fuzz(2000, seed=0, processes=40)
    assert not [c for c in cases if c.outcome not in ("clean", "accepted")] and not wrong


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    def fails(error):
        def composed(*_):
            raise error

        monkeypatch.setattr(fuzz, "compose", composed)
        return fuzz.judge(fuzz.Case("value", ["seed=1"]), tmp_path).outcome

    assert fails(UsageError("seed must be 2, got 1")) == "clean"
    for text in ("something is wrong", "the name of data is wrong", "${name} (key: )"):
        assert fails(UsageError(text)) == "unnamed"
    assert fails(UsageError("seed\nTraceback")) == "unnamed"
    assert fails(KeyError("x")) == "traceback"
    monkeypatch.undo()
    monkeypatch.setattr("geon.configs.effects.unread", lambda *_: "")
    case = fuzz.judge(fuzz.Case("value", ["optim.hidden.eps=0.5"]), tmp_path)
    assert case.outcome == "silent" and "optim.hidden.eps" in case.said


@pytest.mark.row("R26")
def test_shards_of_random_bytes_are_refused_by_name(tmp_path):
    rng, shard = random.Random(3), tmp_path / "a.bin"
    words = ["data=bins", "data.tokens=0", f"data.train={shard}", f"data.val={shard}"]
    config = compose([*TINY, *words])
    whole = b"\x88\xa2\x34\x01\x01\x00\x00\x00\x40\x00\x00\x00" + bytes(1012) + bytes(range(128))
    for _ in range(200):
        content = bytearray(rng.choice([whole, rng.randbytes(rng.randrange(3000))]))
        for _ in range(rng.randrange(1, 4)):
            if content:
                content[rng.randrange(min(len(content), 12))] = rng.randrange(256)
        shard.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content) + 1)])])
        with pytest.raises(UsageError, match=r"a\.bin"):
            _read_data(config)


BAD_YAML = {
    "binary": b"\x00\xff\xfe\x01",
    "cyclic": b"a: &a [*a]\n",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
    ),
    "huge": b"a: " + b"x" * (1 << 20),
    "deep": b"[" * 20_000,
    "open": b"a: {b",
    "python": b"a: !!python/object/apply:os.system [id]\n",
}


@pytest.mark.parametrize("kind", BAD_YAML)
@pytest.mark.row("R30")
def test_bad_config_files_are_refused_by_name(kind, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_bytes(BAD_YAML[kind])
    with pytest.raises(UsageError, match=r"bad\.yaml|experiment") as caught:
        compose([*TINY, "experiment=bad"], "train", tmp_path)
    assert str(caught.value).isprintable()


def test_random_config_files_are_refused_or_read(tmp_path):
    rng, file = random.Random(5), tmp_path / "bad.yaml"
    for _ in range(300):
        file.write_bytes(bytes(rng.choice(b"ab:{}[]&*!- \n'\"%,\xff#|>") for _ in range(40)))
        try:
            check_folder(tmp_path)
        except UsageError as error:
            assert "bad.yaml" in str(error) and str(error).isprintable()


def test_config_files_of_ones_own_are_options(tmp_path):
    tmp_path = tmp_path / "mine \u00fc"
    tmp_path.mkdir()
    for group, text in {
        "optim": "defaults: [muon]\nlr: 0.033\n",
        "experiment": "name: mine\n",
    }.items():
        (tmp_path / group).mkdir()
        head = "# @package _global_\n" if group == "experiment" else ""
        (tmp_path / group / "mine.yaml").write_text(head + text)
    config = compose([*TINY, "optim=mine", "experiment=mine"], "train", tmp_path)
    assert (config.optim.lr, config.name) == (0.033, "mine")
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\noptim: {lrr: 1}\n")
    with pytest.raises(UsageError, match="experiment/typo.*lrr"):
        compose([*TINY, "experiment=typo"], "train", tmp_path)
    with pytest.raises(UsageError, match="'mine' is not an option of optim"):
        compose([*TINY, "optim=mine"])


TARGETS = "os.system os.getcwd subprocess.run builtins.eval builtins.exec pathlib.Path.write_text"
TARGETS += " torch.load pickle.loads posix.system pandas.eval shutil.rmtree importlib.import_module"


@pytest.mark.row("R30")
def test_nothing_is_made_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ("+hydra.callbacks.x", "hydra.job_logging.handlers.x", "+hydra.sweeper", "+hydra")
    places += (
        "+optim.hidden.options",
        "+optim.hidden.finishes.row_cap",
        "+optim.overrides.q",
        "+x",
    )
    for target in TARGETS.split():
        for place in places:
            with pytest.raises(UsageError, match="by name|unknown config key"):
                compose([f"{place}._target_={target}"], "train")
    (tmp_path / "experiment").mkdir()
    bad = tmp_path / "experiment" / "bad.yaml"
    for text in (
        "hydra: {callbacks: {x: {_target_: os.getcwd}}}",
        "x: {_target_: os.getcwd}",
        "output: ${oc.env:HOME}",
        "optim: {hidden: {options: {_target_: os.system}}}",
    ):
        bad.write_text(f"# @package _global_\n{text}\n")
        if text.startswith("hydra"):
            compose([*TINY, "experiment=bad"], "train", tmp_path)  # Hydra's part makes nothing
        else:
            with pytest.raises(UsageError):
                compose([*TINY, "experiment=bad"], "train", tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["bad.yaml"]


@pytest.mark.row("R31")
def test_a_secret_gets_nowhere(tmp_path):
    canary = "c0ffee" * 5
    secret = {"CANARY": canary, "WANDB_API_KEY": canary}
    for text in ("logger.wandb_project=${oc.env:CANARY}", "eval.sample_prompt='${oc.env:CANARY}'"):
        with pytest.raises(UsageError, match="would be looked up outside the config"):
            compose([text])
    with pytest.raises(UsageError) as caught:
        compose([f"+api_key={canary}"])
    assert canary not in str(caught.value)
    done = train(tmp_path, "output=runs", "name=1e5", environment=secret)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "1e5" / "report.json").is_file()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in written if canary.encode() in p.read_bytes()]
    assert canary not in done.stdout + done.stderr


@pytest.mark.row("R25")
def test_hydras_own_refusals_are_one_line_and_exit_2(tmp_path):
    done = train(tmp_path, "-m", "model.n_head=1,3")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, []), "no job runs before a bad one"
    done = train(tmp_path, "-m", "seed=0,x")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "geon: error: " in done.stderr and "seed=x" in done.stderr
    assert not list(tmp_path.iterdir())


def test_jobs_of_a_multirun_are_named_by_what_tells_them_apart():
    found = jobs(
        ["name=long", "optim.polar.coefficients=keller", "optim.lr=0.1,0.2", "seed=range(2)"]
    )
    assert [told for told, _ in found][:2] == ["lr=0.1,seed=0", "lr=0.1,seed=1"]
    assert found[-1][1][-2:] == ["optim.lr=0.2", "seed=1"]
    for several in ("seed=range(5000)", "seed=glob(*)", "seed=1,2,1"):
        with pytest.raises(UsageError, match="seed"):
            jobs([several])


@pytest.mark.parametrize(
    "flag", ["-cn=x", "--config-path=x", "--experimental-rerun=x", "--bogus", "--hydra-help"]
)
def test_flags_that_are_not_taken_are_refused(flag):
    with pytest.raises(UsageError, match="not taken|unrecognized"):
        read_arguments([flag, "seed=1"])


def test_several_ranks_start_no_multirun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="geon.launch.sweep"):
        read_arguments(["-m", "seed=0,1"])


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        (["parallel=single"], 8, "runs one process, not 8 .WORLD_SIZE, or plan.world_size"),
        (["parallel=ddp"], 3, "data.batch_tokens 64 is not a multiple of"),
        (["parallel=hsdp", "parallel.replicas=3"], 8, "parallel.replicas 3 does not fit 8 ranks"),
        (["data=text", "data.tokens=0", "data.path=/nope"], 1, "data.path '/nope' does not exist"),
        (["optim=lion", "parallel=fsdp"], 4, "optim.hidden.rule=baseline"),
    ],
)
def test_jobs_that_must_fail_are_found_before_they_are_queued(options, ranks, said):
    job = check_jobs.Start([*TINY, *options], ranks)
    with pytest.raises(UsageError, match=said):
        check_jobs.check_all([job])
    assert said.split(" ")[0]


def test_no_sbatch_file_is_made_of_a_job_that_must_fail(capsys):
    assert slurm.main(["cluster=slurm", "cluster.nodes=3", "parallel=ddp", "--dry-run"]) == 2
    told = capsys.readouterr()
    assert "data.batch_tokens 4096 is not a multiple" in told.err and not told.out


@pytest.mark.parametrize(
    "flag",
    ["--top-k=-1", "--tokens=-1", "--temperature=nan", "--temperature=-1", "--seed=-1", "--prompt=",
     "--tokens=100000000000", "--device=tpu"],
)  # fmt: skip
def test_flags_of_generate_out_of_range_are_one_line(flag, capsys):
    assert generate.main(["nowhere", flag]) == 2
    told = capsys.readouterr().err
    assert told.startswith("geon: error: ") and len(told.splitlines()) == 1
    assert flag.split("=")[0].lstrip("-") in told
