"""The keys of a recipe that say what is trained on what: model, data, and which part of the data, read how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sparsetrain.recipes.tasks import task_of

PARTS = ("eval_data", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_revision", "streaming")
"""Keys about files, tables and the hub, which rows that are generated have none of."""


class DataRecipe(BaseModel):
    """These keys, which every run has; `RunRecipe` adds how it is trained."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        str_min_length=1,
    )

    model: str
    """What is trained."""
    data: str
    """What it is trained on."""
    output: str
    """Folder for checkpoints, the trained model and the report. It must be empty or absent unless --resume."""
    task: str
    """What is learned."""
    eval_data: str | None = None
    """Held-out data of its own, as data is given; a share of data if not given."""
    dataset_config: str | None = None
    """Which part ("subset") of a data set of the hub."""
    dataset_train_split: str = "train"
    """Which split of a data set of the hub, of a saved one, or of a folder of pictures is trained on."""
    dataset_test_split: str | None = None
    """Which split is held out; a share of what is trained on if not given (a folder of pictures: its test/ or
    validation/, where it has one)."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a data set on the hub; its newest if not given."""
    streaming: bool = False
    """Read the data while it trains, for what is too large to hold: JSONL, CSV, Parquet, text files, a data set of the
    hub. The length is given by steps."""
    stream_rows: int = Field(1000, ge=2, le=2**31 - 1)
    """With streaming: rows (of text: documents) that are read ahead. The held-out part, and what a conversion or a
    choice looks at, is of the first so many; the order of the others is random within as many."""
    text_column: str = "text"
    """Column that holds the text, in JSONL, JSON and CSV data."""
    holdout: Literal["tokens", "documents"] = "tokens"
    """What the held-out part of text is a share of. tokens: a long document among short ones is cut in two, its end
    held out. documents: they stay whole."""

    @field_validator("data", "text_column")
    @classmethod
    def _named(cls, value: str, field: ValidationInfo) -> str:
        if not value.strip():
            raise ValueError(f"{field.field_name}={value!r} is blank. Give a name.")
        return value

    @property
    def parts_given(self) -> list[str]:
        """Which of `PARTS` are not as they are by themselves."""
        fields = type(self).model_fields
        return [key for key in PARTS if getattr(self, key) != fields[key].default]

    @model_validator(mode="after")
    def _reads_text(self) -> Self:
        if self.eval_data is not None and task_of(self.task).images:
            raise ValueError(
                f"eval_data is for data of text, and task={self.task} reads images. Put them into the folder test/ "
                "beside train/, or leave it out."
            )
        return self

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if not self.streaming:
            if self.stream_rows != type(self).model_fields["stream_rows"].default:
                raise ValueError(
                    f"stream_rows={self.stream_rows} is for streaming=true. Give that too, or leave it out."
                )
            return self
        task, epochs = task_of(self.task), getattr(self, "epochs", None)
        for refused, why in (
            (task.labelled or task.images, f"task={self.task} needs all rows at once, for its labels"),
            (epochs is not None, f"epochs={epochs} needs the number of rows. Give steps in its place"),
        ):
            if refused:
                raise ValueError(f"streaming: rows are read while it trains, and {why}. Leave one out.")
        return self
