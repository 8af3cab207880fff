"""Downloads a data set and prepares it in the form the scripts read.

    pip install -e '.[prepare]'
    python -m experiments.prepare_data cifar10 --data-dir DIR

Needs TensorFlow and a network; reading what it leaves needs neither. A prepared data set is left as
it is.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.data.prepared import default_data_dir
from experiments.train.errors import MissingExtraError, UsageError
from experiments.train.reporter import reports_errors


@dataclasses.dataclass(frozen=True)
class Config:
    """What to prepare and where.

    Attributes:
        name: name of a data set of TensorFlow Datasets: mnist, cifar10, tiny_shakespeare, ...
        data_dir: folder of prepared data sets. None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """

    name: Annotated[str, tyro.conf.Positional]
    data_dir: Path | None = None


def prepare(config: Config) -> Path:
    """Prepares the data set as array_record files and returns its folder.

    Raises:
        MissingExtraError: TensorFlow is not installed.
        UsageError: TensorFlow Datasets has no data set of this name.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingExtraError(
            "preparing a data set needs TensorFlow; install it with\n"
            "    pip install -e '.[prepare]'"
        )
    import tensorflow_datasets as tfds

    # By this and not by the `tfds` command line, which imports Apache Beam as well.
    data_dir = config.data_dir or default_data_dir()
    try:
        builder = tfds.builder(config.name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        # Its message lists hundreds of names.
        raise UsageError(f"TensorFlow Datasets has no data set named {config.name}") from error
    builder.download_and_prepare()
    return Path(builder.data_dir)


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`."""
    config = tyro.cli(Config, description=__doc__, args=arguments)
    print(f"prepared in {prepare(config)}")


if __name__ == "__main__":
    sys.exit(main())
