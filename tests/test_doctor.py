import shutil

import pytest

import recorded
import small


def test_a_machine_and_a_config_that_fit():
    done = small.main("doctor", "--config=configs/digits.py")
    assert done.returncode == 0 and "8 devices" in done.stdout and "1,797 images" in done.stdout, done.stderr
    assert "25 of 254 negatives clipped" in done.stdout


def test_a_batch_that_does_not_fit():
    done = small.main("doctor", "--config=configs/digits.py", "--config.data.batch_size=129")
    small.assert_refused(done, "use 128 or 136")


def test_a_workdir_with_another_config(run, images):
    flags = small.flags("data.image_size=8", "data.batch_size=32", "eval.k=0", "eval.score=l2")
    done = small.main("doctor", f"--config=configs/folder.py:{images}", f"--workdir={run}", *flags)
    small.assert_refused(
        done, "which train refuses without --allow_changes: quantizer.num_codewords: 8 stored, 4 given"
    )


@pytest.mark.whole
def test_it_accepts_what_train_accepts(tmp_path):
    """A run whose weights were deleted can be resumed, and doctor says so."""
    folder = recorded.write(recorded.families()["timm ViT"], tmp_path / "weights")
    plain = [f for f in small.SMALL if not f.startswith("model.")]
    flags = [f"--config.{f}" for f in (*plain, "data.image_size=8", "train.total_steps=1", "eval.every_steps=0")]
    arguments = (
        "--config=configs/digits.py",
        f"--config.model.weights={folder}",
        f"--workdir={tmp_path / 'run'}",
        *flags,
    )
    assert small.main("train", *arguments).returncode == 0
    shutil.rmtree(folder)
    done = small.main("doctor", *arguments)
    assert done.returncode == 0 and "it holds a run of this config, which train resumes" in done.stdout, done.stderr
    assert small.main("train", *arguments).returncode == 0


def test_a_cache_that_cannot_be_written_is_a_finding(images, tmp_path):
    (tmp_path / "cache").write_text("a file")
    flags = f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.batch_size=32"
    done = small.main("doctor", f"--config=configs/folder.py:{images}", *flags)
    assert done.returncode and "8 devices" in done.stdout and str(tmp_path / "cache") in done.stderr, done.stderr


def test_classes_and_the_first_skipped_files(images):
    done = small.main("doctor", f"--config=configs/folder.py:{images}", "--config.data.batch_size=32")
    assert "10 classes: class 0 12, class 1 13, class 2 13" in done.stdout, done.stdout + done.stderr
    assert "skipped: class 1/empty.png: the file is empty" in done.stdout
    assert done.stdout.count("skipped: ") == 5
