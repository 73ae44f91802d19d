"""Races: on curves whose answers are known."""

import json

import pytest

from geon.scripts import race


def run(root, name, losses, sha="a", seconds=2.0):
    """A run of 100 tokens a step, evaluated every 10 steps."""
    folder = root / name
    folder.mkdir()
    rows = [{"kind": "start", "step": 0, "data": {"sha256": sha}}]
    for i, loss in enumerate(losses, 1):
        at = {"step": 10 * i, "tokens": 1000 * i, "elapsed": seconds * i}
        rows.append({"kind": "eval", **at, "val_nats_per_token": loss, "val_tokens": 64})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_race_tells_the_first_point_at_the_target(tmp_path, capsys):
    slow = run(tmp_path, "adamw", [5.0, 4.0, 3.5])
    fast = run(tmp_path, "muon", [4.5, 3.5, 3.2], seconds=3.0)
    never = run(tmp_path, "none", [6.0, 5.0])
    told = [slow, fast, never, "--target-of", "adamw", "--out", str(tmp_path), "--name", "it"]
    assert race.main(told) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| muon (at step 30) | 3.2000 | 20 | 2,000 | 6.0 |"
    assert lines[3] == "| adamw (at step 30) | 3.5000 | 30 | 3,000 | 6.0 |"
    assert lines[4] == "| none (at step 20) | 5.0000 | not reached |  |  |"
    found = json.loads((tmp_path / "it.json").read_text())
    assert found["target"] == 3.5 and found["runs"]["none"]["reached"] is None
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_curves_pass_through_their_waypoints(tmp_path, capsys):
    """The four of each that the track's logs were read for, to three digits."""
    curves = race.published("track3")
    wanted = {
        "record 36 Muon": {125: 4.586, 500: 3.828, 1000: 3.652, 3250: 3.277},
        "record 37 MuonH": {125: 4.815, 500: 3.889, 1000: 3.679, 3250: 3.278},
    }
    assert set(curves) == set(wanted)
    for name, points in wanted.items():
        found = {p["step"]: p for p in curves[name]["points"]}
        assert {s: found[s]["val_loss"] for s in points} == pytest.approx(points, abs=5.1e-4)
        assert found[1000]["tokens"] == 524_288_000
        assert "modded-nanogpt" in curves[name]["source"]
    ours = run(tmp_path, "ours", [4.0, 3.0])
    assert race.main([ours, "--target", "3.28", "--published", "track3"]) == 0
    text = capsys.readouterr().out
    assert "| record 36 Muon | 3.2772 | 3,200 | 1,677,721,600 |  |" in text
    assert "| ours (at step 20) | 3.0000 | 20 |" in text


def test_losses_of_other_tokens_are_not_raced(tmp_path, capsys):
    one, other = run(tmp_path, "a", [1.0]), run(tmp_path, "b", [1.0], sha="b")
    assert race.main([one, other, "--target", "1"]) == 2
    assert "data of another sha256 (a and b)" in capsys.readouterr().err
    assert race.main([one, "--target-of", "A"]) == 2
    assert race.main([one, "--target", "1", "--published", "track4"]) == 2
    assert "Did you mean 'track3'" in capsys.readouterr().err
    assert race.main([str(tmp_path), "--target", "1"]) == 2
    assert "has no evaluations" in capsys.readouterr().err
