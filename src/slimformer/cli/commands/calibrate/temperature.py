"""`slimformer calibrate temperature`: which temperature of attention serves embeddings best."""

from __future__ import annotations

from slimformer.cli import options
from slimformer.cli.choice import choose


def temperature(
    model: options.Model,
    output: options.Output,
    data: options.TaskData = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Sharpen an embedding model's attention: better embeddings of long texts.

    The temperature is the best on --data; for text, the mildest that keeps long texts apart.
    --set takes temperatures, batch_size, hold_out and text_field. slimformer show draws the curve.
    """
    choose(
        "TempScale",
        model,
        output,
        data=data,
        fields={},
        options={},
        more=more,
        embeddings=True,
        device=device,
        dtype=dtype.value,
        force=force,
        table="temperature_table",
    )
