"""Who a run is, what it goes on from, and what its files say of it."""

import json

import pytest
import torch
import yaml

from geon.engine import checkpoint, history, runfolder
from geon.errors import UsageError
from geon.launch.env import Env
from tests.reliability.identity_job import report, rows, steps, train, train_until, weights


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 steps, nothing in between."""
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.row("R17")
def test_a_finished_run_says_so_and_nothing_is_written(whole, capsys):
    before = content(whole)
    train(whole.parent, "checkpoint.keep=5", "eval.every=3")
    assert "is finished at step 8: nothing was trained" in capsys.readouterr().out
    assert content(whole) == before
    for change in ("optim.lr=0.3", "seed=2", "data.tokens=5000", "data.batch_tokens=256"):
        with pytest.raises(UsageError, match=f"{change.split('=')[0]} is .* here"):
            train(whole.parent, change, "checkpoint.allow_change=['*']")
    assert content(whole) == before


def test_another_experiment_of_the_same_name_is_refused_with_both_values(whole):
    more = ["optim.lr=0.3", "optim.hidden.momentum=0.5", "schedule.steps=12"]
    with pytest.raises(UsageError) as told:
        train(whole.parent, *more)
    assert "optim.lr is 0.02 in " in str(told.value) and " and 0.3 here" in str(told.value)
    assert "optim.hidden.momentum is 0.95 in " in str(told.value)
    assert "checkpoint.allow_change=[optim.lr,optim.hidden.momentum]" in str(told.value)


@pytest.mark.row("R01")
def test_kill_and_resume_is_one_run_in_two_segments(whole, tmp_path, monkeypatch):
    train_until(monkeypatch, 5, tmp_path)
    folder = tmp_path / "run"
    first = json.loads((folder / "run.json").read_text())["run"]
    assert train(tmp_path) == folder
    assert same(weights(folder), weights(whole))
    told = report(folder)
    assert (told["run"], told["settings_changed"]) == (first, [])
    assert [(s["segment"], s["first"], s["last"]) for s in told["segments"]] == [
        (1, 0, 4),
        (2, 4, 8),
    ]
    facts = checkpoint.read_commit(checkpoint.find(folder))
    assert (facts["run"], facts["segment"], facts["tokens"]) == (first, 2, 8 * 128)
    assert facts["settings"]["optim"]["lr"] == 0.02
    past = history.read(folder)
    assert past.segments[0].end is None and past.segments[1].end["last"] == 8
    assert past.segments[1].origin["step"] == 4
    assert past.segments[0].row["settings"]["seed"] == 0
    assert not (folder / "lock.json").exists()


def test_going_on_longer_is_said_with_the_jump_of_the_rate(tmp_path, capsys):
    folder = train(tmp_path, "schedule.steps=4")
    train(tmp_path, "schedule.steps=8")
    out = capsys.readouterr().out
    assert "resume: schedule.steps 4 -> 8" in out
    # linear with decay 0.5: at the end of 4 the rate is 0, half way through 8 it is at its peak
    assert "at step 4 the rate goes from 0 to 1 of its peak" in out
    assert report(folder)["steps"] == 8
    assert report(folder)["settings_changed"] == ["schedule.steps"]
    assert json.loads((folder / "report-0000004.json").read_text())["steps"] == 4


def test_a_row_says_over_how_many_steps_its_loss_is_a_mean(whole, tmp_path, monkeypatch):
    train_until(monkeypatch, 4, tmp_path, "checkpoint.every=3")
    folder = train(tmp_path, "checkpoint.every=3", "logger.every=1", "schedule.steps=4")
    last = rows(folder, "train")[-1]["loss"]
    train_until(monkeypatch, 4, tmp_path, "checkpoint.every=3", "name=two")
    folder = train(tmp_path, "checkpoint.every=3", "schedule.steps=4", "name=two")
    assert [row["loss_steps"] for row in rows(folder, "train")] == [2, 1]
    assert rows(folder, "train")[-1]["loss"] == last
    assert [row["loss_steps"] for row in rows(whole, "train")] == [2, 2, 2, 2]


def test_config_yaml_is_of_the_segment_that_trained(tmp_path, monkeypatch):
    folder = train(tmp_path, "schedule.steps=4")
    allow = ["optim.lr=0.3", "checkpoint.allow_change=[optim]"]
    train_until(monkeypatch, 4, tmp_path, "schedule.steps=8", *allow)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.02
    assert report(folder)["steps"] == 4
    train(tmp_path, "schedule.steps=8", *allow)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.3
    told = report(folder)
    assert told["settings_changed"] == ["optim.hidden.lr", "optim.lr", "schedule.steps"]
    assert told["segments"][-1]["changed"]["optim.lr"] == [0.02, 0.3]
    train(tmp_path, "schedule.steps=10", "optim.lr=0.3")  # that is what it is trained with now


@pytest.mark.row("R12")
def test_going_back_sets_later_checkpoints_aside_and_keeps_what_it_writes(
    tmp_path, monkeypatch, capsys
):
    folder = train(tmp_path)
    root = folder / "checkpoints"
    back = f"checkpoint.resume={root / 'step-0000002'}"
    other = ["optim.lr=0.3", "checkpoint.allow_change=[optim.lr]", "checkpoint.keep=2"]
    train_until(monkeypatch, 5, tmp_path, back, *other)
    assert steps(root) == [2, 4]
    assert (root / "latest").read_text() == "step-0000004"
    assert steps(root / "branch-1") == [4, 6, 8]
    assert [r["step"] for r in rows(root / "branch-1", "train")] == [4, 6, 8]
    assert f"moved 3 later checkpoints to {root / 'branch-1'}" in capsys.readouterr().out
    train(tmp_path, *other)
    assert "step-0000004 at step 4" in capsys.readouterr().out
    assert steps(root) == [6, 8]
    told = report(folder)
    assert [(s["segment"], s["first"], s["last"]) for s in told["segments"]] == [
        (1, 0, 2),
        (2, 2, 4),
        (3, 4, 8),
    ]
    assert [r["step"] for r in rows(folder, "train")] == [2, 4, 6, 8]
    with pytest.raises(UsageError, match="was gone back behind in this run"):
        train(tmp_path, f"checkpoint.resume={root / 'branch-1' / 'step-0000006'}")


def test_a_branch_that_was_not_yet_set_aside_is_not_gone_on_with(tmp_path, monkeypatch):
    folder = train(tmp_path)
    past = history.read(folder)
    facts = {"run": past.run, "segment": 1, "step": 4}
    row = {**past.segments[0].row, "segment": 2, "first": 4}
    history.append(folder, {**row, "resumed": {"path": "x", **facts}})
    train_until(monkeypatch, 5, tmp_path, "schedule.steps=9")
    assert steps(folder / "checkpoints") == [2, 4]
    assert steps(folder / "checkpoints" / "branch-1") == [6, 8]


def test_checkpoints_that_the_history_does_not_know_are_no_fresh_start(tmp_path):
    folder = train(tmp_path, "schedule.steps=4")
    rows_of = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(rows_of.replace('"segment": 1', '"segment": 7'))
    with pytest.raises(UsageError, match="none from which history.jsonl says"):
        train(tmp_path, "schedule.steps=6")
    (folder / "history.jsonl").unlink()
    train(tmp_path, "schedule.steps=6")
    assert report(folder)["segments"][-1]["first"] == 4


def test_a_new_start_is_another_run(tmp_path):
    first = report(train(tmp_path, "schedule.steps=2"))["run"]
    folder = train(tmp_path, "schedule.steps=2", "checkpoint.resume=never", "optim=adamw")
    assert report(folder)["run"] != first
    assert report(tmp_path / "run~1")["run"] == first
    assert not list(tmp_path.rglob("lock.json"))


JOB = Env(job="job 7", restart=1)


@pytest.mark.row("R05")
def test_restarts_go_on_from_what_the_job_did_or_was_told(tmp_path, monkeypatch, capsys):
    """Of a job that starts from another run's weights, and is restarted before and after its first
    checkpoint; and of one that starts anew beside an older run of the name."""
    base = train(tmp_path / "base", "schedule.steps=4")
    capsys.readouterr()
    first = Env(job="job 7")
    told = [f"checkpoint.resume={base}", "schedule.steps=10"]
    train_until(monkeypatch, 5, tmp_path, *told, env=first)
    train_until(monkeypatch, 7, tmp_path, *told, env=JOB)
    assert f"resuming from {base.resolve()}/checkpoints/step-0000004" in capsys.readouterr().out
    folder = train(tmp_path, *told, env=JOB)
    assert "run/checkpoints/step-0000006 at step 6" in capsys.readouterr().out
    assert [s["first"] for s in report(folder)["segments"]] == [4, 6]
    never = ["checkpoint.resume=never", "seed=5"]
    new = Env(job="job 8")
    train_until(monkeypatch, 1, tmp_path, *never, env=new)
    assert (tmp_path / "run~1").is_dir()
    again = Env(job="job 8", restart=1)
    train_until(monkeypatch, 3, tmp_path, *never, env=again)
    train(tmp_path, *never, env=again)
    assert not (tmp_path / "run~2").exists()
    assert "step-0000002 at step 2" in capsys.readouterr().out
    assert [s["first"] for s in report(folder)["segments"]] == [0, 2]


@pytest.mark.row("R05")
def test_the_same_command_once_more_goes_on_with_a_run_that_began_elsewhere(
    tmp_path, monkeypatch, capsys
):
    base = train(tmp_path / "base", "schedule.steps=4")
    told = [f"checkpoint.resume={base}", "schedule.steps=10"]
    train_until(monkeypatch, 5, tmp_path, *told)  # dies before it has saved
    train_until(monkeypatch, 7, tmp_path, *told)
    capsys.readouterr()
    folder = train(tmp_path, *told)
    assert "run/checkpoints/step-0000006 at step 6" in capsys.readouterr().out
    assert not (tmp_path / "run~1").exists()
    assert [s["first"] for s in report(folder)["segments"]] == [4, 6]
    before = content(folder)
    train(tmp_path, *told)
    assert "is finished at step 10" in capsys.readouterr().out and content(folder) == before
    with pytest.raises(UsageError, match=r"optim.lr is 0.02 in .* and 0.5 here"):
        train(tmp_path, *told, "optim.lr=0.5")
    other = train(tmp_path / "base", "schedule.steps=3", "name=other")
    train(tmp_path, f"checkpoint.resume={other}", "schedule.steps=6")  # another origin: anew
    assert (tmp_path / "run~1").is_dir()
    assert [s["first"] for s in report(folder)["segments"]] == [3]


def test_a_job_that_fails_to_evaluate_has_saved_and_only_evaluates_when_it_is_run_again(
    whole, tmp_path, monkeypatch, capsys
):
    from geon.engine import callbacks
    from geon.engine.trainer import Trainer

    def fail(*args):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "evaluate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            train(tmp_path)
    folder = tmp_path / "run"
    assert history.read(folder).segments[0].end["reason"] == "RuntimeError: no memory"
    assert steps(folder / "checkpoints")[-1] == 8 and not (folder / "report.json").exists()
    monkeypatch.setattr(Trainer, "train_step", fail)
    train(tmp_path)
    assert report(folder)["val_nats_per_token"] == report(whole)["val_nats_per_token"]


def test_tokens_are_counted_and_none_is_read_twice_when_the_batch_changes(tmp_path, monkeypatch):
    from geon.data import Batches

    first = []
    windows_at = Batches.windows_at

    def noted(self, step):
        first.append((self.first(step), self.sequences))
        return windows_at(self, step)

    monkeypatch.setattr(Batches, "windows_at", noted)
    train(tmp_path, "schedule.steps=4")
    more = ["data.batch_tokens=256", "checkpoint.allow_change=[data.batch_tokens]"]
    folder = train(tmp_path, "schedule.steps=7", *more)
    assert report(folder)["tokens"] == 4 * 128 + 3 * 256
    at = 0
    for start, count in first:
        assert start == at
        at += count
    assert at == report(folder)["tokens"] // 16


def test_other_data_under_the_same_path_are_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one fish, two fish. " * 400)
    told = ["data=text", "data.vocab_size=256", "data.tokens=0", "schedule.steps=2"]
    train(tmp_path, *told, f"data.path={text}")
    text.write_text("red fish, blue fish. " * 400)
    told[-1] = "schedule.steps=4"
    with pytest.raises(UsageError, match="data.sha256 is .* in .* and .* here"):
        train(tmp_path, *told, f"data.path={text}")
    other = tmp_path / "b.txt"
    other.write_text("one fish, two fish. " * 400)
    train(tmp_path, *told, f"data.path={other}")  # the same text: it has moved


def test_the_tokenizer_of_the_checkpoint_is_used_and_never_trained_again(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from geon.data import bpe

    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(900)))
    told = [
        *("data=text", f"data.path={text}", "data.bpe_vocab=280", "data.vocab_size=280"),
        *("data.tokens=0", "data.val_tokens=64"),
    ]
    train(tmp_path, *told, "schedule.steps=2")
    monkeypatch.setattr(bpe, "train_bpe", None)
    folder = train(tmp_path, *told, "schedule.steps=4")
    text.write_text("".join(f"{i} cubed is {i**3}.\n" for i in range(900)))
    train(tmp_path, *told, "schedule.steps=6", "checkpoint.allow_change=[data.sha256]")
    codecs = {
        checkpoint.read_commit(path)["codec"]
        for path in checkpoint.committed(folder / "checkpoints")
    }
    assert len(codecs) == 1


def test_another_manifold_is_refused_with_its_residual_or_projected_when_asked(tmp_path, capsys):
    plain = ["optim.hidden.weight_decay=0", "optim.hidden.second_moment=0"]
    train(tmp_path, *plain, "schedule.steps=4")
    onto = ["optim=manifold_muon", "schedule.steps=8"]
    with pytest.raises(UsageError, match="optim.name is muon"):
        train(tmp_path, *onto, "checkpoint.allow_change=[optim.lr]")
    onto.append("checkpoint.allow_change=[optim]")
    with pytest.raises(UsageError, match="residual is .*checkpoint.project=true"):
        train(tmp_path, *onto)
    folder = train(tmp_path, *onto, "checkpoint.project=true", "logger.spectrum_every=4")
    assert rows(folder, "spectrum")[-1]["manifold_residual"] < 1e-5
    capsys.readouterr()
    train(tmp_path, onto[0], "schedule.steps=10", "checkpoint.project=true", onto[-1])
    assert "the rules are the checkpoint's, nothing is moved" in capsys.readouterr().out


def test_state_of_another_rule_is_refused_by_the_name_of_a_tensor(tmp_path):
    train(tmp_path, "optim=normuon", "schedule.steps=2")
    with pytest.raises(UsageError, match=r"holds 'optim\..*' of shape \(.*\), expected \(.*\)"):
        train(
            tmp_path,
            *("optim=normuon", "optim.hidden.per_head=true", "schedule.steps=4"),
            "checkpoint.allow_change=[optim]",
        )
    with pytest.raises(UsageError, match="lacks 'optim"):
        train(tmp_path, "optim=adamw", "schedule.steps=4", "checkpoint.allow_change=[optim]")


def test_a_cut_line_of_the_log_is_left_out_and_said(tmp_path, capsys):
    folder = train(tmp_path, "schedule.steps=4")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"event": "st')
    train(tmp_path, "schedule.steps=6")
    assert "metrics.jsonl: line 5 is cut or damaged" in capsys.readouterr().err
    assert [r["step"] for r in rows(folder, "train")] == [2, 4, 6]
    assert [s.number for s in history.read(folder).segments] == [1, 2]


def test_checkpoints_without_settings_are_compared_with_what_there_is(tmp_path, capsys):
    folder = train(tmp_path, "schedule.steps=4")
    for path in checkpoint.committed(folder / "checkpoints"):
        facts = json.loads((path / "commit.json").read_text())
        for key in ("settings", "run", "segment", "files", "sha256", "serial"):
            del facts[key]
        facts["format"] = 1
        (path / "commit.json").write_text(json.dumps(facts))
    (folder / "run.json").unlink()
    (folder / "history.jsonl").unlink()
    with pytest.raises(UsageError, match="optim.lr is 0.02"):
        train(tmp_path, "schedule.steps=6", "optim.lr=0.5")
    train(tmp_path / "b", f"checkpoint.resume={folder}", "schedule.steps=6")
    assert "holds no settings: compared with those of" in capsys.readouterr().out
    (folder / "config.yaml").unlink()
    with pytest.raises(UsageError, match="seed is 0"):
        train(tmp_path, "schedule.steps=6", "seed=3")
    train(tmp_path, "schedule.steps=6")
    assert "only model, optim.name, seed and data were compared" in capsys.readouterr().out
    assert history.read(folder).segments[0].first == 4


def test_entries_without_effect_are_told(tmp_path, capsys):
    train(tmp_path, "schedule.steps=2")
    train(tmp_path, "schedule.steps=4", "checkpoint.allow_change=[model]")
    assert "allow_change: nothing of 'model' has changed" in capsys.readouterr().out
    with pytest.raises(UsageError, match="'modell' is no key"):
        train(tmp_path, "schedule.steps=6", "checkpoint.allow_change=[modell]")


def test_reports_of_the_same_step_are_all_kept(tmp_path):
    """Two branches may end at one step: neither's report replaces the other's."""
    for text in ("first", "second", "third"):
        (tmp_path / "report.json").write_text(json.dumps({"steps": 40, "name": text}))
        runfolder.report_aside(tmp_path)
    kept = sorted(json.loads(p.read_text())["name"] for p in tmp_path.glob("report-0000040*.json"))
    assert kept == ["first", "second", "third"]
    assert not (tmp_path / "report.json").exists()
