"""Everything with weights: the base model, the encoded data and the evaluator of one run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from prunepeft._version import __version__
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Outcome, Target
from prunepeft.metrics import METRICS
from prunepeft.plan import Plan, check_device
from prunepeft.prefix.reuse import PrefixReuse
from prunepeft.progress import Progress, SilentProgress
from prunepeft.sharding import shard_base
from prunepeft.space import Placement
from prunepeft.state import RunFolder
from prunepeft.supernet import detach
from prunepeft.supernet.compiling import check_backend
from prunepeft.tasks.packing import ROWS_CHECKED, check_packing
from prunepeft.training import Phases, TrainerEvaluator
from prunepeft.training.full import first_seed
from prunepeft.training.trial_cache import TrialCache


class Engine:
    """Loads what a plan needs, once.

    Args:
        plan: What to do.
        folder: Where finished calls and training states are kept.
        is_main: Whether this process writes.
        progress: Where progress goes.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        is_main: bool,
        progress: Progress | None = None,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.is_main = is_main
        device = check_device(plan.config.device)
        if plan.config.train.compile is not None:
            check_backend(plan.config.train.compile)
        self.bf16 = plan.uses_bf16(device)
        trust = plan.config.trust_remote_code
        self.processor = plan.task.load_processor(plan.config.model, trust_remote_code=trust)
        self.phases = self._phases(device, progress or SilentProgress())
        self.model = self._load_model()
        cache = self._cache(device)
        if plan.config.shard:
            shard_base(self.model, list(plan.head), device)
        self.evaluator = TrainerEvaluator(
            self.model,
            self.phases,
            self._target(),
            folder.journal,
            folder.state_dir,
            writes=is_main,
            on_event=self.on_event,
            cache=cache,
        )

    def encode(self, rows: Dataset) -> Dataset:
        """Rows as the model reads them."""
        return self.plan.task.encode(
            rows, self.plan.splits, self.processor, self.plan.config.train.max_length
        )

    def measure(self, adapter: Path, rows: Dataset | None = None) -> dict[str, float]:
        """Metrics of an adapter folder, read from disk; on raw rows or the validation split."""
        encoded = self.phases.validation if rows is None else self.encode(rows)
        net = PeftModel.from_pretrained(self.model, str(adapter))
        try:
            return self.phases.evaluate(net, encoded)
        finally:
            detach(net)

    @contextlib.contextmanager
    def trained(self, placement: Placement, outcome: Outcome) -> Iterator[PeftModel]:
        """The base model with the best weights of a finished training on it."""
        seed = first_seed(self.plan.config.seed)  # goes into the adapter's config
        net = self.evaluator.attach(placement, seed, weights=self.evaluator.weights(outcome))
        try:
            yield net
        finally:
            detach(net)

    def on_event(self, kind: str, **fields: Any) -> None:
        """Append to the run's metrics."""
        if self.is_main:
            self.folder.log_metrics(kind=kind, **fields)

    def _load_model(self) -> PreTrainedModel:
        """The base model with its task head, which trains in full: small steps need fp32."""
        plan = self.plan
        model = plan.task.load_model(
            plan.config.model,
            plan.splits,
            dtype="bfloat16" if self.bf16 else "float32",
            seed=plan.config.seed,
            storage=plan.storage,
            device=check_device(plan.config.device),
            trust_remote_code=plan.config.trust_remote_code,
        )
        self._check_packing(model)
        for name in plan.head:
            model.get_submodule(name).float()
        return model

    def _phases(self, device: str, progress: Progress) -> Phases:
        task = self.plan.task
        return Phases(
            train=self.encode(self.plan.splits.train),
            validation=self.encode(self.plan.splits.validation).sort("length"),
            collator=task.collator(self.processor),
            compute=task.compute,
            preprocess_logits=task.preprocess_logits,
            settings=self.plan.config.train,
            device=device,
            bf16=self.bf16,
            progress=progress,
            packer=self._packer(),
            sharded=self.plan.config.shard,
            prefix=PrefixReuse(
                int(self.plan.config.train.prefix_cache_gb * 1e9), self.folder.state_dir
            ),
        )

    def _packer(self) -> Any:
        """What packs rows for training, if that is asked for."""
        train, task = self.plan.config.train, self.plan.task
        packer = task.packer(self.processor, train.max_length) if train.packing else None
        if train.packing and packer is None:
            raise ConfigError(
                f"train.packing=true packs rows of a causal language model, and the task is "
                f"{task.name}; leave it out."
            )
        return packer

    def _check_packing(self, model: PreTrainedModel) -> None:
        """Raise ConfigError if the model does not keep packed rows apart."""
        phases = self.phases
        if phases.packer is None:
            return
        lengths = list(phases.train["length"])
        shortest = sorted(range(len(lengths)), key=lambda i: lengths[i])[:ROWS_CHECKED]
        rows = phases.train.__getitems__(shortest)
        check_packing(model.eval(), phases.collator, phases.packer, rows)

    def _cache(self, device: str) -> TrialCache | None:
        place = self.plan.config.cache
        if place is None:
            return None
        cache = TrialCache(Path(place), self.model, device)
        if self.plan.config.shard and self.is_main:
            cache.read_base()  # while the weights are whole
        return cache

    def _target(self) -> Target:
        plan, config = self.plan, self.plan.config
        context = {
            "model": config.model,
            "data": plan.splits.fingerprint,
            "task": plan.task.name,
            "metric": plan.metric,
            "bf16": self.bf16,
            "head_seed": config.seed,
            "train": config.train.model_dump(mode="json", exclude={"epochs"}),
            "search_lr": config.search.lr,
            "version": __version__,
        }
        if config.quantize != "none":
            context["quantize"] = config.quantize
        return Target(
            metric=plan.metric,
            greater_is_better=METRICS.get(plan.metric).greater_is_better,
            head=list(plan.head),
            task_type=plan.task.peft_task_type,
            stratify=plan.splits.labels is not None,
            search_lr=config.search.lr or config.train.lr,
            context=context,
        )
