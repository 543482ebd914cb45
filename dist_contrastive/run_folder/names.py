"""What the files of a run's folder are called."""

CONFIG, STATUS, DONE = "config.json", "status.json", "DONE"
METRICS, TENSORBOARD, MACHINE = "metrics.jsonl", "tensorboard", "machine.json"
CHECKPOINTS = "checkpoints"
ENCODER, PROJECTOR, TEXT, TOKENIZER = (
    "encoder.safetensors", "projector.safetensors", "text.safetensors", "tokenizer.json",
)  # fmt: skip
"""What a finished run leaves for others to use."""
PROBE, PROBES = "probe.json", "probes"
"""The scores that belong to the run, and a folder for others."""
PLOTS, REPORT = "plots", "report.html"
EXPORT = "export"
"""The folder that export writes, where it is given no other."""

OWN_NAMES = (
    CONFIG, METRICS, TENSORBOARD, CHECKPOINTS, ENCODER, PROJECTOR, TEXT, TOKENIZER, PROBE, PROBES, PLOTS, REPORT, MACHINE, STATUS,
    DONE, EXPORT,
)  # fmt: skip
"""Everything a run writes; `--overwrite` deletes these and nothing else."""
