"""Nothing that a candidate can see says what its next input will be, and nothing that it writes outlives a block."""

import hashlib
import inspect
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from assay.arms.caches import Caches, emptied
from assay.contract import seeds
from assay.experiment import calibration, series
from assay.gates import equivalence, provenance
from assay.judgement import freeze


def test_draws_have_labels_of_their_own() -> None:
    secret = seeds.secret()
    assert secret.bit_length() > 200 and secret != seeds.secret()
    many = [*islice(seeds.inputs(secret, 0), 50), *islice(seeds.inputs(secret, 1), 50)]
    assert len({*many}) == 100 and max(many) < 2**53 and all(int(float(one)) == one for one in many)
    assert seeds.hash_seed(secret, 0) < 2**32 and seeds.hash_seed(secret, 0) != seeds.hash_seed(secret, 1)
    assert seeds.order(secret, 0).random() != seeds.order(secret, 1).random()
    assert next(seeds.inputs(secret, 0)) == next(seeds.inputs(secret, 0))  # what was cut goes on with the same


def test_the_old_way_could_be_foreseen() -> None:
    """The control: hash seed and inputs from one generator with a seed of few bits. One is seen, the other follows."""
    import random

    def drawn(seed: int) -> tuple[int, int]:
        generator = random.Random(f"{seed}:0")
        return generator.randrange(2**32), generator.randrange(2**31)

    seen, wanted = drawn(4321)
    assert next(drawn(seed)[1] for seed in range(5000) if drawn(seed)[0] == seen) == wanted


@pytest.mark.parametrize("module", [series, calibration, equivalence, provenance, freeze])
def test_all_draws_from_the_secret_go_through_one_module(module: Any) -> None:
    """No generator of Python is seeded with it, and it is given to nobody as it is."""
    text = inspect.getsource(module)
    assert "Random(plan.seed" not in text and "Random(self.plan.seed" not in text and "make([plan.seed" not in text
    for line in text.splitlines():
        assert "plan.seed" not in line or "seeds." in line, line


def state(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_caches_are_what_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "candidate"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/a.so").write_text("compiled")
    (folder / "link").symlink_to("kernels")
    before = state(folder)
    caches = Caches({"candidate": folder}, "digest")
    caches.keep()
    inode = (folder / "kernels/a.so").stat().st_ino
    caches.restore()
    assert (folder / "kernels/a.so").stat().st_ino == inode  # nothing was written, so nothing is copied
    written = (folder / "kernels/a.so").stat()
    (folder / "kernels/a.so").write_text("answers!")  # as long as before, and its time set back
    os.utime(folder / "kernels/a.so", ns=(written.st_atime_ns, written.st_mtime_ns))
    (folder / "new/deep").mkdir(parents=True)
    (folder / "new/deep/answers").write_text("1")
    (folder / "new/deep").chmod(0)
    os.mkfifo(folder / "pipe")
    (folder / "link").unlink()
    caches.restore()
    assert state(folder) == before and not (folder / "pipe").exists()
    (folder / "more").write_text("1")
    again = Caches({"candidate": folder}, "digest")  # of a series that was cut
    assert state(folder) == before
    (folder / "more").write_text("1")
    again.keep()
    again.restore()
    assert "more" in state(folder)


def test_a_folder_is_emptied_and_stays(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    (tmp_path / digest).mkdir()
    inode = tmp_path.stat().st_ino
    emptied(tmp_path)
    assert not list(tmp_path.iterdir()) and tmp_path.stat().st_ino == inode
