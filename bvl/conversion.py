"""Models in and out, with proof: a foreign folder becomes a run folder, a run a folder for another library."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bvl.convert.card import model_card
from bvl.convert.exporting import export_model
from bvl.convert.importing import Imported, import_model
from bvl.convert.inputs_parity import compare_inputs
from bvl.convert.parity import TOLERANCE, Difference, Tolerance, prove
from bvl.convert.peers import import_peer
from bvl.convert.preprocess import as_written
from bvl.convert.preprocess import differences as rounded_otherwise
from bvl.convert.report import Report
from bvl.convert.torch_format.compare import compare_torch
from bvl.convert.torch_format.export import export_torch
from bvl.errors import ConversionError
from bvl.models.text import TextConfig
from bvl.runs import Components, RunFolder, components_of, save_components, write_atomic

logger = logging.getLogger(__name__)

Format = Literal["open_clip", "hf", "torch"]
FORMATS: tuple[Format, ...] = ("open_clip", "hf", "torch")
LIBRARIES = {"open_clip": "open_clip", "hf": "transformers", "torch": "torch"}


def import_run(
    spec: str | Path,
    out: Path,
    *,
    check: bool = True,
    tolerance: Tolerance = TOLERANCE,
    context_length: int | None = None,
) -> Report:
    """Write the run folder of a foreign model, and its parity.json.

    check: run both models and compare them. Raises ConversionError, and RunFolderError for a folder that is taken.
    """
    _check_free(out)
    imported = import_model(spec, context_length=context_length)
    if check:
        import_peer(LIBRARIES[imported.source.library], what="the proof (--no-check does without)")
    # First what can fail, so that no folder is left that nobody has compared.
    report = _import_report(imported, spec, out, check, tolerance)
    save_components(components_of(imported), out)
    write_atomic(out / "parity.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _import_report(
    imported: Imported, spec: str | Path, out: Path, check: bool, tolerance: Tolerance
) -> Report:
    source, config, tokenizer = imported.source, imported.config, imported.tokenizer
    differences = inputs = None
    if check:
        differences = prove(
            config,
            imported.params,
            tokenizer,
            imported.family,
            source.config,
            source.folder,
            tolerance=tolerance,
        )
        inputs = compare_inputs(
            source.library,
            source.folder,
            source.config,
            preprocess=None if config.model.image is None else config.data.preprocess,
            tokenizer=tokenizer if _reads_text(config) else None,
            words_alone=_words_alone(config, source.library),
            padding=_reads_padding(config),
        )
    return Report(
        str(spec),
        str(out),
        imported.family.name,
        imported.converted,
        imported.unread,
        differences,
        inputs,
        tolerance,
    )


def export(
    components: Components,
    out: Path,
    format: Format,
    *,
    model: Any,
    source: str,
    check: bool = True,
    tolerance: Tolerance = TOLERANCE,
    hub_id: str | None = None,
    run: RunFolder | None = None,
) -> Report:
    """Write a model for another library: weights, config, tokenizer, preprocessing, model card and parity.json.

    model: the same as components, with the methods of the public API. run: where env.json and eval.json are taken from.
    check: load the folder with its library and compare. Raises ConversionError where the format cannot hold the model.
    """
    if format not in FORMATS:
        raise ConversionError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    _check_free(out)
    if hub_id is not None and format != "open_clip":
        raise ConversionError(
            "hub_id is the name under which open_clip finds a BERT's config: format='open_clip'"
        )
    if check:
        import_peer(LIBRARIES[format], what="the proof (--no-check does without)")
    with _new_folder(out):
        return _export(
            components,
            out,
            format,
            model=model,
            source=source,
            check=check,
            tolerance=tolerance,
            hub_id=hub_id,
            run=run,
        )


def _export(
    components: Components,
    out: Path,
    format: Format,
    *,
    model: Any,
    source: str,
    check: bool,
    tolerance: Tolerance,
    hub_id: str | None,
    run: RunFolder | None,
) -> Report:
    config, tokenizer = components.config, components.tokenizer
    if format == "torch":
        report = _export_torch(components, out, model=model, source=source, check=check, tolerance=tolerance)
        how_to_load, notes = None, ()
        preprocess = components.preprocess
    else:
        exported = export_model(
            out, format, config=config, params=components.params, tokenizer=tokenizer, hub_id=hub_id
        )
        # What the library makes of the preprocessing, which may round a size otherwise; the report says where.
        preprocess, roundings = components.preprocess, ()
        if config.model.image is not None:
            preprocess, roundings = (
                as_written(preprocess, format),
                tuple(rounded_otherwise(preprocess, format)),
            )
        differences = inputs = None
        if check:
            differences = prove(
                config,
                components.params,
                tokenizer,
                exported.family,
                exported.foreign,
                out,
                tolerance=tolerance,
            )
            inputs = compare_inputs(
                format,
                out,
                exported.foreign,
                preprocess=None if config.model.image is None else preprocess,
                tokenizer=tokenizer if _reads_text(config) else None,
                words_alone=_words_alone(config, format),
                padding=_reads_padding(config),
            )
        report = Report(
            source,
            str(out),
            exported.family.name,
            exported.converted,
            exported.unwritten,
            differences,
            inputs,
            tolerance,
            roundings,
        )
        how_to_load = exported.family.how_to_load(out.name)
        notes = exported.family.notes(exported.foreign, out)
    write_atomic(out / "preprocess.json", json.dumps(preprocess.to_dict(), indent=2) + "\n")
    if not (out / "tokenizer.json").is_file():
        tokenizer.save(out / "tokenizer.json")
    write_atomic(out / "parity.json", json.dumps(report.to_dict(), indent=2) + "\n")
    card = model_card(
        config,
        format=format,
        env=_json(run.env if run else None),
        evaluation=_json(run.eval if run else None),
        parity=report.to_dict(),
        how_to_load=how_to_load,
        extra=notes,
        step=components.step,
        weights_hash=components.weights_hash() if run and run.eval.is_file() else None,
    )
    write_atomic(out / "README.md", card)
    return report


def _export_torch(
    components: Components, out: Path, *, model: Any, source: str, check: bool, tolerance: Tolerance
) -> Report:
    calibration = components.calibration
    if calibration is not None and calibration.get("weights_hash") != components.weights_hash():
        logger.warning("calibration.json is of other weights than these, so it is not exported")
        calibration = None
    converted = export_torch(
        out,
        config=components.config,
        params=components.params,
        tokenizer=components.tokenizer,
        calibration=calibration,
    )
    differences = None
    if check:
        differences = [
            Difference(
                "method",
                "fixed images and texts",
                name,
                "",
                absolute,
                relative,
                (absolute <= tolerance.embed if name.startswith("embed") else relative <= tolerance.relative),
            )
            for name, absolute, relative in compare_torch(model, out)
        ]
    return Report(source, str(out), "bvl_model.py", converted, {}, differences, None, tolerance)


def _reads_text(config: Any) -> bool:
    return config.model.text is not None or config.model.decoder is not None


def _words_alone(config: Any, library: str) -> bool:
    """Whether the tokens around a text are the task's matter: tokenizers of language models often add none."""
    return library == "hf" and config.model.text is None


def _reads_padding(config: Any) -> bool:
    """Whether what stands behind a text changes its embedding."""
    text = config.model.text
    return isinstance(text, TextConfig) and text.attend_padding and (not text.causal or text.pool == "last")


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists and is not empty; choose another folder")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Make the folder; where nothing could be written into it, leave none."""
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not there and not any(out.iterdir()):
            out.rmdir()


def _json(path: Path | None) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
