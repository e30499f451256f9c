"""The example with batch normalization: what the workers saw of their model is what its export shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import resnet


@pytest.mark.timeout(300)
def test_the_exported_model_has_the_accuracy_that_the_workers_saw(tmp_path: Path) -> None:
    command = [sys.executable, resnet.__file__, "--directory", str(tmp_path / "resnet")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = {who: float(accuracy) for who, accuracy in re.findall(r"(.+): ([\d.]+)\n", ended.stdout)}
    exported, initial = found.pop("the exported model"), found.pop("the same with the statistics of the beginning")
    assert found.keys() == {f"{resnet.SITE}-{number}'s model at the end" for number in range(resnet.WORKERS)}
    assert exported > 0.6
    assert all(abs(accuracy - exported) < 0.03 for accuracy in found.values())
    assert initial < exported - 0.3


def test_no_image_that_is_validated_on_is_trained_on() -> None:
    trained, kept = resnet.Gratings(resnet.VALIDATION, 8 * resnet.VALIDATION), resnet.Gratings(0, resnet.VALIDATION)
    assert len(kept) == resnet.VALIDATION == trained.first
    image, label = trained[0]
    assert image.shape == (1, resnet.IMAGE, resnet.IMAGE) and label == resnet.VALIDATION % resnet.CLASSES
    assert not (image == kept[0][0]).all()
    assert (image == trained[0][0]).all()
