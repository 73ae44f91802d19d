import json

import pytest

from geon.configs.help import page
from geon.configs.overrides import groups
from geon.errors import UsageError
from geon.launch import slurm, sweep
from geon.launch.compose import compose
from geon.scripts import check_jobs
from tests.launch.jobs import SMALLEST

OWN = {
    "optim/mine": "defaults: [muon]\nname: mine\nlr: 0.033\n",
    "model/mine": "defaults: [gpt]\nsoftcap: 7.0\n",
    "model/size/mine": "# @package model\nn_layer: 3\nn_head: 2\nd_model: 32\ncontext: 16\n",
    "data/mine": "defaults: [synthetic]\ntokens: 5432\n",
    "schedule/mine": "defaults: [linear]\nsteps: 77\n",
    "parallel/mine": "defaults: [ddp]\nlayout: ddp\n",
    "logger/mine": "every: 3\n",
    "checkpoint/mine": "every: 8\n",
    "cluster/mine": "defaults: [slurm]\nnodes: 3\n",
    "sweep/mine": "name: mine\ngrid: {seed: [5, 6]}\n",
    "experiment/mine": "# @package _global_\ndefaults: [{override /optim: mine}]\nname: trial\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in OWN.items():
        file = tmp_path / "my configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "my configs"


@pytest.mark.parametrize("form", ['["file://{}"]', '["{}"]', '"file://{}"'])
def test_an_option_of_ones_own_is_found_in_every_group(folder, form):
    told = [f"{name.rpartition('/')[0]}=mine" for name in OWN if not name.startswith("experiment")]
    config = compose([f"hydra.searchpath={form.format(folder)}", *told])
    assert (config.optim.lr, config.optim.name, config.model.softcap) == (0.033, "mine", 7.0)
    assert (config.model.n_layer, config.data.tokens, config.schedule.steps) == (3, 5432, 77)
    assert (config.logger.every, config.checkpoint.every) == (3, 8)
    assert (config.cluster.nodes, config.sweep.grid) == (3, {"seed": [5, 6]})
    assert compose(["experiment=mine"], "train", folder).optim.lr == 0.033


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("optim=mien", "'mien' is not an option of optim.*Did you mean 'mine'"),
        ("optim.lrr=1", "Did you mean 'optim.lr'"),
        ("hydra.searchpath=[pkg://os]", "no package is imported"),
        ("hydra.searchpath=[/no/such]", "'/no/such' is not a folder"),
        ("hydra.searchpath=['${oc.env:HOME}']", "looked up outside the config"),
        ("hydra.searchpath=[]", "is no folder|^$"),
        ("hydra.verbose=true", "Hydra's own settings"),
        ("hydra/sweeper=optuna", "no effect without -m"),
        ("hydra.sweeper.sampler._target_=os.system", "by name"),
    ],
)
def test_what_is_wrong_beside_a_folder_of_ones_own_is_told(folder, told, message):
    if told.endswith("=[]"):
        compose([told])  # names nothing, and does nothing
        return
    with pytest.raises(UsageError, match=message):
        compose([f'hydra.searchpath=["file://{folder}"]', told])


def test_a_file_that_ours_would_hide_is_refused(folder):
    (folder / "optim" / "muon.yaml").write_text("name: other\n")
    with pytest.raises(UsageError, match=r"muon.yaml' would not be read: configs/optim/muon.yaml"):
        compose([f'hydra.searchpath=["file://{folder}"]'])


def test_launchers_take_the_folder_and_pass_it_on(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = [f"--config-dir={folder}", *SMALLEST, "parallel=single", "optim=mine"]
    assert sweep.main([*told, "sweep=mine", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "run-seed=5" in out and "run-seed=6" in out
    assert json.dumps([f"file://{folder}"]) in out
    assert check_jobs.main(told) == 0
    ranks = ["parallel=ddp", "cluster=mine", "cluster.ranks_per_node=1", "data.batch_tokens=192"]
    assert slurm.main([*told, *ranks, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --nodes=3" in out and f"file://{folder}" in out


def test_the_help_has_every_key_group_and_description(folder):
    config = compose([], folder=folder)
    text = page(config, [], folder)
    for key in ("optim.hidden.lr", "data.batch_tokens", "logger.wandb_entity", "sweep.arms"):
        assert f"\n  {key} = " in text
    for group in groups():
        assert f"\n  {group} " in text
    assert " mine" in text and "Longest sequence, tokens." in text
    assert "One of train, plan, certify." in text  # a key of few words
    assert "Globs over names, with | between them" in text  # of optim.overrides.NAME
    assert max(map(len, text.splitlines())) <= 100
