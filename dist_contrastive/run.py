"""A run: connect the ranks, open the dataset and the run's folder, build, fit, conclude."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, Literal

from accelerate import Accelerator

from dist_contrastive import distributed, liveness, preflight, signals
from dist_contrastive.atomic import write_atomic, writing
from dist_contrastive.batch import steps_per_epoch
from dist_contrastive.cadence import Cadence
from dist_contrastive.checkpoint import Checkpoint, save_module
from dist_contrastive.config import TrainConfig, UserError, flatten, require, to_dict
from dist_contrastive.data.beton import Dataset, open_verified
from dist_contrastive.data.compiled import announced_compilation
from dist_contrastive.data.format import TRAIN
from dist_contrastive.data.loader import Batches
from dist_contrastive.data.ready import get_ready
from dist_contrastive.data.resident import loader_of
from dist_contrastive.evaluation.scorer import Scorer
from dist_contrastive.launch import connect, describe_machine
from dist_contrastive.methods import Method
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.metrics import MetricsLog, StepTimer, TimeSplit
from dist_contrastive.progress import TrainingProgress, describe_scores, print_scores
from dist_contrastive.run_folder.folder import RunFolder
from dist_contrastive.run_folder.names import (
    CONFIG,
    DONE,
    ENCODER,
    MACHINE,
    METRICS,
    PLOTS,
    PROBE,
    PROJECTOR,
    REPORT,
    TEXT,
    TOKENIZER,
)
from dist_contrastive.signals import Stopped
from dist_contrastive.trainer import StepReport, Trainer, build_method
from dist_contrastive.trial import fewest_samples
from dist_contrastive.weights import read_weights, start_from

CLOSE_S, FAULT_S = 60.0, 4.0
"""How long a run that fails waits for a checkpoint under way: by an error of its own, and where ranks or the launcher are
gone, when little time is left."""


def train(config: TrainConfig) -> bool:
    """Run what `config` describes; whether it ran to its end (or else was stopped, to be resumed)."""
    times = TimeSplit()
    fewest = fewest_samples(config)
    accelerator = connect(config)
    with signals.deferred(), liveness.watch(60 * config.launch.timeout_minutes):
        try:
            dataset = distributed.together(lambda: open_verified(config.data.path))
        except Stopped:
            if distributed.is_main():
                print("stopped before the first step; the same command starts again")
            return False
        preflight.check_dataset(config, dataset.manifest)
        train_split = dataset.indices(TRAIN)
        preflight.check_crops(config, dataset.heights[train_split], dataset.widths[train_split])
        fewest = preflight.check_passes(config, distributed.world_size(), fewest)
        with open_run_folder(config) as (folder, start):
            run = Run(config, accelerator, dataset, folder, times, fewest)
            try:
                run.begin(start)
                if not fit(run):
                    return False
                run.conclude()
            except Stopped:
                run.stop()
                return False
            finally:
                run.close()
        return True


def fit(run: "Run") -> bool:
    """Train to the end; False if the ranks agreed to stop before it."""
    trainer, progress, config = run.trainer, run.progress, run.config
    with progress, announced_compilation(progress.say):
        while trainer.epoch < config.epochs:
            epoch = trainer.epoch
            with run.batches() as batches:
                for batch in batches:
                    reports = trainer.update(batch)
                    progress.advance(trainer.step, epoch, run.log(reports, batches.wait_ms))
                    if trainer.stopping or trainer.step == config.stop_after_steps:
                        run.stop(probes=not trainer.stopping)
                        return False
                    run.save_where_due()
            run.end_epoch(epoch)
    return True


@contextmanager
def open_run_folder(config: TrainConfig) -> Iterator[tuple[RunFolder | None, Literal["fresh", "resume"]]]:
    """The run's folder, locked, on rank 0 (None elsewhere), and on every rank whether the run starts or goes on.

    Nothing in it has changed by then: the run claims it once all that may refuse the run is behind it.
    """
    folder = distributed.together(lambda: RunFolder(config.run_dir) if distributed.is_main() else None)
    try:
        start = distributed.broadcast_object(distributed.together(lambda: folder.open(config) if folder else None))
        if folder:
            liveness.tell_faults(folder.status.fail)
        with folder.status.tells_faults() if folder else nullcontext():
            yield folder, start
    finally:
        if folder:
            folder.close()


class Run:
    """One run: its trainer, its data, its folder and logs, its probe.

    `folder` and `metrics` are there on rank 0 alone, which alone writes; everything else is on every rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        dataset: Dataset,
        folder: RunFolder | None,
        times: TimeSplit,
        fewest: int,
    ) -> None:
        """`fewest`: samples that a forward pass of this rank needs at least."""
        self.config = config
        self.dataset = dataset
        self.folder = folder
        say = print if distributed.is_main() else str
        with announced_compilation(say), liveness.busy("builds the model and compiles the loader"):
            ready = get_ready(
                dataset, config.augment, accelerator.device,
                resident=config.data.resident, process=distributed.local_rank(),
            )  # fmt: skip
            self.trainer = Trainer(
                config,
                accelerator,
                steps_per_epoch=steps_per_epoch(len(dataset.indices(TRAIN)), config.batch.size),
                dataset_sha256=dataset.manifest.identity,
                fewest=fewest,
            )
            ready.result()
        self.loader = loader_of(config, dataset, distributed.share_of(config.batch.size), accelerator.device)
        self.scorer: Scorer | None = None
        if config.probe.enabled:
            self.scorer = Scorer(
                self.loader,
                probe=config.probe,
                device=accelerator.device,
                has_towers=config.method.text_tower is not None,
            )
        self.scores: dict[str, Any] = {"baselines": {}, "history": []}
        self.machine = describe_machine(config, accelerator)
        self.metrics: MetricsLog | None = None
        self.unwritten: UserError | None = None
        """Why the metrics could not be written, until all ranks have stopped for it."""
        self.timer = StepTimer(config.batch.size, accelerator.device)
        self.times = times
        self.starts: list[dict[str, Any]] = []
        """When the run was started and each time resumed: `step`, how many updates were done, and `time` (UTC, ISO 8601)."""
        self.saved_step = 0
        """The step of which a checkpoint has everything; a run that has done none needs no checkpoint."""
        self.probing = Cadence.of_probes(config.probe)
        self.saving = Cadence.of_checkpoints(config.checkpoint)
        self.is_warm = False
        """Whether this process has done a step."""
        self.is_alarmed = False
        """Whether this process has said that the run goes wrong."""

    def begin(self, start: Literal["fresh", "resume"]) -> None:
        """Take over the newest checkpoint that verifies, or else the weights to start from; then claim the folder."""
        trainer, config = self.trainer, self.config
        checkpoint = self._newest_checkpoint() if start == "resume" else None
        if checkpoint:
            extra = distributed.together(lambda: trainer.restore(checkpoint))
            self.scores, self.starts, self.times.seconds = extra["scores"], extra["starts"], extra["seconds"]
        notes = self._start_from(bool(checkpoint), start)
        self.starts.append({"step": trainer.step, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        self.progress = TrainingProgress(
            trainer.total_steps, trainer.step, config.epochs, visible=distributed.is_main()
        )
        trainer.gradient.say = self.progress.say
        plan = trainer.plan_memory() if config.batch.micro == "auto" and not trainer.gradient.micro else None
        if plan:
            self.machine["memory_plan"] = to_dict(plan)
            notes.append(plan.describe())
        if checkpoint:
            notes.append(trainer.normalization_change(checkpoint.state["ranks"], checkpoint.state["micro"]))
        self.saved_step = trainer.step
        self.write(CONFIG, lambda folder: folder.claim(self.config))
        ranks, step = distributed.world_size(), trainer.step
        self.write(
            "status.json", lambda folder: folder.status.begin(step=step, total_steps=trainer.total_steps, ranks=ranks)
        )
        if self.folder:
            liveness.tell_faults(self._on_fault)
        self.write(METRICS, self._open_metrics)
        self.write_machine()
        self._introduce(start)
        for note in filter(None, notes):
            self.progress.say(note)
        distributed.together(signals.give_way)
        if config.init_from and not trainer.step:
            self.score(0)
        if trainer.step and not trainer.step_in_epoch:  # of a run that ended here, when it was shorter
            self._probe_where_due(trainer.epoch - 1)
        self.timer.restart()
        self.times.lap("start")

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The same on every rank; each reads it for itself."""
        store = self.trainer.store

        def find() -> Checkpoint | None:
            with liveness.busy(f"verifies {store.root}"):
                return store.newest() if distributed.is_main() else None

        newest = distributed.together(find)
        step = distributed.broadcast_object(newest.step if newest else None)
        return None if step is None else distributed.together(lambda: newest or store.load(step))

    def _start_from(self, has_checkpoint: bool, start: Literal["fresh", "resume"]) -> list[str]:
        """Take over the weights that `--from` names, unless a checkpoint has what became of them; what there is to say of it."""
        source = self.config.init_from
        if source is None:
            return []
        folder = self.folder if start == "resume" else None
        recorded = distributed.together(lambda: folder.recorded("init_sha256") if folder else None)
        sha256: tuple[str, ...] = tuple(distributed.broadcast_object(recorded) or ())
        notes = []
        if not has_checkpoint:
            weights = distributed.together(lambda: read_weights(source))
            sha256 = sha256 or distributed.broadcast_object(weights.sha256)
            changed = (
                f"--from {source}: its SHA-256 is no longer that with which this run was started; give the same weights"
            )
            distributed.together(lambda: require(weights.sha256 == sha256, changed))
            notes.append(distributed.together(lambda: start_from(self.trainer.method, weights)))
            self.trainer.replicas.adopt_parameters()
        self.config = dataclasses.replace(self.config, init_sha256=sha256)
        return notes

    def write(self, name: str, call: Callable[[RunFolder], object]) -> None:
        """`call` on rank 0, which alone writes; where `name` can't be written all ranks stop, with the line that says so."""

        def write() -> None:
            if self.folder:
                with writing(self.folder.path / name, self.trainer.goes_on):
                    self.folder.check_held()
                    call(self.folder)

        distributed.together(write)

    def _open_metrics(self, folder: RunFolder) -> None:
        probed = [entry["step"] for entry in self.scores["history"]]
        self.metrics = MetricsLog(folder.path, self.trainer.step, self.trainer.goes_on, probed)

    def flush(self) -> None:
        """All ranks stop here where the metrics of an earlier step could not be written."""

        def flush(folder: RunFolder) -> None:
            if self.unwritten:
                raise self.unwritten
            if self.metrics:
                self.metrics.flush()

        self.write("tensorboard", flush)

    def _introduce(self, start: Literal["fresh", "resume"]) -> None:
        trainer, config, machine = self.trainer, self.config, self.machine
        say = self.progress.say
        say(
            f"{config.recipe}: {config.method.name}, {config.encoder.name} ({trainer.num_parameters / 1e6:.1f} M parameters with "
            f"projector), {self.dataset.path} ({self.dataset.manifest.num_train:,} training samples), {config.run_dir}"
        )
        zero = f", {machine['optimizer']}" if preflight.zero_launch(config) else ""
        say(
            f"{machine['ranks']} rank(s), {machine['device']}, {machine['backend']}, {machine['precision']}{zero}; global batch "
            f"{config.batch.size}, learning rate {config.optim.learning_rate:g} per 256 samples = "
            f"{trainer.peak_learning_rate:g}; {config.epochs} epochs of {trainer.steps_per_epoch} steps"
        )
        if self.scorer and not self.scorer.has_labels:
            say(
                f"{self.dataset.path} {self.dataset.manifest.describe_labels()}: no linear probe and no kNN, which need classes"
            )
        for remark in preflight.remarks(config, self.dataset.manifest.num_train):
            say(remark)
        if start == "resume":
            done = (
                f"goes on after step {trainer.step}" if trainer.step else "no checkpoint is there: starts from step 1"
            )
            say(f"{done} of {trainer.total_steps}")

    def batches(self) -> Batches:
        """What is left of the current epoch, for this rank."""
        return self.loader.epoch(self.trainer.epoch, self.trainer.step_in_epoch)

    def log(self, reports: list[StepReport], wait_ms: float) -> dict[str, float] | None:
        """A step is done, for whose batch this rank waited `wait_ms`: write what is known by now; see `_write_metrics`."""
        self.timer.count(wait_ms)
        if self.is_warm:
            self.times.lap("training", {"waiting_for_data": wait_ms / 1e3})
        else:  # compiles, the loader too
            self.times.lap("first_step")
            self.is_warm = True
        return self._write_metrics(reports)

    def catch_up(self) -> None:
        """Wait for the numbers of the last step, and write them: before what they decide about, a checkpoint or a probe."""
        self._write_metrics(self.trainer.settle())

    def _write_metrics(self, reports: list[StepReport]) -> dict[str, float] | None:
        """Write the metrics of steps; return those of a step that is logged, which have times.

        Where they can't be written all ranks stop after the next step (`flush`).
        """
        logged = None
        for report in reports:
            step, values = report.step, report.values
            if self.folder:
                self.folder.status.step = step
            is_logged = self.trainer.is_logged(step)
            if is_logged:
                self._sound_alarm(values)
                logged = values = {**values, **self.timer.read()}
            if self.folder and self.metrics and not self.unwritten:
                try:
                    if is_logged:
                        self.folder.check_held()
                    self.metrics.write(step, (step - 1) // self.trainer.steps_per_epoch, values)
                except UserError as error:
                    self.unwritten = error
                    self.trainer.interrupt()
        return logged

    def _sound_alarm(self, values: dict[str, float]) -> None:
        """Say once, of a step that goes wrong, what the method says of it."""
        clock = self.trainer.clock
        text = "" if self.is_alarmed else self.trainer.method.alarm(values, clock)
        if text:
            self.progress.say(f"warning: step {clock.step}: {text}")
            self.is_alarmed = True

    def save_where_due(self) -> None:
        """Checkpoint in mid-epoch; at its end there is more to do first (`end_epoch`)."""
        if self.trainer.step_in_epoch and self.saving.due(self.trainer.clock):
            self.catch_up()
            self.save()
            self.timer.restart()

    def end_epoch(self, epoch: int) -> None:
        """Probe and checkpoint where they are due."""
        self.catch_up()
        self.flush()
        self._probe_where_due(epoch)
        clock = self.trainer.clock
        if self.saving.due(clock) or clock.step == clock.total_steps:
            self.save()
            distributed.together(signals.give_way)  # before another step, which would be saved again
        self.timer.restart()

    def stop(self, *, probes: bool = False) -> None:
        """Save what is not saved, so that the same command goes on as if nothing had happened.

        A probe that is due here is done by the run that goes on, or now.
        """
        step = self.trainer.step
        self.catch_up()
        self.flush()
        self.settle()
        if probes and self.trainer.step_in_epoch == 0:
            self._probe_where_due(self.trainer.epoch - 1)
        if step != self.saved_step:
            self.save()
            self.settle()
        self.write_machine()
        asked = f"--stop-after-steps {self.config.stop_after_steps}"
        reason = next(filter(None, distributed.gather_objects(signals.reason())), asked)
        self.write("status.json", lambda folder: folder.status.end("stopped", reason))
        self.progress.say(
            f"stopped {f'after step {step}' if step else 'before the first step'}; {self.trainer.resume_hint} goes on from there"
        )

    def _probe_where_due(self, epoch: int) -> None:
        """The last epoch's probe is `conclude`'s."""
        clock = self.trainer.clock
        known = any(entry["step"] == clock.step for entry in self.scores["history"])
        if self.probing.due(clock) and clock.step < clock.total_steps and not known:
            self.score(epoch + 1)

    def score(self, epochs_done: int) -> None:
        """Probe the encoder as it is and write probe.json; the first probe also scores the baselines."""
        if not self.scorer:
            return
        if not self.scores["baselines"]:
            self.scores["baselines"] = self.scorer.baselines(self.untrained())
        result = self.scorer.score(self.trainer.method)
        earlier = [entry for entry in self.scores["history"] if entry["step"] != self.trainer.step]
        self.scores["history"] = [*earlier, {"epoch": epochs_done, "step": self.trainer.step, **result}]

        def write(folder: RunFolder) -> None:
            folder.write_json(PROBE, self.summary())
            if self.metrics:
                self.metrics.write_probe(self.trainer.step, max(0, epochs_done - 1), result)

        self.write(PROBE, write)
        self.progress.say(f"probe after epoch {epochs_done}: {describe_scores(result)}")
        self.times.lap("probes")

    def summary(self) -> dict[str, Any] | None:
        """What probe.json holds; None without a probe."""
        return self.scorer.summary(self.scores["baselines"], self.scores["history"]) if self.scorer else None

    def untrained(self) -> Method:
        """The method as it was before the first step: its weights are a function of the config."""
        return build_method(self.config)

    def _on_fault(self, line: str) -> None:
        """Ranks are missing, or the launcher: this process is about to end."""
        if self.folder:
            self.folder.status.fail(line)
        self.trainer.saver.wait(FAULT_S)

    def save(self) -> None:
        """Begin a checkpoint of everything that an uninterrupted run would have in memory."""
        self.trainer.save({"scores": self.scores, "starts": self.starts, "seconds": self.times.seconds})
        self.saved_step = self.trainer.step
        self.saving.done(self.trainer.clock)
        self.times.lap("checkpoints")

    def settle(self) -> None:
        """Wait until the last checkpoint is written; all ranks stop where it can't be."""
        self.trainer.saver.settle()
        self.times.lap("checkpoints")

    def write_machine(self) -> None:
        """Write machine.json: what the run runs on, when it was started, and where its time went so far."""
        machine = {**self.machine, "starts": self.starts, "seconds": self.times.seconds}
        self.write(MACHINE, lambda folder: folder.write_json(MACHINE, machine))

    def conclude(self) -> None:
        """The last probe, the encoder for others to use, the report, and DONE."""
        # What draws takes seconds to import, and is needed once.
        from dist_contrastive.report import write_report
        from dist_contrastive.report.collect import collect_report

        config, trainer = self.config, self.trainer

        def seconds() -> dict[str, float]:
            self.times.lap("report")
            return self.times.seconds

        self.settle()
        self.score(config.epochs)
        report = collect_report(
            config,
            self.loader,
            method=trainer.method,
            untrained=self.untrained().exported.to(trainer.device),
            device=trainer.device,
            schedules=trainer.planned_schedules(),
            probe=self.summary(),
            machine=self.machine,
            starts=self.starts,
            seconds=seconds,
        )
        text = {
            "config": json.dumps(to_dict(config)),
            "step": str(trainer.step),
            "dataset_sha256": self.dataset.manifest.identity,
        }
        method = trainer.method
        self.write(ENCODER, lambda folder: save_module(folder.path / ENCODER, method.exported.body, text))
        self.write(PROJECTOR, lambda folder: save_module(folder.path / PROJECTOR, method.exported_projector, text))
        if isinstance(method, ImageText):
            captions, tower = self.dataset.captions, method.text_tower
            assert captions is not None, "a text tower learns from captions"
            self.write(TEXT, lambda folder: save_module(folder.path / TEXT, tower, text))
            self.write(TOKENIZER, lambda folder: write_atomic(folder.path / TOKENIZER, captions.tokenizer_json))

        def write(folder: RunFolder) -> None:
            if report and self.metrics:
                with liveness.busy("draws the report"):
                    page = write_report(report)
                self.metrics.conclude(trainer.step, flatten(report.config), page.parent / PLOTS)

        self.write(REPORT, write)
        self.flush()
        self.times.lap("report")
        self.write_machine()
        self.write(DONE, lambda folder: folder.finish())
        if report and report.probe:
            print_scores(report.probe)
        self.progress.say(f"report: {config.run_dir / REPORT}\nDONE in {self.times.total:.0f} s")

    def close(self) -> None:
        """Bring to disk what is on its way there; however the run ended, its last steps are what one wants to keep and see."""
        self.trainer.saver.wait(CLOSE_S)
        self.loader.close()
        if self.metrics:
            self.metrics.close()
