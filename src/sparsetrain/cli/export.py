"""`sparsetrain export`: a trained run as a folder of full weights, or as a clean adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.flags import Debug, Json

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's --output, or a saved model's or adapter's folder.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to write; must be absent or empty.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="sparse|dense|24|pruned",
        help="sparse: dense weights beside sparsity_config.json; sparsetrain runs them sparse, anything else dense. "
        "dense: no sidecar; refused where the dense model would give other outputs. "
        "24, pruned: a model trained 2:4 or pruned, with its zeros written into the weights.",
    ),
]
MergeLora = Annotated[
    bool, typer.Option("--merge-lora/--keep-lora", help="Fold LoRA into the weights, or write the adapter as it is.")
]

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it before.")
]


def export(
    run: Run,
    output: Output,
    format: Format = "sparse",
    merge_lora: MergeLora = True,
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Write a trained model for use elsewhere.

    By default full weights in the dense layout, which `from_pretrained` loads, with LoRA merged in. A run is
    measured as it is deployed, which is dense; one of --deploy sparse was measured sparse, so measure what is exported
    (`sparsetrain eval`) before running it dense.

    \b
    Examples:
      sparsetrain export runs/finetune --output my-model
      sparsetrain export runs/finetune --output my-adapter --keep-lora
      sparsetrain export runs/dense --output my-model --format dense
      sparsetrain export runs/two-four --output my-model --format 24
    """
    from sparsetrain.hf.model.io import export as write
    from sparsetrain.hf.model.io import load, save, sidecar_of
    from sparsetrain.runs.claim import replacing
    from sparsetrain.runs.sidecar import WRITTEN

    with replacing(output):
        if merge_lora:
            write(run, output, format=format, trust_remote_code=trust_remote_code)
        else:
            loaded = load(run, trust_remote_code=trust_remote_code)
            if not hasattr(loaded.model, "peft_config") or format != "sparse":
                asked = f"--format {format}" if format != "sparse" else run
                raise ValueError(
                    f"--keep-lora writes a run's adapter as it is; {asked} has none to keep. Leave --keep-lora out."
                )
            about = {key: value for key, value in loaded.about.items() if key not in WRITTEN}
            about.setdefault("base_model", loaded.model.peft_config["default"].base_model_name_or_path)
            save(loaded.model, loaded.handle, output, tokenizer=loaded.tokenizer, **about)
    files = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
    shown = [f"  {name}  {size / 1e6:,.2f} MB" for name, size in files.items()]
    if merge_lora and (held := [bits for bits in (4, 8) if sidecar_of(run).get(f"load_in_{bits}bit")]):
        shown.append(
            f"It was trained on weights in {held[0]} bits and is merged into those of the model's files, where its "
            f"loss is another: sparsetrain eval {run} --no-load-in-{held[0]}bit"
        )
    return Answer(data={"output": output, "format": format, "files": files}, show=[f"Wrote {output}", *shown])
