"""Read clips from datasets of the datasets library: in memory, on disk, or on the Hub."""

from pathlib import Path
from typing import Any

from ...extras import require
from .base import Item, Source, check_column, row_id


class HFDatasetSource(Source):
    """A `datasets.Dataset`, read without decoding its audio. A locator is the index of a row."""

    def __init__(self, dataset: Any, column: str, **selection: str | None):
        if not isinstance(dataset, require("datasets", "bulk").Dataset):
            raise ValueError(
                f"Got a {type(dataset).__name__} as the source, expected a path or a datasets.Dataset. Pass one split "
                "of a dictionary. For a stream, call tokenize_dataset."
            )
        check_column(dataset.column_names, column, "the dataset")
        ids = [row_id(id, "the dataset") for id in dataset["id"]] if "id" in dataset.column_names else None
        self.items = [Item(f"{row:09d}" if ids is None else ids[row], row) for row in range(len(dataset))]
        self.column, self.dataset = column, dataset.with_format("arrow")
        self.selection = {"column": column, **selection}
        extra_features = {name: feature for name, feature in dataset.features.items() if name not in (column, "id")}
        self.schema = type(dataset.features)(extra_features).arrow_schema

    def read(self, locator: int) -> Any:
        return self.dataset.select_columns([self.column])[locator].to_pylist()[0][self.column]

    def extra_columns(self, locator: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        return self.dataset.select_columns(self.schema.names)[locator].to_pylist()[0]


def open_disk(path: Path, column: str, split: str | None) -> HFDatasetSource:
    """Open a folder that `save_to_disk` wrote. Raises ValueError if it is damaged or has no such split."""
    datasets = require("datasets", "bulk")
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Cannot read {path} as a dataset on disk: {' '.join(str(error).split())[:300]}") from error
    if isinstance(dataset, datasets.DatasetDict):
        split = split or "train"
        if split not in dataset:
            raise ValueError(
                f"The dataset {path} has the splits {', '.join(dataset)}, but no {split!r}. Name one of them."
            )
        return HFDatasetSource(dataset[split], column, split=split)
    return HFDatasetSource(dataset, column)


def open_hub(name: str, column: str, config: str | None, split: str, revision: str | None) -> HFDatasetSource:
    """Open a dataset on the Hub. Raises ValueError if it cannot be loaded."""
    datasets = require("datasets", "bulk")
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"There is no file or folder {name}, and it cannot be loaded as a dataset of the Hub either: {error}"
        ) from error
    return HFDatasetSource(dataset, column, config=config, split=split, revision=revision)
