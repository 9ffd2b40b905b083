import json

from tcq.workdir.journal import METRICS, Journal


def test_lines_of_later_steps_and_cut_lines_are_removed(tmp_path):
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 2, "validation/mAP": 0.5}, {"step": 3, "train/loss": 1.0}]
    (tmp_path / METRICS).write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tra')
    uploads = []
    journal = Journal(tmp_path, step=2, upload=lambda: uploads.append(1))
    assert journal.has(2, "validation") and not journal.has(2, "train") and not journal.has(3, "train")
    journal.write(3, {"train/loss": float("nan"), "train/accuracy": 0.25})
    journal.flush()
    journal.close()
    written = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert written == [*lines[:2], {"step": 3, "train/loss": None, "train/accuracy": 0.25}]
    assert uploads == [1] and list((tmp_path / "tensorboard").iterdir())


def test_other_processes_write_nothing(tmp_path):
    journal = Journal(tmp_path, step=0, writes=False)
    journal.write(1, {"train/loss": 1.0})
    journal.flush()
    journal.close()
    assert list(tmp_path.iterdir()) == []
