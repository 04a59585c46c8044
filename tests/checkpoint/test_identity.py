"""Checkpoints that are not what their folder says: passed over or refused by name, and nothing is lost meanwhile."""

import json
import os
import shutil
import tempfile

import pytest

from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore
from polargrad_dist.trainer.checkpoint.__main__ import main
from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from tests.checkpoint.toy import state
from tests.gloo import run_ranks
from tests.trainer.toy import settings, trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
IDENTITY = {"model": {"width": 8}}


def store_of(folder, run="a", **config) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**config), identity=IDENTITY, run=run)


def saved(folder, steps, run="a", **config) -> CheckpointStore:
    store = store_of(folder, run, **config)
    for step in steps:
        store.save(step, state(step), objects={"step": step})
    store.wait()
    return store


def test_a_renamed_checkpoint_is_passed_over_and_refused_by_name(tmp_path, caplog, capsys):
    saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    store = store_of(tmp_path)
    assert store.resume_point().name == "step-00000001"
    assert "step-00000009: its manifest is of step 2: it was renamed or copied over another" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-00000009 was not loaded: its manifest is of step 2"):
        store.load(tmp_path / "step-00000009", {})
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        store_of(tmp_path, resume=str(tmp_path / "step-00000009")).resume_point()
    assert main(["verify", str(tmp_path)]) == 1
    assert "step-00000009: its manifest is of step 2" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_passed_over_and_never_pushes_out_good_ones(tmp_path, caplog):
    saved(tmp_path / "a", [1, 2])
    saved(tmp_path / "b", [50], run="b")
    shutil.copytree(tmp_path / "b" / "step-00000050", tmp_path / "a" / "step-00000050")
    store = store_of(tmp_path / "a", keep_last=2)
    assert store.resume_point().name == "step-00000002"
    assert "step-00000050: it is of run b, not of a, which the file run_id names" in caplog.text
    store.load(tmp_path / "a" / "step-00000002", {})
    store.save(3, state(3))
    store.wait()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["aside-step-00000050", "step-00000002", "step-00000003"]
    shutil.rmtree(tmp_path / "a" / "step-00000002")
    shutil.rmtree(tmp_path / "a" / "step-00000003")
    (tmp_path / "a" / "aside-step-00000050").rename(tmp_path / "a" / "step-00000050")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid: step-00000050: it is of run b"):
        store_of(tmp_path / "a").resume_point()


def test_a_foreign_checkpoint_that_is_asked_for_by_path_is_taken(tmp_path):
    saved(tmp_path / "a", [5])
    store = store_of(tmp_path / "b", run="b", resume=str(tmp_path / "a" / "step-00000005"))
    assert store.load(store.resume_point(), {}).step == 5


def test_tools_pass_over_a_checkpoint_that_was_renamed_or_is_of_another_run(tmp_path):
    for name in "ab":
        saved(tmp_path / name / "checkpoints", [1, 2] if name == "a" else [50], run=name)
        (tmp_path / name / "run_id").write_text(name)
        (tmp_path / name / "config.yaml").write_text("{}")
    folder = tmp_path / "a" / "checkpoints"
    shutil.copytree(tmp_path / "b" / "checkpoints" / "step-00000050", folder / "step-00000050")
    assert find_checkpoint(tmp_path / "a").folder.name == "step-00000002"
    (folder / "step-00000002").rename(folder / "step-00000009")
    assert find_checkpoint(tmp_path / "a").folder.name == "step-00000001"
    with pytest.raises(CheckpointError, match="it is of run b, not of a, which the file run_id names"):
        find_checkpoint(tmp_path / "a", 50)
    assert find_checkpoint(folder / "step-00000050").step == 50, "one that is named is taken"


def test_links_and_stray_files_do_not_stop_a_start_or_a_save(tmp_path):
    folder, archive = tmp_path / "run", tmp_path / "archive"
    saved(folder, [1, 2])
    archive.mkdir()
    for step in (1, 2):
        name = f"step-{step:08}"
        (folder / name).rename(archive / name)
        (folder / name).symlink_to(archive / name)
    (folder / ".saving-step-00000003").write_text("a file")
    (folder / ".removing-step-00000000").symlink_to(archive)
    (folder / "step-00000003").symlink_to(tmp_path / "nowhere")
    (folder / "step-00000004").write_text("a file")
    (folder / "notes.txt").write_text("mine")
    store = store_of(folder, keep_last=2)
    path = store.resume_point()
    assert path.name == "step-00000002"
    store.load(path, {})
    for step in (3, 4, 5):
        assert store.save(step, state(step))
    assert store.wait()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "step-00000004",
        "step-00000005",
    ]
    assert len(list(archive.iterdir())) == 2, "what a link points at is not ours to delete"
    assert (folder / "notes.txt").read_text() == "mine"


def _start_beside_undeletable_leftovers(rank, world, folder):
    os.setuid(65534)
    store = store_of(folder)
    assert store.resume_point().name == "step-00000001"
    store.load(store.resume_point(), {})
    assert store.save(2, state(2))
    return store.newest_valid().name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what another user cannot delete")
def test_leftovers_that_cannot_be_deleted_do_not_stop_a_start_or_a_save():
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = f"{top}/checkpoints"
        saved(folder, [1])
        os.chmod(folder, 0o777)
        for name in (".saving-step-00000002", ".removing-step-00000000"):
            # root's, as an .nfs file is the server's
            os.makedirs(f"{folder}/{name}/open elsewhere")
        assert run_ranks(_start_beside_undeletable_leftovers, 1, folder) == ["step-00000002"]


def rows(run_dir) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


def test_metrics_and_checkpoints_stay_as_they_are_when_the_load_is_refused(tmp_path):
    trainer(settings(tmp_path)).fit()
    before, names = rows(tmp_path), sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    (tmp_path / "checkpoints" / "step-00000012" / "rank-00000.bin").unlink()
    other = trainer(settings(tmp_path, steps=16))
    other.store.identity["data"] = {"shards": "others"}
    with pytest.raises(CheckpointError, match="of another data"):
        other.fit()
    assert rows(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names


def test_a_foreign_checkpoint_in_a_run_directory_costs_it_no_metrics(tmp_path):
    trainer(settings(tmp_path / "a")).fit()
    trainer(settings(tmp_path / "b", steps=20)).fit()
    shutil.copytree(
        tmp_path / "b" / "checkpoints" / "step-00000020", tmp_path / "a" / "checkpoints" / "step-00000020"
    )
    before = rows(tmp_path / "a")
    assert trainer(settings(tmp_path / "a")).fit().exit_code == 0
    assert rows(tmp_path / "a") == before
    assert trainer(settings(tmp_path / "a", steps=14)).fit().step == 14
    steps = [row["step"] for row in map(json.loads, rows(tmp_path / "a").splitlines()) if "loss" in row]
    assert steps == list(range(1, 15))
