"""Files that were harmed after they were written, and files that were written to harm."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import pickle
import random
import shutil

import pytest
import torch

from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore, verify
from tests.checkpoint.toy import assert_equal, saved_run, state, zeros_like
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FILES = ["manifest.json", "manifest.sha256", "rank-00000.bin", "rank-00001.bin"]


def save_two(rank, world, folder):
    store = CheckpointStore(folder)
    for step in (1, 2):
        store.save(step, state(step, rank, world), objects={"sample": step})


def resume(rank, world, folder):
    """What a restart gets: which checkpoint, and whether every value is that step's."""
    store = CheckpointStore(folder)
    path = store.newest_valid()
    got = zeros_like(state(0, rank, world))
    loaded = store.load(path, got)
    assert_equal(got, state(loaded.step, rank, world))
    return path.name


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    run_ranks(save_two, 2, str(folder))
    assert sorted(path.name for path in (folder / "step-00000002").iterdir()) == FILES
    return folder


@pytest.fixture
def copy(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def flip_a_bit(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "deleted", "lengthened", "one bit flipped"])
def test_a_harmed_file_is_named_and_the_previous_checkpoint_used(copy, name, harm, caplog):
    file = copy / "step-00000002" / name
    if harm == "truncated":
        cut_short(file)
    elif harm == "deleted":
        file.unlink()
    elif harm == "lengthened":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        flip_a_bit(file, random.Random(name).randrange(file.stat().st_size * 8))
    with pytest.raises(CheckpointError, match=name.replace("sha256", "(json|sha256)")):
        verify(copy / "step-00000002")
    assert CheckpointStore(copy).resume_point().name == "step-00000001"
    assert "step-00000002" in caplog.text
    assert resume(0, 1, copy) == "step-00000001"


def test_any_flipped_bit_is_found(copy):
    random_ = random.Random(0)
    for name in FILES:
        file = copy / "step-00000002" / name
        whole = file.read_bytes()
        for _ in range(40):
            flip_a_bit(file, random_.randrange(len(whole) * 8))
            with pytest.raises(CheckpointError):
                verify(copy / "step-00000002")
            file.write_bytes(whole)
    verify(copy / "step-00000002")


def test_the_damaged_tensor_is_named(copy):
    manifest = verify(copy / "step-00000002")
    piece = manifest.tensors["model/embed"].pieces[0]
    flip_a_bit(copy / "step-00000002" / piece.file, piece.start * 8 + 5)
    with pytest.raises(CheckpointError, match=f"{piece.file} is damaged at model/embed"):
        verify(copy / "step-00000002")


def test_loading_checks_what_it_reads_even_when_nobody_verified(copy):
    manifest = verify(copy / "step-00000002")
    piece = manifest.tensors["model/embed"].pieces[0]
    flip_a_bit(copy / "step-00000002" / piece.file, piece.start * 8 + 5)
    with pytest.raises(CheckpointError, match=r"was not loaded: rank-0000\d.bin is damaged at model/embed"):
        CheckpointStore(copy).load(copy / "step-00000002", {"model/embed": torch.zeros(37, 8)})


def test_all_ranks_agree_on_the_one_before(copy):
    flip_a_bit(copy / "step-00000002" / "rank-00001.bin", 1234)
    assert run_ranks(resume, 2, str(copy)) == ["step-00000001"] * 2
    assert run_ranks(resume, 3, str(copy)) == ["step-00000001"] * 3


def test_when_none_is_valid_the_run_stops_rather_than_start_afresh(copy):
    for step in (1, 2):
        cut_short(copy / f"step-0000000{step}" / "rank-00000.bin")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is valid: step-00000002: rank-00000.bin has"
    ):
        CheckpointStore(copy).resume_point()


def test_a_damaged_checkpoint_does_not_block_saving_its_step_again(copy):
    (copy / "step-00000002" / "rank-00000.bin").unlink()
    store = CheckpointStore(copy)
    assert store.resume_point().name == "step-00000001"
    assert not (copy / "aside-step-00000002").exists(), "nothing is moved before the older one is accepted"
    store.load(copy / "step-00000001", {})
    assert (copy / "aside-step-00000002").is_dir()
    store.save(2, state(2))
    verify(copy / "step-00000002")
    # Damaged while the run goes on, without a restart in between.
    (copy / "step-00000002" / "rank-00000.bin").unlink()
    other = CheckpointStore(copy)
    other.save(2, state(2))
    verify(copy / "step-00000002")
    assert (copy / "aside-step-00000002-2").is_dir()


# Files written to harm


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that creates a file when it is loaded; the test fails if it ever was."""
    file = tmp_path / "exploded"
    yield pickle.dumps(Bomb(file))
    assert not file.exists()
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists(), "the bomb works, so its silence above means something"


def sign(folder, manifest):
    (folder / "manifest.json").write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize("name", [*FILES, ".metadata", "__0_0.distcp"])
def test_a_pickle_in_place_of_any_file_is_never_run(copy, bomb, name):
    folder = copy / "step-00000002"
    if name == "manifest.json":
        sign(folder, bomb)
    else:
        (folder / name).write_bytes(bomb)
    if name in FILES:
        with pytest.raises(CheckpointError):
            CheckpointStore(copy).load(folder, zeros_like(state(2)))
    else:
        CheckpointStore(copy).load(folder, zeros_like(state(2)))
    CheckpointStore(copy).resume_point()


def test_a_tensor_of_pickle_bytes_with_right_checksums_is_only_bytes(tmp_path, bomb):
    data = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    CheckpointStore(tmp_path).save(1, {"a": data, "model/embed": data})
    got = torch.zeros_like(data)
    CheckpointStore(tmp_path).load(tmp_path / "step-00000001", {"a": got})
    assert bytes(got.numpy()) == bomb


def test_loading_never_calls_an_unpickler_or_runs_code(copy, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loading a checkpoint must not get here")

    for module, name in [
        (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"),
        (builtins, "eval"), (builtins, "exec"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    assert resume(0, 1, copy) == "step-00000002"


def harmful(body, change):
    piece = body["tensors"]["model/embed"]["pieces"][0]
    if change == "a path out of the folder":
        piece[0] = "../../secret"
    elif change == "an absolute path":
        piece[0] = "/etc/passwd"
    elif change == "a negative start":
        piece[1] = -1
    elif change == "a start that is no integer":
        piece[1] = 0.5
    elif change == "a piece larger than its tensor":
        body["tensors"]["model/embed"]["shape"] = [1, 8]
    elif change == "a tensor larger than its pieces":
        body["tensors"]["model/embed"]["shape"] = [10**15, 8]
    elif change == "an unknown dtype":
        body["tensors"]["model/embed"]["dtype"] = "__class__"
    elif change == "tensors that are a list":
        body["tensors"] = []
    elif change == "no step":
        del body["step"]
    elif change == "a step that is no number":
        body["step"] = [1]
    elif change == "an unknown field":
        body["run_me"] = "yes"
    elif change == "another format":
        body["format"] = 99
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "change",
    [
        "a path out of the folder", "an absolute path", "a negative start", "a start that is no integer",
        "a piece larger than its tensor", "a tensor larger than its pieces", "an unknown dtype",
        "tensors that are a list", "no step", "a step that is no number", "an unknown field",
        "another format",        "not an object", "too deep", "not UTF-8",
    ],
)  # fmt: skip
def test_a_rightly_signed_but_wrong_manifest_is_refused_in_words(copy, change):
    folder = copy / "step-00000002"
    special = {"not an object": b"[1, 2]", "too deep": b"[" * 100_000, "not UTF-8": b"\xff\xfe\xfa"}
    sign(folder, special.get(change) or harmful(json.loads((folder / "manifest.json").read_bytes()), change))
    with pytest.raises(CheckpointError, match="is not a checkpoint manifest"):
        verify(folder)
    assert CheckpointStore(copy, CheckpointConfig(resume="auto")).resume_point().name == "step-00000001"


def test_a_bit_flip_in_torchs_own_format_loads_silently(tmp_path):
    """Why there is a manifest: if this ever fails, torch has gained checksums."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.zeros(1000)}, checkpoint_id=tmp_path, no_dist=True)
    file = tmp_path / "__0_0.distcp"
    flip_a_bit(file, file.stat().st_size // 2 * 8)
    got = {"a": torch.zeros(1000)}
    dcp.load(got, checkpoint_id=tmp_path, no_dist=True)
    assert got["a"].count_nonzero() == 1


def test_saved_run_helper_saves_what_it_says(tmp_path):
    saved_run(tmp_path, [1])
    assert verify(tmp_path / "step-00000001").objects == {"sample": 10}
